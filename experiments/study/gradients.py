"""The gradient of each layer of a trunk, with and without branches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

import branchy_jax as bj
from experiments.pages import pictures
from experiments.run.networks import count_exits, image_specs
from experiments.run.report import JPEG_NOTE, Row, provenance, store
from experiments.study.variants import DeepPlain, trunk_layers
from experiments.study.verdicts import bullets, judge

_OPTIMIZER = optax.adam(1e-3)
_NOTHING = 1e-12  # a gradient below this counts as this: it moves nothing


def run(workdir: Path, network: str, dataset: bj.data.Dataset, *, seeds: int, steps: int, batch_size: int) -> Row:
    """Measures gradients at initialisation and after some steps, writes and returns the record.

    A row is a network (``with branches`` or ``without``), a seed and the number of steps before, with the root mean
    square gradient of the kernels of each layer.
    """
    if network.startswith('b-plain'):
        depth = int(network.removeprefix('b-plain'))
        model: Any = DeepPlain(depth=depth, num_classes=dataset.num_classes)
    else:
        model = bj.models.create(network, num_classes=dataset.num_classes, image_shape=dataset.image_shape)
    layers = trunk_layers(model, dataset.image_shape)
    rows = [
        {'network': name, 'seed': seed, 'steps': after, 'gradients': gradients}
        for name, own in (('with branches', model), ('without', bj.models.without_branches(model)))
        for seed in range(seeds)
        for after, gradients in zip((0, steps), _norms(own, layers, dataset, seed, steps, batch_size), strict=True)
    ]
    record = {'network': network, 'dataset': dataset.name, 'seeds': seeds, 'steps': steps, 'batch_size': batch_size}
    record |= {**provenance('claims'), 'layers': layers, 'rows': rows}
    record['answers'] = [*_answers(rows, 0), *_answers(rows, steps)]
    path = workdir / f'gradients_{network}.json'
    store(path, record, page)
    norms = {name: norms_of(rows, name) for name in ('with branches', 'without')}
    pictures.gradient_norms(path.with_suffix('.png'), norms, steps=steps, title=f'{network} on {dataset.name}')
    print(page(record))
    return record


def norms_of(rows: Sequence[Row], network: str) -> np.ndarray:
    """Returns ``[S, 2, layers]``: seeds, before and after, layers."""
    own = [row['gradients'] for row in rows if row['network'] == network]
    return np.array(own).reshape(-1, 2, len(own[0]))


def _norms(
    model: Any, layers: Sequence[str], dataset: bj.data.Dataset, seed: int, steps: int, batch_size: int
) -> tuple[list[float], list[float]]:
    key = jax.random.key(seed)
    # With and without branches alike: parameters draw from the key by their own names.
    variables = jax.jit(model.init)(key, jnp.zeros((1, *dataset.image_shape)))
    state = bj.training.create_train_state(model, variables, _OPTIMIZER)
    order = np.random.default_rng(seed).permutation(len(dataset.train))
    batches = [
        bj.Batch(dataset.normalization(dataset.train.image[rows]), jnp.asarray(dataset.train.label[rows]))
        for rows in np.resize(order, (steps + 1, batch_size))
    ]
    before = _layer_norms(layers, _gradients(state, batches[0], key))
    weights = jnp.ones(count_exits(model, image_specs(dataset.image_shape)))
    for batch in batches[:-1]:
        state, _ = bj.training.train_step(state, batch, weights, key)
    return before, _layer_norms(layers, _gradients(state, batches[-1], key))


@jax.jit
def _gradients(state: bj.training.TrainState, batch: bj.Batch, key: jax.Array) -> Any:
    def loss(params: Any) -> jax.Array:
        variables, training = {'params': params, **state.model_state}, {'train': True, 'rngs': {'dropout': key}}
        logits, _ = state.model.apply(variables, batch.image, mutable=list(state.model_state), **training)
        return bj.losses.cross_entropy_per_exit(logits, batch.label).sum()

    return jax.grad(loss)(state.params)


def _layer_norms(layers: Sequence[str], gradients: Any) -> list[float]:
    flat, norms = traverse_util.flatten_dict(gradients), []
    for name in layers:
        leaves = [np.ravel(leaf) for path, leaf in flat.items() if path[0] == name and path[-1] == 'kernel']
        norms.append(float(np.sqrt(np.mean(np.square(np.concatenate(leaves), dtype=np.float64)))))
    return norms


def _answers(rows: Sequence[Row], after: int) -> list[Row]:
    branchy, plain = (
        np.log10(np.maximum(norms_of(rows, name)[:, min(after, 1)], _NOTHING)) for name in ('with branches', 'without')
    )
    quarter, when = max(1, branchy.shape[1] // 4), f'After {after} steps' if after else 'At initialisation'
    first = plain[:, :quarter].mean(axis=1)
    early, decay = branchy[:, :quarter].mean(axis=1) - first, plain[:, -quarter:].mean(axis=1) - first
    settings = {'unit': 'powers of ten', 'claim': 'Vanishing gradients'}
    return [
        judge(f'{when}, do gradients fade towards the first layers without branches?', decay, **settings),
        judge(f'{when}, are the gradients of the first quarter larger with branches?', early, **settings),
    ]


def page(record: Row) -> str:
    """Lays out a record in Markdown."""
    note = f'\n{JPEG_NOTE}' if record['dataset'] == 'cifar10' else ''
    return f"""# Vanishing gradients: {record['network']} on {record['dataset']}

`{record['command']}`

{record['device']}. Root mean square gradient of the kernels of each layer of the trunk, {record['seeds']} seeds,
batches of {record['batch_size']}.{note}

{bullets(record['answers'])}

![gradient of each layer](gradients_{record['network']}.png)
"""
