"""B-LeNet, B-AlexNet and B-ResNet in PyTorch, with the weights of the Flax networks.

Layers take their shapes and names from Flax variables. This file states the order of the layers, their strides and
their padding: those of `branchy_jax.models` at the placement ``'text'``. BatchNorm is folded into the convolution
before it, as a plan does.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

_PACKED = {True: torch.channels_last, False: torch.contiguous_format}


class Network(nn.Module):
    """Stages, and an exit after each of them.

    Attributes:
        stages: modules that map hidden to hidden.
        exits: heads, as many, that map hidden to logits.
    """

    def __init__(self, stages: Sequence[nn.Module], exits: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stages, self.exits = nn.ModuleList(stages), nn.ModuleList(exits)

    def labels(self) -> nn.Module:
        """Returns the trunk with its own head only, which answers with labels ``[B]``."""
        return nn.Sequential(*self.stages, self.exits[-1], _Label())


def with_exits(
    network: Network, images: torch.Tensor, thresholds: Sequence[float], *, channels_last: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Answers a batch: each stage runs on the rows that are left, and the mask of its head says which rows leave.

    If all rows leave or none does, as with a single image, no mask is applied.

    Args:
        network: with N exits, its stages and heads compiled or not.
        images: ``[B, C, H, W]``.
        thresholds: ``[N - 1]`` of the entropy.
        channels_last: the layout to keep rows in.

    Returns:
        Labels and exits ``[B]``.
    """
    hidden, rows = images, torch.arange(len(images))
    labels, exits = torch.empty_like(rows), torch.full_like(rows, len(thresholds))
    for n, threshold in enumerate(thresholds):
        hidden = network.stages[n](hidden)
        logits = network.exits[n](hidden)
        leaving = entropy(logits) < threshold
        count = int(leaving.sum())
        if count:
            labels[rows[leaving]], exits[rows[leaving]] = logits[leaving].argmax(-1), n
        if count == len(rows):
            return labels, exits
        if count:
            rows, hidden = rows[~leaving], hidden[~leaving].contiguous(memory_format=_PACKED[channels_last])
    labels[rows] = network.exits[-1](network.stages[-1](hidden)).argmax(-1)
    return labels, exits


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Computes the entropy of the softmax, in nats: ``[B, K] → [B]``."""
    log_probabilities = functional.log_softmax(logits, dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


def create(name: str, variables: Any) -> Network:
    """Builds a network in evaluation mode.

    Args:
        name: ``'b-lenet'``, ``'b-alexnet'``, or ``'b-resnet110'`` and other depths.
        variables: of ``branchy_jax.models.create(name)``: arrays that NumPy can read.

    Raises:
        ValueError: another name.
    """
    kind = name.rstrip('0123456789')
    if kind not in _BUILDERS:
        raise ValueError(f'name: got {name!r}; written in PyTorch are b-lenet, b-alexnet, b-resnet110')
    return _BUILDERS[kind](_Layers(variables)).eval().requires_grad_(False)


class _Layers:
    """Makes layers from the Flax variables of a name."""

    def __init__(self, variables: Any) -> None:
        self.parameters, self.statistics = variables['params'], variables.get('batch_stats', {})

    def block(self, name: str) -> '_Layers':
        """Returns the layers of a submodule."""
        return _Layers({'params': self.parameters[name], 'batch_stats': self.statistics[name]})

    def conv(self, name: str, *, stride: int = 1, padding: int = 0, norm: str = '') -> nn.Conv2d:
        """Makes a convolution, with the BatchNorm called ``norm`` folded into it."""
        kernel = torch.tensor(np.asarray(self.parameters[name]['kernel']).transpose(3, 2, 0, 1))  # HWIO to OIHW
        bias = self.parameters[name].get('bias')
        bias = torch.zeros(len(kernel)) if bias is None else torch.tensor(np.asarray(bias))
        if norm:
            affine, moments = self.parameters[norm], self.statistics[norm]
            scale = torch.tensor(np.asarray(affine['scale']) / np.sqrt(np.asarray(moments['var']) + np.float32(1e-5)))
            kernel = kernel * scale[:, None, None, None]
            bias = (bias - torch.tensor(np.asarray(moments['mean']))) * scale + torch.tensor(np.asarray(affine['bias']))
        layer = nn.Conv2d(kernel.shape[1], kernel.shape[0], tuple(kernel.shape[2:]), stride=stride, padding=padding)
        layer.weight, layer.bias = nn.Parameter(kernel.contiguous()), nn.Parameter(bias)
        return layer

    def dense(self, name: str, *, channels: int | None = None) -> nn.Linear:
        """Makes a dense layer; with ``channels`` it reads a flattened image, which PyTorch flattens channels first."""
        kernel = np.asarray(self.parameters[name]['kernel'])
        if channels is not None:
            kernel = kernel.reshape(-1, channels, kernel.shape[1]).transpose(1, 0, 2).reshape(kernel.shape)
        layer = nn.Linear(*kernel.shape)
        layer.weight = nn.Parameter(torch.tensor(np.ascontiguousarray(kernel.T)))
        layer.bias = nn.Parameter(torch.tensor(np.asarray(self.parameters[name]['bias'])))
        return layer


def _lenet(layers: _Layers) -> Network:
    def conv(name: str) -> tuple[nn.Module, ...]:
        return layers.conv(name, padding=3), nn.MaxPool2d(2, 2, ceil_mode=True), nn.ReLU()

    rest = [*conv('conv2'), *conv('conv3'), nn.Flatten(), layers.dense('fc1', channels=20)]
    branch = [layers.conv('exit1_conv1', stride=3), nn.ReLU(), nn.Flatten(), layers.dense('exit1_fc', channels=16)]
    stages = [nn.Sequential(*conv('conv1')), nn.Sequential(*rest)]
    return Network(stages, [nn.Sequential(*branch), layers.dense('fc2')])


def _alexnet(layers: _Layers) -> Network:
    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    def conv(name: str, padding: int = 1, stride: int = 1) -> tuple[nn.Module, nn.Module]:
        return layers.conv(name, padding=padding, stride=stride), nn.ReLU()

    def answer(name: str) -> tuple[nn.Module, ...]:
        return pool(), nn.Flatten(), layers.dense(name, channels=32)

    stages = [
        nn.Sequential(*conv('conv1', padding=2), pool(), _LocalResponseNorm()),
        nn.Sequential(*conv('conv2', padding=2), pool(), _LocalResponseNorm()),
        nn.Sequential(*conv('conv3'), *conv('conv4'), *conv('conv5'), pool(), nn.Flatten()),
    ]
    exits = [
        nn.Sequential(*conv('exit1_conv1', stride=2), *conv('exit1_conv2'), *answer('exit1_fc')),
        nn.Sequential(*conv('exit2_conv1'), *answer('exit2_fc')),
        nn.Sequential(layers.dense('fc1', channels=64), nn.ReLU(), layers.dense('fc2'), nn.ReLU(), layers.dense('fc3')),
    ]
    return Network(stages, exits)


class _LocalResponseNorm(nn.Module):
    """Computes what `branchy_jax.models.layers.local_response_normalization` does.

    `nn.LocalResponseNorm` divides its alpha by the size, and takes a general power.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        squares = functional.pad(x * x, (0, 0, 0, 0, 1, 1))
        scale = 2.0 + 5e-5 * (squares[:, :-2] + squares[:, 1:-1] + squares[:, 2:])
        return x / torch.sqrt(scale * torch.sqrt(scale))


