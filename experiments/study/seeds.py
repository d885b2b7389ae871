"""Training the same network from several seeds, one after the other."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

import branchy_jax as bj
from branchy_jax.training.fit import Augment
from branchy_jax.types import Variables
from experiments.run.networks import image_specs
from experiments.run.trainings import off_the_mesh

_EVALUATED_AT_ONCE = 500


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How every variant of a claim is trained.

    Attributes:
        epochs: of each training.
        batch_size: examples in a step.
        learning_rate: peak of a one-cycle cosine.
        crop_padding: random shifts, in pixels.
        flip: random mirroring.
        weight_decay: of AdamW.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    crop_padding: int
    flip: bool
    weight_decay: float = 0.0


@dataclasses.dataclass(frozen=True)
class Trained:
    """A network trained from S seeds, and what its exits reach.

    Attributes:
        variables: one pytree a seed.
        train_accuracy: ``[S, N]`` on training images, not augmented.
        test_accuracy: ``[S, N]``.
    """

    variables: list[Variables]
    train_accuracy: np.ndarray
    test_accuracy: np.ndarray


@dataclasses.dataclass(frozen=True)
class Seeds:
    """Trainings that differ by their seed alone.

    Seed s gives the initial weights, the order of the data and the dropout, alike for all variants, so that variants
    can be compared seed by seed.

    Attributes:
        dataset: trained on its training part, evaluated on its test part.
        recipe: the same for all variants.
        count: how many seeds.
        directory: where trainings keep their checkpoints.
        mesh: devices that share every step.
    """

    dataset: bj.data.Dataset
    recipe: Recipe
    count: int
    directory: Path
    mesh: Mesh | None = None

    def train(
        self,
        name: str,
        model: Any,
        exit_weights: Sequence[float],
        *,
        starts: Sequence[Variables] | None = None,
        epochs: int | None = None,
    ) -> Trained:
        """Trains and evaluates one variant from every seed, each resumed where it was stopped.

        Args:
            name: of the variant.
            model: the network.
            exit_weights: ``[N]``.
            starts: trained baselines to start from, one a seed.
            epochs: instead of the recipe's.
        """
        epochs = self.recipe.epochs if epochs is None else epochs
        mesh, example = self.mesh, jnp.zeros((1, *self.dataset.image_shape))
        data = self.dataset.train if mesh is not None else jax.tree.map(jnp.asarray, self.dataset.train)
        optimizer, init = _optimizer(self.recipe, epochs, len(data)), jax.jit(model.init)
        every = []
        for seed in range(self.count):
            variables = init(jax.random.key(seed), example)
            if starts is not None:
                variables, _ = bj.training.initialize_from_baseline(variables, starts[seed])
            state = bj.training.create_train_state(model, variables, optimizer)
            trained = bj.training.fit(
                state if mesh is None else bj.sharding.replicate(mesh, state),
                data,
                exit_weights,
                jax.random.fold_in(jax.random.key(1), seed),
                epochs=epochs,
                batch_size=self.recipe.batch_size,
                augment=self._augment,
                scan=None if mesh is None else False,
                directory=self.directory / name / str(seed),
            )
            every.append(off_the_mesh(trained.variables))
        train, test = (self._accuracy(model, every, part) for part in (self.dataset.train, self.dataset.test))
        return Trained(every, train, test)

    @functools.cached_property  # one object: jit compares functions by identity
    def _augment(self) -> Augment:
        def augment(key: jax.Array, batch: bj.Batch) -> bj.Batch:
            batch = bj.data.augment(key, batch, crop_padding=self.recipe.crop_padding, flip=self.recipe.flip)
            return batch.replace(image=self.dataset.normalization(batch.image))

        return augment

    def _accuracy(self, model: Any, every: Sequence[Variables], part: bj.Batch) -> np.ndarray:
        """Returns ``[S, N]``."""
        costs = bj.costs.count_macs(model, inputs=image_specs(self.dataset.image_shape))  # once for all seeds
        options = {'costs': costs, 'preprocess': self.dataset.normalization, 'batch_size': _EVALUATED_AT_ONCE}
        tables = [bj.inference.exit_table(model, variables, part, **options) for variables in every]
        return np.array([table.statistics for table in tables]).mean(axis=(2, 3))


@functools.cache  # one object per setting: jit compares optimisers by identity
def _optimizer(recipe: Recipe, epochs: int, examples: int) -> optax.GradientTransformation:
    steps = max(2, epochs * (examples // recipe.batch_size))
    rate = optax.warmup_cosine_decay_schedule(0.0, recipe.learning_rate, max(1, steps // 10), steps)
    return optax.adamw(rate, b1=0.9, weight_decay=recipe.weight_decay)
