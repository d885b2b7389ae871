"""Random networks with exits at random places: the parts are the whole network, or `attach` names the place."""

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import branchy_jax as bj

ROWS, STEPS, FEATURES, CLASSES = 2, 3, 6, 3

# `check` draws the variables; Flax traces each initializer at every call.
_zeros = nn.initializers.zeros
_dense = functools.partial(nn.Dense, kernel_init=_zeros)
_cell = functools.partial(nn.SimpleCell, FEATURES, kernel_init=_zeros, recurrent_kernel_init=_zeros)


def _attention(x: jax.Array) -> jax.Array:
    query, key = (_dense(3)(x) for _ in range(2))
    return nn.softmax(jnp.einsum('btd,bsd->bts', query, key)) @ x


class _Step(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.tanh(_dense(FEATURES)(x)), None


def _scan(x: jax.Array) -> jax.Array:
    layers = nn.scan(_Step, variable_axes={'params': 0}, split_rngs={'params': True}, length=2)
    return layers()(x, None)[0]


KINDS: dict[str, Callable[[jax.Array, bool], jax.Array]] = {
    'dense': lambda x, train: nn.relu(_dense(FEATURES)(x)),
    'residual': lambda x, train: x + _dense(FEATURES)(nn.relu(_dense(3)(x))),
    'norm': lambda x, train: nn.relu(nn.BatchNorm(not train)(x)),
    'dropout': lambda x, train: nn.Dropout(0.5, deterministic=not train)(nn.LayerNorm()(x)),
    'convolution': lambda x, train: nn.Conv(FEATURES, (3,), kernel_init=_zeros)(x),
    'attention': lambda x, train: _attention(x),
    'folded': lambda x, train: jnp.tanh(_dense(FEATURES)(x.reshape(-1, FEATURES))).reshape(x.shape),
    'sorted': lambda x, train: jnp.take_along_axis(x, jnp.argsort(x[..., :1], axis=1), 1),
    'scan': lambda x, train: _scan(x),
    'recurrent': lambda x, train: nn.RNN(_cell())(x),
    'time-major': lambda x, train: nn.RNN(_cell(), time_major=True)(x.transpose(1, 0, 2)),
    'centred': lambda x, train: x - x.mean(0, keepdims=True),  # mixes the rows of a batch
    'shared': lambda x, train: x,  # see RandomNetwork
}
"""Layers of activations ``[B, T, D]``; a time-major one returns ``[T, B, D]``."""


class Block(nn.Module):
    """One layer by its kind."""

    kind: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Applies the layer."""
        return KINDS[self.kind](x, train)


class RandomNetwork(nn.Module):
    """Two inputs, and blocks that each read a sum of earlier values.

    Attributes:
        blocks: for each block its kind and the numbers of the values that it reads; a shared one calls the first again.
    """

    blocks: tuple[tuple[str, tuple[int, ...]], ...]

    @nn.compact
    def __call__(self, sequence: jax.Array, features: jax.Array, train: bool = False) -> jax.Array:
        """Computes logits ``[B, K]``."""
        values, first = [sequence, jnp.broadcast_to(features[:, None], sequence.shape)], None
        for n, (kind, reads) in enumerate(self.blocks):
            block = first if kind == 'shared' and first is not None else Block(kind, name=f'block{n}')
            first = first or block
            value = block(sum(values[number] for number in reads), train)
            values.append(value.transpose(1, 0, 2) if block.kind == 'time-major' else value)
        return _dense(CLASSES, name='last')((values[-1] + values[-2]).mean(1))


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, its places for exits, and inputs."""

    network: RandomNetwork
    places: tuple[str, ...]
    inputs: dict[str, Any]


def draw(seed: int) -> Case:
    """Draws a case."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 4))
    rare = ('centred', 'recurrent', 'time-major')  # the latter take long to trace
    chances = np.array([0.3 if kind in rare else 1.0 for kind in KINDS])
    kinds = rng.choice(list(KINDS), size=count, p=chances / chances.sum())
    reads = [rng.choice(n + 2, size=min(n + 2, int(rng.integers(1, 4))), replace=False) for n in range(count)]
    blocks = tuple((str(kind), tuple(map(int, numbers))) for kind, numbers in zip(kinds, reads, strict=True))
    places = rng.choice(
        [f'block{n}' for n in range(count)], size=int(rng.integers(1, min(3, count) + 1)), replace=False
    )
    shapes = {'sequence': (ROWS, STEPS, FEATURES), 'features': (ROWS, FEATURES)}
    inputs = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return Case(RandomNetwork(blocks), tuple(map(str, places)), inputs)


def check(case: Case) -> str:
    """Puts exits on a network, cuts it and compares the parts with the whole, without `jax.jit`.

    Returns:
        '' where the parts are the whole, else the refusal of `attach`.

    Raises:
        AssertionError: parts that are not the whole, or a refusal that names no place.
    """
    try:
        model = bj.models.attach(case.network, case.places, inputs=case.inputs)
    except ValueError as error:
        if 'block' not in str(error) and 'exit ' not in str(error):
            raise AssertionError(f'{case}: refused without a place') from error
        return str(error)
    rng = np.random.default_rng(0)
    specs = jax.eval_shape(model.init, jax.random.key(0), case.inputs)
    variables = jax.tree.map(lambda x: (0.2 + rng.random(x.shape)).astype(x.dtype), specs)
    hidden, parts = case.inputs, []
    with jax.disable_jit():
        cut = bj.program.stages(model, variables, case.inputs).at(variables, ROWS)
        for n in range(len(cut.exits)):
            hidden = cut.run_stage(n, hidden)
            parts.append(cut.run_exit(n, hidden))
        whole = model.apply(variables, case.inputs)
        untouched = case.network.apply(model.trained(variables), **case.inputs)
    for part, expected in zip(parts, [*whole[:-1], untouched], strict=True):
        np.testing.assert_allclose(part, expected, rtol=1e-4, atol=1e-4, err_msg=str(case))
    return ''


def check_many(count: int) -> str:
    """Checks as many random networks; returns how many were cut and how many were refused."""
    answers = collections.Counter(check(draw(seed)) != '' for seed in range(count))
    return f'{answers[False]} networks cut: their parts are the whole; {answers[True]} refused with the place'
