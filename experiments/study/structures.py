"""Tiny networks in the structure of those that people use, with places for exits: the rows of `compatibility`.

None has code of others. Each keeps what decides whether exits fit: names and nesting of submodules, arguments of calls,
how the mode and random streams arrive, and what is returned.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

Array = jax.Array
Outputs = dict[str, Any]
ROWS, CLASSES, WIDTH, LENGTH, VOCABULARY = 12, 3, 8, 6, 20
RATE = 0.1  # of dropout and of dropped paths


# As in Bonsai, Flax NNX.
def _perceptron(rngs: nnx.Rngs) -> nnx.Sequential:
    return nnx.Sequential(nnx.Linear(WIDTH, 16, rngs=rngs), nnx.gelu, nnx.Linear(16, WIDTH, rngs=rngs))


class _NnxLayer(nnx.Module):
    """Attention and a perceptron; random streams come with the call."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm1, self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, WIDTH, dropout_rate=RATE, decode=False, rngs=rngs)
        self.mlp, self.dropout = _perceptron(rngs), nnx.Dropout(RATE)

    def __call__(self, x: Array, *, rngs: nnx.Rngs | None = None) -> Array:
        x = x + self.attention(self.norm1(x), rngs=rngs)
        return x + self.dropout(self.mlp(self.norm2(x)), rngs=rngs)


class _NnxVisionTransformer(nnx.Module):
    """Patches, a class token and positions."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.patches = nnx.Conv(3, WIDTH, (4, 4), 4, padding='VALID', rngs=rngs)
        self.token = nnx.Param(jax.random.normal(rngs.params(), (1, 1, WIDTH)))
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (1, 17, WIDTH)))
        self.layers = nnx.List([_NnxLayer(rngs) for _ in range(3)])
        self.norm, self.classifier = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, image: Array, *, rngs: nnx.Rngs | None = None) -> Array:
        x = self.patches(image).reshape(image.shape[0], -1, WIDTH)
        x = jnp.concatenate([jnp.tile(self.token[...], (x.shape[0], 1, 1)), x], axis=1) + self.positions[...]
        for layer in self.layers:
            x = layer(x, rngs=rngs)
        return self.classifier(self.norm(x)[:, 0])


class _NnxConvNextBlock(nnx.Module):
    """A depthwise convolution, a perceptron, a learned scale; whole paths are dropped."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.depthwise = nnx.Conv(WIDTH, WIDTH, (7, 7), feature_group_count=WIDTH, rngs=rngs)
        self.norm, self.mlp = nnx.LayerNorm(WIDTH, rngs=rngs), _perceptron(rngs)
        self.gamma = nnx.Param(jnp.full((1, 1, 1, WIDTH), 0.5))

    def __call__(self, x: Array, training: bool, rngs: nnx.Rngs | None) -> Array:
        y = self.mlp(self.norm(self.depthwise(x))) * self.gamma
        if training and rngs is not None:
            y = y * jax.random.bernoulli(rngs.dropout(), 1 - RATE, (x.shape[0], 1, 1, 1)) / (1 - RATE)
        return x + y


class _NnxStages(nnx.Module):
    """A stem, blocks and a classifier; a flag among the arguments, and random streams."""

    def __init__(self, kind: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(3, WIDTH, (4, 4), 4, padding='VALID', rngs=rngs)
        self.blocks = nnx.List([kind(rngs) for _ in range(3)])
        self.dropout, self.head = nnx.Dropout(RATE), nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x: Array, training: bool = False, *, rngs: nnx.Rngs | None = None) -> Array:
        x = nnx.silu(self.stem(x))
        for block in self.blocks:
            x = block(x, training, rngs)
        return self.head(self.dropout(x.mean((1, 2)), deterministic=not training, rngs=rngs))


