"""Training the same network from several seeds, by a loop or by `jax.vmap`, whichever is faster here."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import branchy_jax as bj
from branchy_jax.training.fit import Prepare
from branchy_jax.types import Variables


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
        by: ``'loop'`` or ``'vmap'``.
    """

    dataset: bj.data.Dataset
    recipe: Recipe
    count: int
    by: str = 'loop'

    def train(
        self,
        model: bj.BranchyNet,
        exit_weights: Sequence[float],
        *,
        starts: Sequence[Variables] | None = None,
        epochs: int | None = None,
    ) -> Trained:
        """Trains and evaluates one variant from every seed.

        Args:
            model: the network.
            exit_weights: ``[N]``.
            starts: trained baselines to start from, one a seed.
            epochs: instead of the recipe's.
        """
        epochs = self.recipe.epochs if epochs is None else epochs
        keys = [jax.random.fold_in(jax.random.key(1), seed) for seed in range(self.count)]
        states = self._states(model, epochs, starts)
        variables = [state.variables for state in self._trained(states, keys, exit_weights, epochs)]
        parts = (self.dataset.train, self.dataset.test)
        train, test = (_accuracy(model, variables, self.dataset.normalization, part) for part in parts)
        return Trained(variables, train, test)

    def seconds(self, model: bj.BranchyNet) -> float:
        """Times an epoch of all seeds: the median of three, after one that compiles."""
        keys, weights = [jax.random.key(seed) for seed in range(self.count)], (1.0,) * model.num_exits
        states = self._trained(self._states(model, 1, None), keys, weights, 1)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            states = jax.block_until_ready(self._trained(states, keys, weights, 1))
            times.append(time.perf_counter() - start)
        return float(np.median(times))

    def _states(
        self, model: bj.BranchyNet, epochs: int, starts: Sequence[Variables] | None
    ) -> list[bj.training.TrainState]:
        optimizer = _optimizer(self.recipe, epochs, len(self.dataset.train))
        example = jnp.zeros((1, *self.dataset.image_shape))
        states = []
        for seed in range(self.count):
            variables = _init(model, jax.random.key(seed), example)
            if starts is not None:
                variables, _ = bj.training.initialize_from_baseline(variables, starts[seed])
            states.append(bj.training.create_train_state(model, variables, optimizer))
        return states

    def _trained(
        self, states: Sequence[Any], keys: Sequence[jax.Array], exit_weights: Sequence[float], epochs: int
    ) -> list[Any]:
        normalization = self.dataset.normalization
        mean, deviation = (tuple(np.asarray(value).tolist()) for value in (normalization.mean, normalization.deviation))
        epoch_of = functools.partial(
            bj.training.train_epoch, exit_weights=jnp.array(exit_weights), batch_size=self.recipe.batch_size,
            prepare=_preparation(self.recipe, mean, deviation),
        )  # fmt: skip
        data = jax.tree.map(jnp.asarray, self.dataset.train)
        if self.by == 'loop':
            states = list(states)
            for n, key in enumerate(keys):
                for epoch in range(epochs):
                    states[n], _ = epoch_of(states[n], data, key=key, epoch=epoch)
            return states
        stacked, every_key = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), jnp.stack(keys)
        for epoch in range(epochs):
            stacked = jax.vmap(lambda state, key, epoch=epoch: epoch_of(state, data, key=key, epoch=epoch)[0])(
                stacked, every_key
            )
        return [jax.tree.map(lambda leaf, n=n: leaf[n], stacked) for n in range(len(keys))]


def faster_way(model: bj.BranchyNet, dataset: bj.data.Dataset, recipe: Recipe, *, seeds: int) -> dict[str, Any]:
    """Times a few steps of all seeds by a loop and by vmap; returns ``by`` and the seconds of both."""
    few = dataset.replace(train=jax.tree.map(lambda values: values[: 8 * recipe.batch_size], dataset.train))
    seconds = {by: Seeds(few, recipe, seeds, by).seconds(model) for by in ('loop', 'vmap')}
    return {'by': min(seconds, key=seconds.get), 'loop_seconds': seconds['loop'], 'vmap_seconds': seconds['vmap']}


@functools.partial(jax.jit, static_argnums=0)
def _init(model: bj.BranchyNet, key: jax.Array, example: jax.Array) -> Variables:
    return model.init(key, example)


@functools.cache  # one object per setting: jit compares optimisers by identity
def _optimizer(recipe: Recipe, epochs: int, examples: int) -> optax.GradientTransformation:
    steps = max(2, epochs * (examples // recipe.batch_size))
    rate = optax.warmup_cosine_decay_schedule(0.0, recipe.learning_rate, max(1, steps // 10), steps)
    return optax.adamw(rate, b1=0.9, weight_decay=recipe.weight_decay)


@functools.cache
def _preparation(recipe: Recipe, mean: tuple[float, ...], deviation: tuple[float, ...]) -> Prepare:
    normalize = bj.Normalization(jnp.array(mean), jnp.array(deviation))

    def prepare(key: jax.Array, batch: bj.Batch) -> bj.Batch:
        image = bj.data.augment(key, batch.image, crop_padding=recipe.crop_padding, flip=recipe.flip)
        return bj.Batch(normalize(image), batch.label)

    return prepare


_EVALUATED_AT_ONCE = 500


@functools.partial(jax.jit, static_argnums=0)
def _right(model: bj.BranchyNet, variables: Variables, images: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.stack([logits.argmax(-1) == labels for logits in model.apply(variables, images)])


def _accuracy(
    model: bj.BranchyNet, every: Sequence[Variables], normalization: bj.Normalization, part: bj.Batch
) -> np.ndarray:
    """Returns ``[S, N]``; one compilation serves all seeds and parts."""
    starts = range(0, len(part), _EVALUATED_AT_ONCE)
    rows = []
    for variables in every:
        found = []
        for start in starts:
            taken = np.minimum(np.arange(start, start + _EVALUATED_AT_ONCE), len(part) - 1)
            right = _right(model, variables, normalization(part.image[taken]), jnp.asarray(part.label[taken]))
            found.append(np.asarray(right)[:, : len(part) - start])
        rows.append(np.concatenate(found, axis=1).mean(axis=1))
    return np.array(rows)
