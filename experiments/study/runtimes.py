"""Networks run where ONNX Runtime or IREE and numpy are and nothing else: answers, skipped stages, time."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import branchy_jax as bj
from branchy_jax.types import Variables
from experiments import run_iree
from experiments.study import run_onnx

PUBLISHED = {'b-lenet': 'mnist', 'b-alexnet': 'cifar10', 'b-resnet110': 'cifar10'}
"""Networks whose published weights are taken, and the data sets that they are for."""
RANDOM = {'b-vit': 'mnist'}
"""Networks with random weights, on test images; thresholds let 70 % leave at the first exit."""

NEEDED = {'onnx': ('numpy', 'onnxruntime'), 'iree': ('numpy', 'iree-base-compiler', 'iree-base-runtime')}
"""The packages of each runtime's environment."""

_TIE = 1e-4  # relative distance from a threshold below which rounding may decide


@dataclasses.dataclass(frozen=True)
class Exported:
    """A network to be exported, and images for it.

    Attributes:
        name: of the network.
        weights: where they come from, in words.
        model: with exits.
        variables: of it, which serve its baseline, too.
        policy: when images leave.
        normalization: of the images.
        images: stored pixels.
    """

    name: str
    weights: str
    model: Any
    variables: Variables
    policy: bj.ExitPolicy
    normalization: bj.Normalization
    images: np.ndarray

    @property
    def inputs(self) -> Any:
        """What the network takes."""
        return self.normalization(self.images)


def load(name: str, count: int) -> Exported:
    """Returns a network of `PUBLISHED` or `RANDOM` and ``count`` test images."""
    if name in PUBLISHED:
        weights = bj.models.load_pretrained(name, dataset=PUBLISHED[name])
        images = np.asarray(bj.data.load_dataset(PUBLISHED[name]).test.image[:count])
        policy = weights.operating_points[0].policy
        return Exported(name, 'published', weights.model, weights.variables, policy, weights.normalization, images)
    model, dataset = bj.models.create(name), bj.data.load_dataset(RANDOM[name])
    images = np.asarray(dataset.test.image[:count])
    inputs = dataset.normalization(images)
    variables = jax.jit(model.init)(jax.random.key(0), inputs[:1])
    unsure = bj.inference.exit_outputs(model, variables, inputs).uncertainty
    shares = [0.7] + [0.67] * (len(unsure) - 2)
    thresholds = [float(np.quantile(values, share)) for values, share in zip(unsure, shares, strict=False)]
    policy = bj.ExitPolicy(bj.criteria.entropy, jnp.array(thresholds))
    return Exported(name, 'random', model, variables, policy, dataset.normalization, images)


def run_as_onnx(exported: Exported, workdir: Path, python: Path, *, passes: int) -> list[dict[str, Any]]:
    """Writes a network and its baseline as ONNX files, and runs them in another environment.

    Args:
        exported: the network.
        workdir: for the files.
        python: with onnxruntime and numpy.
        passes: over the images, in turns; 0: no clocks.

    Returns:
        What `run_onnx` prints, and how much faster the file is than its baseline's, where there were clocks.

    Raises:
        SystemExit: an answer differs, or a stage ran that should not have.
    """
    exits = _expected(exported, workdir)
    files = [workdir / f'{exported.name}.onnx', workdir / f'{exported.name}-without-exits.onnx']
    baseline, inputs = bj.models.without_branches(exported.model), exported.inputs[:1]
    for path, network, policy in zip(files, (exported.model, baseline), (exported.policy, []), strict=True):
        bj.export.save_onnx(
            path, network, exported.variables, policy, inputs=inputs, normalization=exported.normalization
        )
    clocks = [f'--against={files[1]}', f'--passes={passes}'] if passes else []
    found = _elsewhere(python, run_onnx.__file__, files[0], workdir, *clocks)
    seconds = np.array(found.pop('ms of each pass', []))
    if len(seconds):
        ratio = bj.measure.paired_ratio(seconds[:, 0], seconds[:, 1])
        found.update(ms=np.median(seconds, axis=0).tolist(), gain=[ratio.median, ratio.low, ratio.high], passes=passes)
    costs = bj.costs.count_macs(exported.model, inputs=inputs)
    mac_limit = bj.costs.mac_limit(costs, np.bincount(exits, minlength=len(costs.stages)) / len(exits))
    return [
        {
            'network': exported.name,
            'weights': exported.weights,
            'bytes': files[0].stat().st_size,
            'conditionals': conditionals(files[0]),
            **found,
            'mac_limit': mac_limit,
        }
    ]


def run_by_iree(exported: Exported, workdir: Path, python: Path, *, passes: int) -> list[dict[str, Any]]:
    """Writes a network as a folder of programs, and runs their text in another environment.

    Args:
        exported: the network.
        workdir: for the folder.
        python: with numpy and IREE's compiler and runtime.
        passes: over the images; 0: no clocks.

    Returns:
        What `run_iree` prints of each program.

    Raises:
        SystemExit: an answer differs.
    """
    _expected(exported, workdir)
    folder = workdir / 'folder'
    shutil.rmtree(folder, ignore_errors=True)
    manifest = bj.export.save(
        folder,
        exported.model,
        exported.variables,
        exported.policy,
        inputs=exported.inputs[:1],
        normalization=exported.normalization,
    )
    found = []
    for program in run_iree.PROGRAMS:
        result = _elsewhere(python, run_iree.__file__, folder, workdir, f'--program={program}', f'--passes={passes}')
        if seconds := result.pop('ms of each pass'):
            result.update(ms=float(np.median(seconds)), passes=passes)
        size = manifest['programs'][program]['text']['bytes']
        found.append(
            {'network': exported.name, 'weights': exported.weights, 'program': program, 'bytes': size, **result}
        )
    return found


RUN = {'onnx': run_as_onnx, 'iree': run_by_iree}


def conditionals(path: Path) -> int:
    """Counts the ``If`` nodes of an ONNX file, those in branches of others too."""
    import onnx

    def count(graph: Any) -> int:
        inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField('g')]
        return sum(node.op_type == 'If' for node in graph.node) + sum(map(count, inner))

    return count(onnx.load(path).graph)


def _expected(exported: Exported, workdir: Path) -> np.ndarray:
    """Writes images and the answers of `dense`, ties marked; returns the exits."""
    model, inputs, policy = exported.model, exported.inputs, exported.policy
    answer = bj.inference.dense(model)(exported.variables, inputs, policy)
    outputs = bj.inference.exit_outputs(model, exported.variables, inputs, criterion=policy.criterion)
    thresholds = np.asarray(policy.thresholds)[:, None]
    near = np.abs(np.asarray(outputs.uncertainty)[:-1] - thresholds) <= _TIE * np.abs(thresholds)
    workdir.mkdir(parents=True, exist_ok=True)
    np.save(workdir / 'images.npy', exported.images)
    np.savez(workdir / 'answers.npz', label=answer.label, exit_index=answer.exit_index, tie=near.any(axis=0))
    return np.asarray(answer.exit_index)


def _elsewhere(python: Path, script: str, subject: Path, workdir: Path, *more: str) -> dict[str, Any]:
    """Runs a script on a subject with the images and answers of a folder; returns the line of JSON that it prints."""
    arguments = [python, script, subject, f'--images={workdir}/images.npy', f'--expect={workdir}/answers.npz', *more]
    ran = subprocess.run(arguments, cwd=workdir, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f'{subject}: {ran.stdout}{ran.stderr}')
    return json.loads(ran.stdout)
