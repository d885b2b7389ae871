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
        seconds: of the trainings.
    """

    variables: list[Variables]
    train_accuracy: np.ndarray
    test_accuracy: np.ndarray
    seconds: float


def train_seeds(
    model: bj.BranchyNet,
    exit_weights: Sequence[float],
    dataset: bj.data.Dataset,
    recipe: Recipe,
    *,
    seeds: int,
    starts: Sequence[Variables] | None = None,
    epochs: int | None = None,
    by: str = 'loop',
) -> Trained:
    """Trains and evaluates one variant from every seed.

    Seed s gives the initial weights, the order of the data and the dropout, alike for all variants, so that variants
    can be compared seed by seed.

    Args:
        model: the network.
        exit_weights: ``[N]``.
        dataset: trained on its training part, evaluated on its test part.
        recipe: the same for all variants.
        seeds: how many.
        starts: trained baselines to start from, one a seed.
        epochs: instead of the recipe's.
        by: ``'loop'`` or ``'vmap'``.
    """
    start = time.perf_counter()
    epochs = recipe.epochs if epochs is None else epochs
    states = [
        bj.training.create_train_state(
            model, _initial(model, dataset, seed, starts), _optimizer(recipe, epochs, len(dataset.train))
        )
        for seed in range(seeds)
    ]
    keys = [jax.random.fold_in(jax.random.key(1), seed) for seed in range(seeds)]
    run = functools.partial(_epoch, dataset=dataset, recipe=recipe, exit_weights=tuple(exit_weights))
    variables = [state.variables for state in _trained(states, keys, run, epochs, by)]
    train, test = (_accuracy(model, variables, dataset, part) for part in (dataset.train, dataset.test))
    return Trained(variables, train, test, time.perf_counter() - start)


def faster_way(model: bj.BranchyNet, dataset: bj.data.Dataset, recipe: Recipe, *, seeds: int) -> dict[str, Any]:
    """Times a few steps of all seeds by a loop and by vmap; returns ``by`` and the seconds of both."""
    few = dataset.replace(train=jax.tree.map(lambda values: values[: 8 * recipe.batch_size], dataset.train))
    optimizer, seconds = _optimizer(recipe, 1, len(few.train)), {}
    for by in ('loop', 'vmap'):
        states = [
            bj.training.create_train_state(model, _initial(model, few, seed, None), optimizer) for seed in range(seeds)
        ]
        keys = [jax.random.key(seed) for seed in range(seeds)]
        run = functools.partial(_epoch, dataset=few, recipe=recipe, exit_weights=(1.0,) * model.num_exits)
        states = _trained(states, keys, run, 1, by)  # compiles
        times = []
        for _ in range(3):
            start = time.perf_counter()
            states = jax.block_until_ready(_trained(states, keys, run, 1, by))
            times.append(time.perf_counter() - start)
        seconds[by] = float(np.median(times))
    return {'by': min(seconds, key=seconds.get), 'loop_seconds': seconds['loop'], 'vmap_seconds': seconds['vmap']}


@functools.partial(jax.jit, static_argnums=0)
def _init(model: bj.BranchyNet, key: jax.Array, example: jax.Array) -> Variables:
    return model.init(key, example)


def _initial(
    model: bj.BranchyNet, dataset: bj.data.Dataset, seed: int, starts: Sequence[Variables] | None
) -> Variables:
    variables = _init(model, jax.random.key(seed), jnp.zeros((1, *dataset.image_shape)))
    if starts is None:
        return variables
    return bj.training.initialize_from_baseline(variables, starts[seed])[0]


@functools.cache  # one object per setting: jit compares optimisers by identity
def _optimizer(recipe: Recipe, epochs: int, examples: int) -> optax.GradientTransformation:
    steps = max(2, epochs * (examples // recipe.batch_size))
    rate = optax.warmup_cosine_decay_schedule(0.0, recipe.learning_rate, max(1, steps // 10), steps)
    return optax.adamw(rate, b1=0.9, weight_decay=recipe.weight_decay)


@functools.cache
def _preparation(recipe: Recipe, mean: tuple[float, ...], deviation: tuple[float, ...]) -> bj.training.Prepare:
    normalize = bj.Normalization(jnp.array(mean), jnp.array(deviation))

    def prepare(key: jax.Array, batch: bj.Batch) -> bj.Batch:
        image = bj.data.augment(key, batch.image, crop_padding=recipe.crop_padding, flip=recipe.flip)
        return bj.Batch(normalize(image), batch.label)

    return prepare


def _epoch(
    state: bj.training.TrainState,
    key: jax.Array,
    data: bj.Batch,
    epoch: int,
    *,
    dataset: bj.data.Dataset,
    recipe: Recipe,
    exit_weights: tuple[float, ...],
) -> bj.training.TrainState:
    mean, deviation = (np.asarray(value).tolist() for value in jax.tree.leaves(dataset.normalization))
    prepare = _preparation(recipe, tuple(mean), tuple(deviation))
    return bj.training.train_epoch(
        state, data, jnp.array(exit_weights), key, epoch=epoch, batch_size=recipe.batch_size, prepare=prepare,
    )[0]  # fmt: skip


def _trained(states: Sequence[Any], keys: Sequence[jax.Array], run: Any, epochs: int, by: str) -> list[Any]:
    data = jax.tree.map(jnp.asarray, run.keywords['dataset'].train)
    if by == 'loop':
        states = list(states)
        for n, key in enumerate(keys):
            for epoch in range(epochs):
                states[n] = run(states[n], key, data, epoch)
        return states
    stacked, every_key = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), jnp.stack(keys)
    for epoch in range(epochs):
        stacked = jax.vmap(lambda state, key, epoch=epoch: run(state, key, data, epoch))(stacked, every_key)
    return [jax.tree.map(lambda leaf, n=n: leaf[n], stacked) for n in range(len(keys))]


_EVALUATED_AT_ONCE = 500


@functools.partial(jax.jit, static_argnums=0)
def _right(model: bj.BranchyNet, variables: Variables, images: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.stack([logits.argmax(-1) == labels for logits in model.apply(variables, images)])


def _accuracy(model: bj.BranchyNet, every: Sequence[Variables], dataset: bj.data.Dataset, part: bj.Batch) -> np.ndarray:
    """Returns ``[S, N]``; one compilation serves all seeds and parts."""
    starts = range(0, len(part), _EVALUATED_AT_ONCE)
    rows = []
    for variables in every:
        found = []
        for start in starts:
            taken = np.minimum(np.arange(start, start + _EVALUATED_AT_ONCE), len(part) - 1)
            right = _right(model, variables, dataset.normalization(part.image[taken]), jnp.asarray(part.label[taken]))
            found.append(np.asarray(right)[:, : len(part) - start])
        rows.append(np.concatenate(found, axis=1).mean(axis=1))
    return np.array(rows)
