"""The paper's trunks with one branch at any place and of any depth; and a deep trunk without shortcuts."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import branchy_jax as bj
from branchy_jax.models.layers import flatten, local_response_normalization, max_pool
from branchy_jax.types import Array
from experiments.run.networks import image_specs

_LARGEST_MAP = 8


class Branch(nn.Module):
    """A number of 3 × 3 convolutions of 32 features, then pooling and a dense layer.

    Attributes:
        before: what the trunk applies between the place of the branch and its next layer with weights.
        convolutions: their number; 0 leaves pooling and the dense layer.
        num_classes: K.
        dtype: of the convolutions.
        convolution: drop-in for `jax.lax.conv_general_dilated`.
    """

    before: Callable[[Array], Array]
    convolutions: int
    num_classes: int = 10
    dtype: jnp.dtype = jnp.float32
    convolution: Callable[..., Array] = jax.lax.conv_general_dilated

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Computes logits ``[B, K]``."""
        x = self.before(x)
        for _ in range(self.convolutions):
            conv = nn.Conv(32, (3, 3), padding=1, dtype=self.dtype, conv_general_dilated=self.convolution)
            x = nn.relu(conv(x))
        while x.shape[1] > _LARGEST_MAP:  # so that the dense layer stays small
            x = max_pool(x, window=2, stride=2)
        return nn.Dense(self.num_classes)(flatten(x))


def with_branch(network: str, *, after: int, convolutions: int, **options: Any) -> Any:
    """Builds a trunk with one `Branch`.

    Args:
        network: the one-exit network, such as ``'alexnet'``.
        after: layers (convolutions, or residual blocks) before the branch; with their activation, pooling and
            normalisation.
        convolutions: in the branch; 0 leaves pooling and the dense layer.
        **options: of `branchy_jax.models.create`.

    Raises:
        ValueError: the trunk does not have that many layers.
    """
    places = _places(network)
    if not 0 < after <= len(places):
        raise ValueError(f'after: got {after}; {network} has places after layers 1 to {len(places)}')
    place, before = places[after - 1]
    shared = {name: options[name] for name in ('num_classes', 'dtype', 'convolution') if name in options}
    trunk = bj.models.create(f'b-{network}', **options)
    exits = {place: Branch(before, convolutions, **shared), '': operator.itemgetter(-1)}
    model = bj.models.attach(trunk, exits, inputs=image_specs(trunk.image_shape))
    return bj.models.select_exits(model, [0, 1])  # without the parameters of the trunk's own branches


def _places(network: str) -> list[tuple[str, Callable[[Array], Array]]]:
    """Returns the paths after each layer of a trunk, and what the trunk applies next."""
    if network == 'lenet':
        return [(f'conv{n}', _pool_and_activate) for n in (1, 2, 3)]
    if network == 'alexnet':
        activations = (_normalize, _normalize, nn.relu, nn.relu, _activate_and_pool)
        return [(f'conv{n}', activation) for n, activation in enumerate(activations, 1)]
    blocks = (int(network.removeprefix('resnet')) - 2) // 2
    return [('conv1_norm', nn.relu), *((f'block{n}', _identity) for n in range(1, blocks))]


def _pool_and_activate(x: Array) -> Array:
    return nn.relu(max_pool(x, window=2, stride=2))


def _activate_and_pool(x: Array) -> Array:
    return max_pool(nn.relu(x), window=3, stride=2)


def _normalize(x: Array) -> Array:
    return local_response_normalization(_activate_and_pool(x))


def _identity(x: Array) -> Array:
    return x


class DeepPlain(nn.Module):
    """A deep network without shortcuts or normalisation, with two strides and two evenly spaced branches.

    Attributes:
        depth: convolutions.
        num_classes: K.
    """

    depth: int
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> tuple[Array, ...]:
        """Computes logits ``[B, K]`` of every exit from ``[B, H, W, C]``."""
        places = [round((n + 1) * self.depth / 3) for n in range(2)]
        logits = []
        for n in range(self.depth):
            stride = 2 if n in (self.depth // 3, 2 * self.depth // 3) else 1
            x = nn.relu(nn.Conv(16, (3, 3), strides=stride, padding=1, name=f'conv{n + 1}')(x))
            if n + 1 in places:
                logits.append(nn.Dense(self.num_classes, name=f'exit{len(logits) + 1}_fc')(x.mean((1, 2))))
        return *logits, nn.Dense(self.num_classes, name='fc')(x.mean((1, 2)))


def trunk_layers(model: nn.Module, image_shape: Sequence[int]) -> list[str]:
    """Returns the names of the trunk's convolutions, blocks and dense layers in order, without the last head."""
    names: list[str] = []

    def note(key: jax.Array, images: Array) -> None:
        names.extend(model.init(key, images)['params'])  # Flax keeps them in the order of the calls

    jax.eval_shape(note, jax.random.key(0), image_specs(image_shape))
    return [name for name in names if not name.startswith('exit') and not name.endswith('_norm')][:-1]
