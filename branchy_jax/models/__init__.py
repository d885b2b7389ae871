"""Networks with exits: the paper's three and two more, their one-exit baselines, and exits for networks of others."""

from branchy_jax.models.attach import attach
from branchy_jax.models.banded import banded_convolution
from branchy_jax.models.capture import from_nnx
from branchy_jax.models.paper import AlexNet, LeNet, ResNet
from branchy_jax.models.pretrained import Pretrained as Pretrained
from branchy_jax.models.pretrained import create, load_pretrained, names, save_pretrained
from branchy_jax.models.select import remaining_stages, select_exits, without_branches
from branchy_jax.models.unet import UNet
from branchy_jax.models.vit import ViT

__all__ = ['AlexNet', 'LeNet', 'ResNet', 'UNet', 'ViT', 'attach', 'banded_convolution', 'create', 'from_nnx']
__all__ += ['load_pretrained', 'names', 'remaining_stages', 'save_pretrained', 'select_exits', 'without_branches']
