"""Random networks with exits at random places: the parts compute the whole, or `attach` refuses and names the place."""

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
    chances = np.array([0.2 if kind in rare else 1.0 for kind in KINDS])
    kinds = rng.choice(list(KINDS), size=count, p=chances / chances.sum())
    reads = [rng.choice(n + 2, size=min(n + 2, int(rng.integers(1, 4))), replace=False) for n in range(count)]
    blocks = tuple((str(kind), tuple(map(int, numbers))) for kind, numbers in zip(kinds, reads, strict=True))
    places = rng.choice(
        [f'block{n}' for n in range(count)], size=int(rng.integers(1, min(3, count) + 1)), replace=False
    )
    shapes = {'sequence': (ROWS, STEPS, FEATURES), 'features': (ROWS, FEATURES)}
    inputs = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return Case(RandomNetwork(blocks), tuple(map(str, places)), inputs)


def refusal_expected(case: Case) -> bool:
    """Whether `attach` must refuse: a place that is passed another number of times than once, or rows that mix."""
    blocks = case.network.blocks
    owners = [0 if kind == 'shared' else n for n, (kind, _) in enumerate(blocks)]  # shared blocks are the first again
    numbers = [int(place.removeprefix('block')) for place in case.places]
    if any(owners.count(number) != 1 for number in numbers):
        return True
    last = len(blocks) + 1
    needed = {last, last - 1, *(number + 2 for number in numbers)}  # values 0 and 1 are the inputs
    for n in reversed(range(len(blocks))):
        if n + 2 in needed:
            needed.update(blocks[n][1])
    return any(blocks[owners[n]][0] == 'centred' for n in range(len(blocks)) if n + 2 in needed)


def check(case: Case) -> str:
    """Puts exits on a network, cuts it and compares the parts with the untouched network, without `jax.jit`.

    Returns:
        '' where the parts are the whole, else the refusal of `attach`.

    Raises:
        AssertionError: parts that are not the whole, a refusal that names no place, or one without a reason.
    """
    try:
        model = bj.models.attach(case.network, dict.fromkeys(case.places, Head()), inputs=case.inputs)
    except ValueError as error:
        if 'block' not in str(error) or not refusal_expected(case):
            raise AssertionError(f'{case}: refused without a reason or a place') from error
        return str(error)
    assert not refusal_expected(case), f'{case}: accepted'
    rng = np.random.default_rng(0)
    specs = jax.eval_shape(lambda: case.network.init(jax.random.key(0), **case.inputs))
    variables = {name: {**leaves} for name, leaves in _drawn(specs, rng).items()}
    head = {'kernel': np.zeros((FEATURES, CLASSES), np.float32), 'bias': np.zeros(CLASSES, np.float32)}
    heads = {place: _drawn(head, rng) for place in case.places}
    trained = {**variables, 'params': {**variables['params']}}
    trained['params'].update({f'exit_{place}': {'dense': own} for place, own in heads.items()})
    cut, hidden, parts = bj.program.stages(model, trained, case.inputs).at(trained, ROWS), case.inputs, []
    with jax.disable_jit():
        for n in range(len(cut.exits)):
            hidden = cut.run_stage(n, hidden)
            parts.append(cut.run_exit(n, hidden))
        options: Any = {'capture_intermediates': lambda module, _: isinstance(module, Block)}
        whole, captured = case.network.apply(variables, **case.inputs, **options, mutable=['intermediates'])
    places = [place for place, _ in model.heads[:-1]]
    expected = [_early(case, place, captured['intermediates'][place]['__call__'][0], heads[place]) for place in places]
    for part, logits in zip(parts, [*expected, whole], strict=True):
        np.testing.assert_allclose(part, logits, rtol=1e-4, atol=1e-4, err_msg=str(case))
    return ''


def _drawn(tree: Any, rng: np.random.Generator) -> Any:
    return jax.tree.map(lambda x: (0.2 + rng.random(x.shape)).astype(x.dtype), tree)


def _early(case: Case, place: str, value: Any, head: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the logits of `Head` for what a block returns."""
    time_major = case.network.blocks[int(place.removeprefix('block'))][0] == 'time-major'
    return np.asarray(value, np.float64).mean(0 if time_major else 1) @ head['kernel'] + head['bias']


def check_many(count: int, first: int = 0) -> str:
    """Checks random networks, those of consecutive seeds; returns how many were cut and how many were refused."""
    answers = collections.Counter(check(draw(seed)) != '' for seed in range(first, first + count))
    return f'{answers[False]} networks cut: their parts are the whole; {answers[True]} refused with the place'
