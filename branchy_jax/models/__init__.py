"""Networks with exits: the paper's three, their one-exit baselines, and the means to build your own."""

from branchy_jax.models import layers as layers
from branchy_jax.models.alexnet import b_alexnet as b_alexnet
from branchy_jax.models.banded import banded_convolution as banded_convolution
from branchy_jax.models.branchy import BranchyNet as BranchyNet
from branchy_jax.models.branchy import select_exits as select_exits
from branchy_jax.models.branchy import without_branches as without_branches
from branchy_jax.models.lenet import b_lenet as b_lenet
from branchy_jax.models.pretrained import Pretrained as Pretrained
from branchy_jax.models.pretrained import load_pretrained as load_pretrained
from branchy_jax.models.pretrained import pretrained_names as pretrained_names
from branchy_jax.models.registry import create as create
from branchy_jax.models.registry import names as names
from branchy_jax.models.resnet import b_resnet as b_resnet

__all__ = [
    'BranchyNet',
    'Pretrained',
    'b_alexnet',
    'b_lenet',
    'b_resnet',
    'banded_convolution',
    'create',
    'layers',
    'load_pretrained',
    'names',
    'pretrained_names',
    'select_exits',
    'without_branches',
]
