"""Random networks with exits at random places: the parts compute the whole, or `attach` refuses and names the place."""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import branchy_jax as bj

ROWS, STEPS, FEATURES, CLASSES = 2, 3, 6, 3
INPUTS = {
    'sequence': np.random.default_rng(0).normal(size=(ROWS, STEPS, FEATURES)).astype(np.float32),
    'features': np.random.default_rng(1).normal(size=(ROWS, FEATURES)).astype(np.float32),
}

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


class Head(nn.Module):
    """A dense layer on the mean over time."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Computes logits ``[B, K]`` of activations ``[B, T, D]``."""
        return _dense(CLASSES, name='dense')(x.mean(1))


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


def draw(seed: int) -> tuple[RandomNetwork, list[str]]:
    """Draws a network and its places for exits."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 4))
    rare = ('centred', 'recurrent', 'time-major')  # the latter take long to trace
    chances = np.array([0.2 if kind in rare else 1.0 for kind in KINDS])
    kinds = rng.choice(list(KINDS), size=count, p=chances / chances.sum())
    reads = [rng.choice(n + 2, size=min(n + 2, int(rng.integers(1, 4))), replace=False) for n in range(count)]
    blocks = tuple((str(kind), tuple(map(int, numbers))) for kind, numbers in zip(kinds, reads, strict=True))
    places = rng.choice(count, size=int(rng.integers(1, min(3, count) + 1)), replace=False)
    return RandomNetwork(blocks), [f'block{n}' for n in places]


def refusal_expected(network: RandomNetwork, places: Sequence[str]) -> bool:
    """Whether `attach` must refuse: a place that is passed another number of times than once, or rows that mix."""
    blocks = network.blocks
    owners = [0 if kind == 'shared' else n for n, (kind, _) in enumerate(blocks)]  # shared blocks are the first again
    numbers = [int(place.removeprefix('block')) for place in places]
    if any(owners.count(number) != 1 for number in numbers):
        return True
    last = len(blocks) + 1
    needed = {last, last - 1, *(number + 2 for number in numbers)}  # values 0 and 1 are the inputs
    for n in reversed(range(len(blocks))):
        if n + 2 in needed:
            needed.update(blocks[n][1])
    return any(blocks[owners[n]][0] == 'centred' for n in range(len(blocks)) if n + 2 in needed)


def check(network: RandomNetwork, places: Sequence[str]) -> str:
    """Puts exits on a network, cuts it and compares the parts with the untouched network, without `jax.jit`.

    Returns:
        '' where the parts are the whole, else the refusal of `attach`.

    Raises:
        AssertionError: parts that are not the whole, a refusal that names no place, or one without a reason.
    """
    try:
        model = bj.models.attach(network, dict.fromkeys(places, Head()), inputs=INPUTS)
    except ValueError as error:
        if 'block' not in str(error) or not refusal_expected(network, places):
            raise AssertionError(f'{network}, {places}: refused without a reason or a place') from error
        return str(error)
    assert not refusal_expected(network, places), f'{network}, {places}: accepted'
    rng = np.random.default_rng(0)
    specs = jax.eval_shape(lambda: network.init(jax.random.key(0), **INPUTS))  # traces half of what `model.init` does
    head = {'kernel': np.zeros((FEATURES, CLASSES), np.float32), 'bias': np.zeros(CLASSES, np.float32)}
    specs = {**specs, 'params': {**specs['params'], **{f'exit_{place}': {'dense': head} for place in places}}}
    variables = jax.tree.map(lambda x: (0.2 + rng.random(x.shape)).astype(x.dtype), specs)
    cut, hidden, parts = bj.program.stages(model, variables, INPUTS).at(variables, ROWS), INPUTS, []
    with jax.disable_jit():
        for n in range(len(cut.exits)):
            hidden = cut.run_stage(n, hidden)
            parts.append(cut.run_exit(n, hidden))
        options: Any = {'capture_intermediates': lambda module, _: isinstance(module, Block)}
        whole, captured = network.apply(model.trained(variables), **INPUTS, **options, mutable=['intermediates'])
    expected = []
    for place, _ in model.heads[:-1]:
        time_major = network.blocks[int(place.removeprefix('block'))][0] == 'time-major'
        value = np.asarray(captured['intermediates'][place]['__call__'][0], np.float64)
        head = variables['params'][f'exit_{place}']['dense']
        expected.append(value.mean(0 if time_major else 1) @ head['kernel'] + head['bias'])
    for part, logits in zip(parts, [*expected, whole], strict=True):
        np.testing.assert_allclose(part, logits, rtol=1e-4, atol=1e-4, err_msg=f'{network}, {places}')
    return ''


def check_many(count: int, first: int = 0) -> str:
    """Checks random networks, those of consecutive seeds; returns how many were cut and how many were refused."""
    answers = collections.Counter(check(*draw(seed)) != '' for seed in range(first, first + count))
    return f'{answers[False]} networks cut: their parts are the whole; {answers[True]} refused with the place'
