"""Networks with exits: the paper's three and a few more, their one-exit baselines, and the means to build your own."""

from branchy_jax.models import layers as layers
from branchy_jax.models.alexnet import b_alexnet as b_alexnet
from branchy_jax.models.attached.attach import attach as attach
from branchy_jax.models.banded import banded_convolution as banded_convolution
from branchy_jax.models.branchy import select_exits as select_exits
from branchy_jax.models.branchy import without_branches as without_branches
from branchy_jax.models.compose import Functional as Functional
from branchy_jax.models.compose import Route as Route
from branchy_jax.models.from_nnx import from_nnx as from_nnx
from branchy_jax.models.lenet import b_lenet as b_lenet
from branchy_jax.models.pretrained import Pretrained as Pretrained
from branchy_jax.models.pretrained import load_pretrained as load_pretrained
from branchy_jax.models.pretrained import pretrained_names as pretrained_names
from branchy_jax.models.pretrained import save_pretrained as save_pretrained
from branchy_jax.models.registry import create as create
from branchy_jax.models.registry import names as names
from branchy_jax.models.resnet import b_resnet as b_resnet
from branchy_jax.models.tree import Branch as Branch
from branchy_jax.models.tree import tree as tree
from branchy_jax.models.unet import b_unet as b_unet
from branchy_jax.models.vit import b_vit as b_vit

__all__ = [
    'Branch',
    'Functional',
    'Pretrained',
    'Route',
    'attach',
    'b_alexnet',
    'b_lenet',
    'b_resnet',
    'b_unet',
    'b_vit',
    'banded_convolution',
    'create',
    'from_nnx',
    'layers',
    'load_pretrained',
    'names',
    'pretrained_names',
    'save_pretrained',
    'select_exits',
    'tree',
    'without_branches',
]
