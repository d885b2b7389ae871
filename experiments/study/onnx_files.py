"""Networks as ONNX files, run where onnxruntime and numpy are and nothing else: answers, skipped stages, time."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import branchy_jax as bj
from branchy_jax.models.branchy import without_branches
from branchy_jax.types import Variables
from experiments.study import run_onnx

PUBLISHED = {'b-lenet': 'mnist', 'b-resnet110': 'cifar10'}
"""Networks whose published weights are taken, and the data sets that they are for."""
RANDOM = ('b-alexnet', 'b-vit')
"""Networks with random weights, on random images; thresholds let 70 % leave at the first exit."""

_TIE = 1e-4  # relative distance from a threshold below which rounding may decide


@dataclasses.dataclass(frozen=True)
class Exported:
    """A network to be exported, and images for it.

    Attributes:
        name: of the network.
        model: with exits.
        variables: of it, which serve its baseline, too.
        policy: when images leave.
        normalization: part of the file; ``None``: images are the network's input.
        images: that the file takes.
    """

    name: str
    model: bj.BranchyNet
    variables: Variables
    policy: bj.ExitPolicy
    normalization: bj.Normalization | None
    images: np.ndarray

    @property
    def inputs(self) -> Any:
        """What the network takes."""
        return self.images if self.normalization is None else self.normalization(self.images)


def load(name: str, count: int) -> Exported:
    """Returns a network of `PUBLISHED` or `RANDOM` and ``count`` images, test images where it is a published one."""
    if name in PUBLISHED:
        weights = bj.models.load_pretrained(name, dataset=PUBLISHED[name])
        images = np.asarray(bj.data.load_dataset(PUBLISHED[name]).test.image[:count])
        policy = weights.operating_points[0].policy
        return Exported(name, weights.model, weights.variables, policy, weights.normalization, images)
    model = bj.models.create(name)
    images = np.random.default_rng(0).normal(size=(count, *model.image_shape)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    unsure = bj.criteria.entropy_of_logits(jnp.stack(jax.jit(model.apply)(variables, images)))
    shares = [0.7] + [0.67] * (model.num_exits - 2)
    thresholds = [float(np.quantile(values, share)) for values, share in zip(unsure, shares, strict=False)]
    return Exported(name, model, variables, bj.criteria.as_policy(thresholds, model.num_exits), None, images)


def compare(exported: Exported, workdir: Path, python: Path, *, passes: int) -> dict[str, Any]:
    """Writes a network and its baseline as files, and runs them in another environment.

    Args:
        exported: the network.
        workdir: for the files.
        python: with onnxruntime and numpy.
        passes: over the images, in turns.

    Returns:
        What `run_onnx` tells, and ``mac limit``.

    Raises:
        SystemExit: an answer differs, or a stage ran that should not have.
    """
    model, variables = exported.model, exported.variables
    workdir.mkdir(parents=True, exist_ok=True)
    files = [workdir / f'{exported.name}.onnx', workdir / f'{exported.name}-without-exits.onnx']
    baseline = without_branches(model)
    for path, network, thresholds in zip(files, (model, baseline), (exported.policy, []), strict=True):
        bj.export.save_onnx(path, network, variables, thresholds=thresholds, normalization=exported.normalization)
    answer = bj.inference.dense(model)(variables, exported.inputs, exported.policy)
    outputs = bj.inference.exit_outputs(model, variables, exported.inputs, criterion=exported.policy.criterion)
    thresholds = np.asarray(exported.policy.thresholds)[:, None]
    near = np.abs(np.asarray(outputs.uncertainty)[:-1] - thresholds) <= _TIE * np.abs(thresholds)
    np.save(workdir / 'images.npy', exported.images)
    np.savez(workdir / 'answers.npz', label=answer.label, exit_index=answer.exit_index, tie=near.any(axis=0))
    arguments = [python, run_onnx.__file__, files[0], f'--images={workdir}/images.npy', f'--passes={passes}',
                 f'--expect={workdir}/answers.npz', f'--against={files[1]}']  # fmt: skip
    ran = subprocess.run(arguments, cwd=workdir, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f'{exported.name}: {ran.stdout}{ran.stderr}')
    return {'network': exported.name, **json.loads(ran.stdout), 'mac limit': mac_limit(exported, answer.exit_index)}


def mac_limit(exported: Exported, exits: Any) -> float:
    """Returns how many times fewer multiplications a network needs for images that leave so, heads included."""
    with_exits = bj.costs.count_macs(exported.model, exported.model.image_shape)
    without = bj.costs.count_macs(without_branches(exported.model), exported.model.image_shape)
    cost = np.cumsum(np.asarray(with_exits.stages, float) + np.asarray(with_exits.exits, float))
    plain = float(np.sum(without.stages) + np.sum(without.exits))
    return round(plain / float(cost[np.asarray(exits)].mean()), 3)
