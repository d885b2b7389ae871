"""A finished run of the main job, read back from its folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import branchy_jax as bj
from branchy_jax.types import Variables
from experiments import datasets
from experiments.configs import common


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """What a run left behind.

    Attributes:
        workdir: its folder.
        config: its settings.
        report: its ``report.json``.
        options: that the network was created with.
        model: the branchy network.
        variables: its weights.
        baseline_variables: of the baseline.
        normalization: that both were trained with.
    """

    workdir: Path
    config: ConfigDict
    report: dict[str, Any]
    options: dict[str, Any]
    model: bj.BranchyNet
    variables: Variables
    baseline_variables: Variables
    normalization: bj.Normalization

    @property
    def baseline(self) -> bj.BranchyNet:
        """The one-exit network."""
        return bj.models.without_branches(self.model)

    @property
    def thresholds(self) -> dict[str, np.ndarray]:
        """Thresholds by the name of the operating point, the table's first."""
        return {point['name']: np.array(point['thresholds'], np.float32) for point in self.report['operating_points']}

    def dataset(self) -> bj.data.Dataset:
        """Loads its data."""
        return datasets.load(self.config)


def read_run(workdir: Path | str) -> FinishedRun:
    """Reads a run.

    Raises:
        ValueError: the folder holds no finished run.
    """
    workdir = Path(workdir)
    report = bj.report.read_json(workdir / 'report.json')
    config = ConfigDict({**common.get_config().to_dict(), **bj.report.read_json(workdir / 'config.json')})
    variables, normalization = _weights(workdir / f'{config.network}.safetensors')
    baseline_variables, _ = _weights(workdir / f'{config.network[2:]}.safetensors')
    options = {
        'num_classes': report['num_classes'],
        'image_shape': tuple(report['image_shape']),
        'dtype': jnp.dtype(config.dtype),
        **datasets.own_options(config),
    }
    model = bj.models.create(config.network, **options)
    return FinishedRun(
        workdir, config, report, options, model, variables, baseline_variables, normalization
    )  # fmt: skip


def _weights(path: Path) -> tuple[Variables, bj.Normalization]:
    variables, _ = bj.checkpoint.load_weights(path)
    normalization = bj.Normalization(**variables.pop('normalization'))
    return jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), variables), normalization
