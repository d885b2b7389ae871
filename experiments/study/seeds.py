"""Training the same network from several seeds, one after the other."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

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
    """

    dataset: bj.data.Dataset
    recipe: Recipe
    count: int

    def train(
        self, model: bj.BranchyNet, exit_weights: Sequence[float], *, starts: Sequence[Variables] | None = None,
        epochs: int | None = None,
    ) -> Trained:  # fmt: skip
        """Trains and evaluates one variant from every seed.

        Args:
            model: the network.
            exit_weights: ``[N]``.
            starts: trained baselines to start from, one a seed.
            epochs: instead of the recipe's.
        """
        epochs = self.recipe.epochs if epochs is None else epochs
        keys = [jax.random.fold_in(jax.random.key(1), seed) for seed in range(self.count)]
        data, variables = jax.tree.map(jnp.asarray, self.dataset.train), []
        for key, state in zip(keys, self._states(model, epochs, starts), strict=True):
            trained = bj.training.fit(
                state, data, exit_weights, key, epochs=epochs, batch_size=self.recipe.batch_size,
                prepare=self._prepare(),
            )  # fmt: skip
            variables.append(trained.variables)
        parts = (self.dataset.train, self.dataset.test)
        train, test = (_accuracy(model, variables, self.dataset.normalization, part) for part in parts)
        return Trained(variables, train, test)

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

    def _prepare(self) -> Prepare:
        normalization = self.dataset.normalization
        mean, deviation = (tuple(np.asarray(value).tolist()) for value in (normalization.mean, normalization.deviation))
        return _preparation(self.recipe, mean, deviation)


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
