"""An encoder–decoder for segmentation, with two early exits that predict masks."""

import flax.linen as nn
import jax.numpy as jnp

from branchy_jax.models.layers import check_images, conv_norm_relu, depth_to_space, space_to_depth
from branchy_jax.types import Array


class UNet(nn.Module):
    """B-U-Net: four levels down, three up, and masks after the encoder and after the first level up.

    All levels work on patches of pixels, and every head ends by unfolding features into pixels, so that the finest
    level costs no more than the others. A side head adds up the levels so far at the finest resolution, after a
    projection each, and unfolds: a twentieth of the trunk. The first has seen the whole image, as a digit's class
    needs; it lacks the decoder, two thirds of the trunk.

    Attributes:
        num_classes: K, the background included.
        image_shape: ``(H, W, C)``; H and W must be divisible by ``8 * patch_size``. ``None`` takes any such images.
        width: features of the finest level; each level down has twice as many.
        patch_size: side of the pixels that are one position of the finest level.
        head_width: features of the side heads; below K plus the pixels of a patch they cannot tell all masks apart.
        dtype: of the computation; parameters and logits are float32.

    Raises:
        ValueError: on construction, images that four levels do not divide.

    Example:
        >>> import jax
        >>> model, images = UNet(width=4, head_width=4, image_shape=(16, 16, 1)), jnp.ones((1, 16, 16, 1))
        >>> logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
        >>> [z.shape for z in logits]
        [(1, 16, 16, 11), (1, 16, 16, 11), (1, 16, 16, 11)]

    References:
        Ronneberger et al., U-Net, 2015; heads after Kirillov et al., Panoptic Feature Pyramid Networks, 2019.
    """

    num_classes: int = 11
    image_shape: tuple[int, int, int] | None = (48, 48, 1)
    width: int = 16
    patch_size: int = 2
    head_width: int = 32
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self) -> None:
        unit = 8 * self.patch_size
        if self.image_shape is not None and any(length % unit for length in self.image_shape[:2]):
            got = f'got {tuple(self.image_shape)}; four levels on patches of {self.patch_size} need multiples of {unit}'
            raise ValueError(f'image_shape: {got}; pad or resize the images')
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Array, train: bool = False, frozen_trunk: bool = False) -> tuple[Array, ...]:
        """Computes logits ``[B, H, W, K]`` of three exits from float ``images [B, H, W, C]``."""
        check_images(images, self.image_shape)
        learns = train and not frozen_trunk
        x = space_to_depth(images, size=self.patch_size)
        down = [self._block(x, self.width, 'down0', learns)]
        for n in (1, 2, 3):
            halved = nn.max_pool(down[-1], (2, 2), (2, 2))
            down.append(self._block(halved, self.width * 2**n, f'down{n}', learns))
        early = self._side_head(down, 'exit1', train)
        up2 = self._up(down[3], down[2], 2, learns)
        middle = self._side_head([down[0], down[1], up2], 'exit2', train)
        up0 = self._up(self._up(up2, down[1], 1, learns), down[0], 0, learns)
        return early, middle, self._unfold(up0, 'head')

    def _block(self, x: Array, features: int, name: str, train: bool) -> Array:
        for n in (1, 2):
            x = conv_norm_relu(x, features, f'{name}_conv{n}', train=train, dtype=self.dtype)
        return x

    def _up(self, coarse: Array, fine: Array, n: int, train: bool) -> Array:
        """Enlarges the coarse level and joins it with the fine one: the skip connection."""
        joined = jnp.concatenate([enlarge(coarse, fine.shape), fine], axis=-1)
        return self._block(joined, self.width * 2**n, f'up{n}', train)

    def _side_head(self, levels: list[Array], name: str, train: bool) -> Array:
        x = AddLevels(self.head_width, self.dtype, name=f'{name}_levels')(tuple(levels))
        norm = nn.BatchNorm(not train, momentum=0.9, dtype=self.dtype, name=f'{name}_norm')
        return self._unfold(nn.relu(norm(x)), f'{name}_logits')

    def _unfold(self, x: Array, name: str) -> Array:
        x = nn.Conv(self.num_classes * self.patch_size**2, (1, 1), dtype=self.dtype, name=name)(x)
        return depth_to_space(x, size=self.patch_size)


class AddLevels(nn.Module):
    """Projects each level to the same features and adds all at the resolution of the first.

    Attributes:
        features: of the sum.
        dtype: of the computation.
    """

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, levels: tuple[Array, ...]) -> Array:
        """Maps arrays ``[B, H / 2^i, W / 2^i, C_i]``, the first being the finest, to ``[B, H, W, features]``."""
        projected = []
        for n, level in enumerate(levels):
            conv = nn.Conv(self.features, (1, 1), dtype=self.dtype, name=f'level{n}')
            projected.append(enlarge(conv(level), levels[0].shape))
        return sum(projected[1:], start=projected[0])


def enlarge(x: Array, shape: tuple[int, ...]) -> Array:
    """Repeats pixels of ``[B, h, w, C]`` to the height and width of a shape ``[B, H, W, …]``."""
    for axis in (1, 2):
        x = jnp.repeat(x, shape[axis] // x.shape[axis], axis=axis)
    return x
