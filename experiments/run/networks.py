"""Both networks of a run, as they were trained or as they are read back, with all the options they were made with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import branchy_jax as bj
from branchy_jax import calling
from branchy_jax.types import Variables
from experiments.configs import common
from experiments.run.records import RunRecord, read_record
from experiments.run.tasks import TASKS, load


@dataclasses.dataclass(frozen=True)
class Networks:
    """A branchy network and its baseline, trained. It can be sent to another process, which makes the networks anew.

    Attributes:
        name: of the branchy one.
        options: that both are created with.
        variables: of the branchy one.
        baseline_variables: of the baseline.
        normalization: that both were trained with.
    """

    name: str
    options: Mapping[str, Any]
    variables: Variables
    baseline_variables: Variables
    normalization: bj.Normalization

    @functools.cached_property
    def model(self) -> Any:
        """The branchy network."""
        return bj.models.create(self.name, **self.options)

    @functools.cached_property
    def baseline(self) -> Any:
        """The one-exit network."""
        return bj.models.without_branches(self.model)

    @property
    def inputs(self) -> jax.ShapeDtypeStruct:
        """The shape of one image, with its batch axis."""
        return image_specs(self.options['image_shape'])

    @functools.cached_property
    def num_exits(self) -> int:
        """N of the branchy network."""
        return count_exits(self.model, self.inputs)

    @functools.cached_property
    def fast(self) -> tuple[Any, Variables]:
        """The branchy network as `branchy_jax.inference.optimize` rewrites it, with its variables."""
        return bj.inference.optimize(self.model, self.variables, inputs=self.inputs)

    @functools.cached_property
    def fast_baseline(self) -> tuple[Any, Variables]:
        """The one-exit network, rewritten in the same way, with its variables."""
        return bj.inference.optimize(self.baseline, self.baseline_variables, inputs=self.inputs)

    def __reduce__(self) -> tuple[Any, ...]:
        arrays = jax.tree.map(np.asarray, (self.variables, self.baseline_variables, self.normalization))
        return Networks, (self.name, dict(self.options), *arrays)


def image_specs(image_shape: Sequence[int]) -> jax.ShapeDtypeStruct:
    """Returns the shape ``[1, H, W, C]`` of one float32 image, for whatever traces a network."""
    return jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)


def count_exits(model: Any, inputs: Any) -> int:
    """Returns N of a network; traces it.

    Args:
        model: a network with N exits.
        inputs: an example, or its shapes.
    """

    def logits(key: jax.Array, inputs: Any) -> Any:
        return calling.apply(model, calling.init(model, key, inputs), inputs)

    return len(jax.eval_shape(logits, jax.random.key(0), inputs))


@dataclasses.dataclass(frozen=True)
class UpToExit:
    """The exits of a network up to one of them. A model with ``init`` and ``apply``.

    Attributes:
        model: the network.
        exit: the number of its last exit that stays.
    """

    model: Any
    exit: int

    def init(self, key: jax.Array, *inputs: Any) -> Variables:
        """Returns fresh variables of the whole network."""
        return calling.init(self.model, key, calling.one_input(inputs))

    def apply(self, variables: Variables, *inputs: Any, mutable: Any = False, **options: Any) -> Any:
        """Computes the logits of exits 0 to ``exit``, as `flax.linen.Module.apply` would."""
        result = calling.apply(self.model, variables, calling.one_input(inputs), mutable=mutable, **options)
        if mutable is False:
            return result[: self.exit + 1]
        return result[0][: self.exit + 1], result[1]


def first_stages(model: Any, n: int) -> Any:
    """Returns the network that ends at exit n, with that exit alone."""
    return bj.models.without_branches(UpToExit(model, n))


def network_options(config: ConfigDict, *, num_classes: int, image_shape: Sequence[int]) -> dict[str, Any]:
    """Returns the arguments that a run's networks are created with."""
    shapes = {'num_classes': num_classes, 'image_shape': tuple(image_shape)}
    return {**shapes, 'dtype': jnp.dtype(config.dtype), **own_options(config)}