class _NnxBottleneck(nnx.Module):
    """Convolutions with BatchNorm, and a projection on the shortcut."""

    def __init__(self, channels: int, strides: int, rngs: nnx.Rngs) -> None:
        self.conv0 = nnx.Conv(channels, WIDTH, (3, 3), strides, use_bias=False, rngs=rngs)
        self.conv1 = nnx.Conv(WIDTH, 16, (1, 1), use_bias=False, rngs=rngs)
        self.bn0, self.bn1 = nnx.BatchNorm(WIDTH, rngs=rngs), nnx.BatchNorm(16, rngs=rngs)
        self.downsample = nnx.Conv(channels, 16, (1, 1), strides, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        y = self.bn1(self.conv1(nnx.relu(self.bn0(self.conv0(x)))))
        return nnx.relu(y + self.downsample(x))


class _NnxResNet(nnx.Module):
    """No argument for the mode: ``train()`` and ``eval()`` set it."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem, self.norm = nnx.Conv(3, WIDTH, (3, 3), 2, rngs=rngs), nnx.BatchNorm(WIDTH, rngs=rngs)
        sizes = (WIDTH, 1), (16, 2), (16, 2)
        self.layers = nnx.List([nnx.Sequential(_NnxBottleneck(*size, rngs)) for size in sizes])
        self.fc = nnx.Linear(16, CLASSES, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = nnx.max_pool(nnx.relu(self.norm(self.stem(x))), (3, 3), (2, 2), 'SAME')
        for layer in self.layers:
            x = layer(x)
        return self.fc(x.mean((1, 2)))


class _NnxInvertedBlock(nnx.Module):
    """A depthwise convolution between two others, its channels weighted by what they hold."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        conv = functools.partial(nnx.Conv, kernel_size=(1, 1), use_bias=False, rngs=rngs)
        self.expand, self.project = conv(WIDTH, 16), conv(16, WIDTH)
        self.depthwise = nnx.Conv(16, 16, (3, 3), feature_group_count=16, use_bias=False, rngs=rngs)
        self.reduce, self.restore = nnx.Linear(16, 4, rngs=rngs), nnx.Linear(4, 16, rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(size, rngs=rngs) for size in (16, 16, WIDTH)])

    def __call__(self, x: Array, training: bool, rngs: nnx.Rngs | None) -> Array:
        norms = [functools.partial(norm, use_running_average=not training) for norm in self.norms]
        y = nnx.silu(norms[1](self.depthwise(nnx.silu(norms[0](self.expand(x))))))
        y = y * nnx.sigmoid(self.restore(nnx.silu(self.reduce(y.mean((1, 2), keepdims=True)))))
        return x + norms[2](self.project(y))


# As in big_vision, Flax Linen: calls return ``(result, everything in between)``.
class _Mlp(nn.Module):
    """A perceptron with dropout."""

    @nn.compact
    def __call__(self, x: Array, deterministic: bool = True) -> Array:
        y = nn.Dropout(RATE)(nn.gelu(nn.Dense(16)(x)), deterministic)
        return nn.Dense(x.shape[-1])(y)


class _EncoderBlock(nn.Module):
    """Attention and a perceptron."""

    @nn.compact
    def __call__(self, x: Array, deterministic: bool = True) -> tuple[Array, Outputs]:
        out: Outputs = {}
        y = nn.LayerNorm()(x)
        y = out['sa'] = nn.MultiHeadDotProductAttention(2, deterministic=deterministic)(y, y)
        x = out['+sa'] = x + nn.Dropout(RATE)(y, deterministic)
        y = out['mlp'] = _Mlp()(nn.LayerNorm()(x), deterministic)
        return x + nn.Dropout(RATE)(y, deterministic), out