def _resnet(layers: _Layers) -> Network:
    blocks = sum(name.startswith('block') for name in layers.parameters) // 3

    def convs(prefix: str, *strides: int) -> list[nn.Module]:
        made: list[nn.Module] = []
        for n, stride in enumerate(strides, 1):
            name = f'{prefix}{n}'
            made += [layers.conv(name, stride=stride, padding=1, norm=f'{name}_norm'), nn.ReLU()]
        return made

    def group(number: int) -> list[nn.Module]:
        first = number * blocks
        strides = [2 if n == 0 and number else 1 for n in range(blocks)]
        return [_Block(layers.block(f'block{first + n + 1}'), stride) for n, stride in enumerate(strides)]

    group1, group2, group3 = map(group, range(3))
    stages = [
        nn.Sequential(*convs('conv', 1), group1[0]),
        nn.Sequential(*group1[1:]),
        nn.Sequential(*group2, *group3, _Mean()),
    ]
    exits = [
        nn.Sequential(*convs('exit1_conv', 2, 2, 1), _Mean(), layers.dense('exit1_fc')),
        nn.Sequential(*convs('exit2_conv', 2, 2), _Mean(), layers.dense('exit2_fc')),
        layers.dense('fc'),
    ]
    return Network(stages, exits)


class _Label(nn.Module):
    """Names the likeliest class: ``[B, K] → [B]``."""

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.argmax(-1)


class _Mean(nn.Module):
    """Averages over the image: ``[B, C, H, W] → [B, C]``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


class _Block(nn.Module):
    """Two convolutions and a shortcut, which strides and pads with channels of zeros where the block does."""

    def __init__(self, layers: _Layers, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = layers.conv('conv1', stride=stride, padding=1, norm='norm1')
        self.conv2 = layers.conv('conv2', padding=1, norm='norm2')
        self.more = self.conv1.out_channels - self.conv1.in_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv2(functional.relu(self.conv1(x)))
        if self.more or self.stride > 1:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return functional.relu(y + x)


_BUILDERS = {'b-lenet': _lenet, 'b-alexnet': _alexnet, 'b-resnet': _resnet}