def own_options(config: ConfigDict) -> dict[str, Any]:
    """Returns those that do not depend on the data."""
    return {**({'placement': config.placement} if config.placement else {}), **config.network_options.to_dict()}


def training_options(config: ConfigDict, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments for training: the same parameters, in the form in which a CPU trains them fastest."""
    changed: dict[str, Any] = {'convolution': bj.models.banded_convolution} if config.banded else {}
    if config.image_sides:  # images grow during training
        changed['image_shape'] = None
    return {**options, **changed}


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """What a run left behind.

    Attributes:
        workdir: its folder.
        config: its settings.
        record: what it found.
        networks: both, trained.
    """

    workdir: Path
    config: ConfigDict
    record: RunRecord
    networks: Networks

    @property
    def policies(self) -> dict[str, bj.ExitPolicy]:
        """When an input leaves, by operating point, the table's first."""
        return {point.name: self.policy(point.thresholds) for point in self.record.points}

    def policy(self, thresholds: Sequence[float]) -> bj.ExitPolicy:
        """Returns a policy of the run's criterion."""
        criterion = TASKS[self.record.task].criterion(self.record.criterion)
        return bj.ExitPolicy(criterion=criterion, thresholds=np.array(thresholds, np.float32))

    def dataset(self) -> bj.data.Dataset:
        """Loads its data."""
        return load(self.config)


def read_run(workdir: Path | str) -> FinishedRun:
    """Reads a run, or the stored report of one whose weights ship with the package.

    The baseline's weights do not ship. There the branchy network's own stand for them, as good for a clock, which no
    weight changes; nothing that reads a run evaluates its baseline anew.

    Raises:
        ValueError: the folder holds no finished run, or neither its weights nor the package has them.
    """
    workdir = Path(workdir)
    record = read_record(workdir)
    if not (workdir / 'config.json').exists():
        return _published(workdir, record)
    config = _settings(bj.report.read_json(workdir / 'config.json'))
    variables, normalization = _weights(workdir / f'{config.network}.safetensors')
    baseline_variables, _ = _weights(workdir / f'{config.network[2:]}.safetensors')
    options = network_options(config, num_classes=record.num_classes, image_shape=record.image_shape)
    networks = Networks(config.network, options, variables, baseline_variables, normalization)
    return FinishedRun(workdir, config, record, networks)


def _published(workdir: Path, record: RunRecord) -> FinishedRun:
    found = bj.models.load_pretrained(record.network, dataset=record.dataset)
    if tuple(found.card['exit_accuracy']) != tuple(record.exit_accuracy):
        raise ValueError(
            f'workdir: {workdir} holds a report without weights, and those of {record.network} that ship with the '
            f'package are of another run: their exits have {found.card["exit_accuracy"]}, these {record.exit_accuracy}'
        )
    config = _settings(found.card['recipe'])
    options = network_options(config, num_classes=record.num_classes, image_shape=record.image_shape)
    networks = Networks(record.network, options, found.variables, found.variables, found.normalization)
    return FinishedRun(workdir, config, record, networks)


def _settings(stored: Mapping[str, Any]) -> ConfigDict:
    config = common.get_config()
    config.update({name: value for name, value in stored.items() if name in config})  # a field may be gone since
    return config


def save_weights(workdir: Path, config: ConfigDict, networks: Networks) -> None:
    """Writes both networks into the run's folder, the normalisation with each."""
    normalization = {'mean': networks.normalization.mean, 'deviation': networks.normalization.deviation}
    for name, variables in ((networks.name, networks.variables), (networks.name[2:], networks.baseline_variables)):
        metadata = {'network': name, 'dataset': config.dataset, 'placement': config.placement}
        variables = {**variables, 'normalization': normalization}
        bj.checkpoint.save_weights(workdir / f'{name}.safetensors', variables, metadata=metadata)


def _weights(path: Path) -> tuple[Variables, bj.Normalization]:
    variables, _ = bj.checkpoint.load_weights(path)
    normalization = bj.Normalization(**variables.pop('normalization'))
    return jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), variables), normalization