class _VisionTransformer(nn.Module):
    """Three blocks one by one, or loops of two blocks each by `flax.linen.scan`; the last layer starts as zeros."""

    loops: int = 0

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> tuple[Array, Outputs]:
        out: Outputs = {}
        x = out['stem'] = nn.Conv(WIDTH, (4, 4), strides=(4, 4), padding='VALID', name='embedding')(image)
        x = x.reshape(x.shape[0], -1, WIDTH)
        x = out['with_posemb'] = x + self.param('pos_embedding', nn.initializers.normal(0.1), (1, *x.shape[1:]))
        again = nn.remat(_EncoderBlock, prevent_cse=False, static_argnums=(2,))
        rngs = {'params': True, 'dropout': True}
        loop = nn.scan(again, variable_axes={'params': 0}, split_rngs=rngs, in_axes=nn.broadcast, length=2)
        for n in range(self.loops or 3):
            block = loop(name=f'encoderblocks_{n}') if self.loops else _EncoderBlock(name=f'encoderblock_{n}')
            x, out[f'block{n}'] = block(x, not train)
        probe = self.param('probe', nn.initializers.xavier_uniform(), (1, 1, WIDTH))
        x = nn.MultiHeadDotProductAttention(2)(jnp.tile(probe, [x.shape[0], 1, 1]), nn.LayerNorm()(x))
        x = out['pre_logits'] = (x + _Mlp()(nn.LayerNorm()(x), not train))[:, 0]
        return nn.Dense(CLASSES, kernel_init=nn.initializers.zeros, name='head')(x), out


class _StdConv(nn.Conv):
    """A convolution that standardises its kernel where Flax reads the parameter."""

    def param(self, name: str, *args: Any, **kwargs: Any) -> Any:
        value = super().param(name, *args, **kwargs)
        if name != 'kernel':
            return value
        mean, variance = (f(value, (0, 1, 2), keepdims=True) for f in (jnp.mean, jnp.var))
        return (value - mean) / jnp.sqrt(variance + 1e-6)


class _ResidualStage(nn.Module):
    """A unit whose norms and activations come first."""

    strides: int

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Outputs]:
        y = nn.relu(nn.GroupNorm(4, name='gn1')(x))
        shortcut = _StdConv(16, (1, 1), self.strides, use_bias=False, name='conv_proj')(y)
        y = _StdConv(WIDTH, (3, 3), self.strides, use_bias=False, name='conv1')(y)
        y = _StdConv(16, (1, 1), use_bias=False, name='conv2')(nn.relu(nn.GroupNorm(4, name='gn2')(y)))
        return shortcut + y, {'unit01': shortcut + y}


class _Bit(nn.Module):
    """A residual network with standardised convolutions and GroupNorm."""

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> tuple[Array, Outputs]:
        out: Outputs = {}
        x = _StdConv(WIDTH, (3, 3), (2, 2), use_bias=False, name='conv_root')(image)
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding='SAME')
        for n in range(3):
            x, out[f'stage{n}'] = _ResidualStage(2 if n else 1, name=f'block{n + 1}')(x)
        x = out['pre_logits'] = nn.relu(nn.GroupNorm(4, name='norm-pre-head')(x)).mean((1, 2))
        return nn.Dense(CLASSES, kernel_init=nn.initializers.zeros, name='head')(x), out


class _MixerBlock(nn.Module):
    """Mixes positions, then channels; whole paths are dropped."""

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        drop = nn.Dropout(RATE, broadcast_dims=(1, 2))
        y = jnp.swapaxes(nn.LayerNorm()(x), 1, 2)
        x = x + drop(jnp.swapaxes(_Mlp(name='token_mixing')(y, not train), 1, 2), not train)
        return x + drop(_Mlp(name='channel_mixing')(nn.LayerNorm()(x), not train), not train)


class _Mixer(nn.Module):
    """Perceptrons over patches and channels."""

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> tuple[Array, Outputs]:
        out: Outputs = {}
        x = nn.Conv(WIDTH, (4, 4), (4, 4), name='stem')(image)
        x = out['stem'] = x.reshape(x.shape[0], -1, WIDTH)
        for n in range(3):
            x = out[f'block{n}'] = _MixerBlock(name=f'MixerBlock_{n}')(x, train=train)
        x = out['pre_logits'] = nn.LayerNorm(name='pre_head_layer_norm')(x).mean(1)
        return nn.Dense(CLASSES, kernel_init=nn.initializers.zeros, name='head')(x), out


# As in Flax's examples.
class _TextClassifier(nn.Module):
    """Embeddings, an LSTM in both directions, attention over tokens; the flag is an attribute or an argument."""

    deterministic: bool | None = None

    def setup(self) -> None:
        self.embedder, self.dropout = nn.Embed(VOCABULARY, WIDTH), nn.Dropout(RATE)
        self.encoder = nn.Bidirectional(*(nn.RNN(nn.OptimizedLSTMCell(WIDTH)) for _ in range(2)))
        self.keys, self.logits = nn.Dense(1, use_bias=False), nn.Dense(CLASSES)

    def __call__(self, token_ids: Array, lengths: Array, deterministic: bool | None = None) -> Array:
        deterministic = nn.merge_param('deterministic', self.deterministic, deterministic)
        x = self.dropout(self.embedder(token_ids), deterministic=deterministic)
        x = self.encoder(x, seq_lengths=lengths)
        scores = jnp.where(jnp.arange(LENGTH)[None] < lengths[:, None], self.keys(x)[..., 0], -jnp.inf)
        return self.logits(jnp.einsum('bt,btf->bf', nn.softmax(scores), x))


@struct.dataclass
class _TaggerConfig:
    width: int = WIDTH
    dropout_rate: float = RATE


class _TaggerBlock(nn.Module):
    """Attention among tokens that are no padding, and a perceptron."""

    config: _TaggerConfig

    @nn.compact
    def __call__(self, inputs: Array, mask: Array, deterministic: bool) -> Array:
        attend = nn.SelfAttention(2, dropout_rate=self.config.dropout_rate, deterministic=deterministic)
        x = inputs + attend(nn.LayerNorm()(inputs), mask)
        return x + _Mlp()(nn.LayerNorm()(x), deterministic)


class _Tagger(nn.Module):
    """A tag for each token; arguments have names alone, and the flag no default."""

    config: _TaggerConfig = _TaggerConfig()

    @nn.compact
    def __call__(self, *, inputs: Array, train: bool) -> Array:
        mask = nn.make_attention_mask(inputs > 0, inputs > 0)
        angles = np.arange(LENGTH)[:, None] / 10 ** np.linspace(0, 1, self.config.width)
        x = nn.Embed(VOCABULARY, self.config.width, name='embed')(inputs) + np.sin(angles, dtype=np.float32)[None]
        for n in range(3):
            x = _TaggerBlock(self.config, name=f'encoderblock_{n}')(x, mask, not train)
        return nn.Dense(CLASSES, name='logits')(nn.LayerNorm(name='encoder_norm')(x))


class _VaeEncoder(nn.Module):
    """Returns mean and log-variance."""

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        x = nn.relu(nn.Dense(16, name='fc1')(x))
        return nn.Dense(4, name='fc2_mean')(x), nn.Dense(4, name='fc2_logvar')(x)


class _Vae(nn.Module):
    """Latent values are drawn in training; a logit for each pixel, means and log-variances are returned."""

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> tuple[Array, Array, Array]:
        mean, logvar = _VaeEncoder(name='encoder')(x)
        noise = jax.random.normal(self.make_rng('latent'), mean.shape) if train else 0
        decoder = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(64)], name='decoder')
        return decoder(mean + jnp.exp(0.5 * logvar) * noise), mean, logvar


class _GraphLayer(nn.Module):
    """Each node adds what the nodes at the other ends of its edges send."""

    @nn.compact
    def __call__(self, nodes: Array, senders: Array, receivers: Array, deterministic: bool) -> Array:
        sent = jnp.take_along_axis(nn.relu(nn.Dense(WIDTH)(nodes)), senders[..., None], axis=1)
        received = jax.vmap(functools.partial(jax.ops.segment_sum, num_segments=nodes.shape[1]))
        x = nodes + received(sent, receivers)
        return nn.LayerNorm()(nn.Dropout(RATE)(x, deterministic=deterministic))


class _GraphNetwork(nn.Module):
    """Graphs of equal size, one a row: nodes, and edges by the numbers of their nodes."""

    deterministic: bool = True

    @nn.compact
    def __call__(self, nodes: Array, senders: Array, receivers: Array) -> Array:
        x = nn.Dense(WIDTH, name='embed')(nodes)
        for n in range(3):
            x = _GraphLayer(name=f'step{n}')(x, senders, receivers, self.deterministic)
        return nn.Dense(CLASSES, name='decode')(x.mean(1))


# As in Hugging Face's Flax models: submodules are called ``self`` and ``output``; a data class is returned.
class _BertOutput(nn.Module):
    """A dense layer, dropout, the sum with what came before, and a norm."""

    def setup(self) -> None:
        self.dense, self.LayerNorm, self.dropout = nn.Dense(WIDTH), nn.LayerNorm(), nn.Dropout(RATE)

    def __call__(self, hidden: Array, before: Array, deterministic: bool = True) -> Array:
        return self.LayerNorm(before + self.dropout(self.dense(hidden), deterministic=deterministic))


class _BertAttention(nn.Module):
    """Submodules ``self`` and ``output``."""

    def setup(self) -> None:
        self.self, self.output = nn.MultiHeadDotProductAttention(2, dropout_rate=RATE), _BertOutput()

    def __call__(self, hidden: Array, mask: Array, deterministic: bool = True) -> Array:
        attended = self.self(hidden, mask=mask[:, None, None] > 0, deterministic=deterministic)
        return self.output(attended, hidden, deterministic=deterministic)


class _BertLayer(nn.Module):
    """Submodules ``attention``, ``intermediate`` and ``output``; returns a tuple."""

    def setup(self) -> None:
        self.attention, self.intermediate, self.output = _BertAttention(), nn.Dense(16), _BertOutput()

    def __call__(self, hidden: Array, mask: Array, deterministic: bool = True) -> tuple[Array]:
        attended = self.attention(hidden, mask, deterministic=deterministic)
        return (self.output(nn.gelu(self.intermediate(attended)), attended, deterministic=deterministic),)


@struct.dataclass
class _ClassifierOutput:
    logits: Array
    last_hidden_state: Array


class _Bert(nn.Module):
    """A classifier of sequences; arguments that are not given are optional."""

    def setup(self) -> None:
        self.word_embeddings, self.position_embeddings = nn.Embed(VOCABULARY, WIDTH), nn.Embed(LENGTH, WIDTH)
        self.token_type_embeddings, self.LayerNorm = nn.Embed(2, WIDTH), nn.LayerNorm()
        self.layer = [_BertLayer(name=f'layer_{n}') for n in range(3)]
        self.pooler, self.dropout, self.classifier = nn.Dense(WIDTH), nn.Dropout(RATE), nn.Dense(CLASSES)

    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array,
        token_type_ids: Array,
        position_ids: Array | None = None,
        deterministic: bool = True,
    ) -> _ClassifierOutput:
        positions = jnp.broadcast_to(jnp.arange(LENGTH), input_ids.shape) if position_ids is None else position_ids
        hidden = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        hidden = self.LayerNorm(hidden + self.position_embeddings(positions))
        for layer in self.layer:
            (hidden,) = layer(hidden, attention_mask, deterministic=deterministic)
        pooled = self.dropout(jnp.tanh(self.pooler(hidden[:, 0])), deterministic=deterministic)
        return _ClassifierOutput(self.classifier(pooled), hidden)


# Exits and data.
class _Head(nn.Module):
    """A dense layer on the mean over positions of the first array that a submodule returns."""

    @nn.compact
    def __call__(self, value: Any) -> Array:
        x = jax.tree.leaves(value)[0]
        return nn.Dense(CLASSES)(x.mean(tuple(range(1, x.ndim - 1))))


def _black_and_white(value: Any) -> Array:
    """Returns logits ``[B, pixels, 2]`` of an image, the first of several arrays."""
    pixels = jax.tree.leaves(value)[0]
    return jnp.stack([jnp.zeros_like(pixels), pixels], axis=-1)


class _PixelHead(nn.Module):
    """Draws the image from the first array that a submodule returns."""

    @nn.compact
    def __call__(self, value: Any) -> Array:
        return _black_and_white(nn.Dense(64)(jax.tree.leaves(value)[0]))


@dataclasses.dataclass(frozen=True)
class Structure:
    """A network, its exits, and data.

    Attributes:
        network: makes it.
        exits: as `branchy_jax.models.attach` takes them.
        inputs: of the network.
        labels: of the inputs.
        options: further arguments with which its author evaluates it.
    """

    network: Callable[[], nn.Module | nnx.Module]
    exits: Any
    inputs: Any
    labels: np.ndarray
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_random = np.random.default_rng(0)
_images = _random.normal(size=(ROWS, 16, 16, 3)).astype(np.float32)
_labels = np.arange(ROWS) % CLASSES
_tokens = _random.integers(1, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
_lengths = _random.integers(2, LENGTH + 1, ROWS).astype(np.int32)
_mask = (np.arange(LENGTH) < _lengths[:, None]).astype(np.int32)
_pixels = (_random.random((ROWS, 64)) < 0.5).astype(np.float32)
_text = {'input_ids': _tokens, 'attention_mask': _mask, 'token_type_ids': _tokens % 2}
_senders, _receivers = _random.integers(0, 5, (2, ROWS, 7)).astype(np.int32)
_nodes = _random.normal(size=(ROWS, 5, 4)).astype(np.float32)
_graphs = {'nodes': _nodes, 'senders': _senders, 'receivers': _receivers}


def _nnx(kind: Callable[[nnx.Rngs], nnx.Module], *places: str) -> Structure:
    return Structure(lambda: kind(nnx.Rngs(0)), list(places), _images, _labels)


def _with_outputs(network: nn.Module, *places: str) -> Structure:
    heads = {**{place: _Head() for place in places}, '': lambda result: result[0]}
    return Structure(lambda: network, heads, _images, _labels)


STRUCTURES = {
    'ViT, NNX, as in Bonsai': _nnx(_NnxVisionTransformer, 'layers/0', 'layers/1'),
    'ConvNeXt, NNX, as in Bonsai': _nnx(functools.partial(_NnxStages, _NnxConvNextBlock), 'blocks/0', 'blocks/1'),
    'ResNet, NNX, as in Bonsai': _nnx(_NnxResNet, 'layers/0', 'layers/1'),
    'EfficientNet, NNX, as in Bonsai': _nnx(functools.partial(_NnxStages, _NnxInvertedBlock), 'blocks/0', 'blocks/1'),
    'ViT, as in big_vision': _with_outputs(_VisionTransformer(), 'encoderblock_0', 'encoderblock_1'),
    'BiT, as in big_vision': _with_outputs(_Bit(), 'block1', 'block2'),
    'Mixer, as in big_vision': _with_outputs(_Mixer(), 'MixerBlock_0', 'MixerBlock_1'),
    'ViT, layers in three scans': _with_outputs(_VisionTransformer(loops=3), 'encoderblocks_0', 'encoderblocks_1'),
    'ViT, exits inside one scan': _with_outputs(
        _VisionTransformer(loops=1), 'encoderblocks_0/_Mlp_0', 'encoderblocks_0/LayerNorm_1'
    ),
    "text classifier with LSTM, as in Flax's examples": Structure(
        _TextClassifier, {'embedder': None, 'encoder': None}, (_tokens, _lengths), _labels, {'deterministic': True}
    ),
    "sequence tagger, as in Flax's examples": Structure(
        _Tagger, ['encoderblock_0', 'encoderblock_1'], {'inputs': _tokens * _mask}, _tokens % CLASSES, {'train': False}
    ),
    "VAE, as in Flax's examples": Structure(
        _Vae, {'encoder/fc1': _PixelHead(), 'encoder': _PixelHead(), '': _black_and_white}, _pixels, _pixels.astype(int)
    ),
    "graph network, as in Flax's examples": Structure(_GraphNetwork, ['step0', 'step1'], _graphs, _labels),
    "BERT, as in Hugging Face's Flax": Structure(
        _Bert, {'layer_0': _Head(), 'layer_1': _Head(), '': lambda result: result.logits}, _text, _labels
    ),
}
"""The structures by name."""
