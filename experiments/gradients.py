"""Do branches keep gradients from vanishing? The gradient of each layer, with and without branches.

    python -m experiments.gradients --workdir=runs/claims --network=b-resnet110 --dataset=cifar10
    python -m experiments.gradients --workdir=runs/claims --network=b-plain30 --dataset=cifar10

Writes ``gradients_NETWORK.json``, ``.md`` and ``.png``. ``b-plainD`` is a network of D convolutions without shortcuts
or normalisation, with two branches. The network with branches sums all exits' losses with weight 1; the one without
has the same initial weights and sees the same batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

import branchy_jax as bj
from experiments.configs import common
from experiments.pages import pictures
from experiments.pages.claims import bullets
from experiments.pages.paper import JPEG_NOTE
from experiments.run import command
from experiments.run.networks import count_exits, image_specs
from experiments.run.tasks import load
from experiments.study.variants import DeepPlain, trunk_layers
from experiments.study.verdicts import judge


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and writes."""
    parser = command.parser(__doc__)
    parser.add_argument('--workdir', type=Path, required=True, help='Folder for the results.')
    parser.add_argument('--network', default='b-plain30', help='b-plainD or a branchy network such as b-resnet110.')
    parser.add_argument('--dataset', default='cifar10', help='mnist5k, a TFDS name or an .npz.')
    parser.add_argument('--seeds', type=command.positive, default=5, help='Initial weights.')
    parser.add_argument('--steps', type=command.positive, default=20, help='Of training, before the second reading.')
    parser.add_argument('--batch_size', type=command.positive, default=16, help='Examples in a step.')
    options = parser.parse_args(arguments)
    config = common.get_config()
    config.dataset = options.dataset
    run(
        options.workdir,
        options.network,
        load(config),
        seeds=options.seeds,
        steps=options.steps,
        batch_size=options.batch_size,
    )


def run(
    workdir: Path, network: str, dataset: bj.data.Dataset, *, seeds: int, steps: int, batch_size: int
) -> dict[str, Any]:
    """Measures gradients at initialisation and after some steps; returns the record."""
    path = workdir / f'gradients_{network}.json'
    settings = {'network': network, 'dataset': dataset.name, 'seeds': seeds, 'steps': steps, 'batch_size': batch_size}
    stored = bj.report.read_json(path) if path.exists() else {}
    model = _model(network, dataset)
    layers = trunk_layers(model, dataset.image_shape)
    if settings.items() <= stored.items():  # measured before
        found = {name: np.array(values) for name, values in stored['norms'].items()}
    else:
        models = {'with branches': model, 'without': bj.models.without_branches(model)}
        found = {
            name: np.array([_norms(model, layers, dataset, seed, steps, batch_size) for seed in range(seeds)])
            for name, model in models.items()
        }  # [S, 2, layers]
    plain, branchy = found['without'], found['with branches']
    moments = ('at initialisation', f'after {steps} steps')
    record = {
        **settings,
        **command.provenance('gradients'),
        'layers': layers,
        'norms': {name: values.tolist() for name, values in found.items()},
        'answers': [
            {'when': when, **answer}
            for moment, when in enumerate(moments)
            for answer in _answers(branchy[:, moment], plain[:, moment], when)
        ],
    }
    workdir.mkdir(parents=True, exist_ok=True)
    bj.report.write_json(path, record)
    title = f'{network} on {dataset.name}'
    pictures.gradient_norms(path.with_suffix('.png'), record['norms'], steps=steps, title=title)
    bj.report.write_text(path.with_suffix('.md'), _page(record))
    print(_page(record))
    return record


def _model(network: str, dataset: bj.data.Dataset) -> Any:
    if network.startswith('b-plain'):
        depth = int(network.removeprefix('b-plain'))
        return DeepPlain(depth=depth, branches=2, num_classes=dataset.num_classes)
    return bj.models.create(network, num_classes=dataset.num_classes, image_shape=dataset.image_shape)


def _norms(
    model: Any, layers: Sequence[str], dataset: bj.data.Dataset, seed: int, steps: int, batch_size: int
) -> tuple[list[float], list[float]]:
    """Returns the root mean square gradient of every layer of the trunk, before and after training."""
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


_OPTIMIZER = optax.adam(1e-3)
_NOTHING = 1e-12  # a gradient below this counts as this: it moves nothing


@jax.jit
def _gradients(state: bj.training.TrainState, batch: bj.Batch, key: jax.Array) -> Any:
    def loss(params: Any) -> jax.Array:
        logits, _ = state.model.apply(
            {'params': params, **state.model_state},
            batch.image,
            train=True,
            rngs={'dropout': key},
            mutable=list(state.model_state),
        )
        return bj.losses.cross_entropy_per_exit(logits, batch.label).sum()

    return jax.grad(loss)(state.params)


def _layer_norms(layers: Sequence[str], gradients: Any) -> list[float]:
    flat = traverse_util.flatten_dict(gradients)
    of_layers = [
        [np.ravel(leaf) for path, leaf in flat.items() if path[0] == name and path[-1] == 'kernel'] for name in layers
    ]
    kernels = [np.concatenate(leaves) for leaves in of_layers]
    return [float(np.sqrt(np.mean(np.square(found, dtype=np.float64)))) for found in kernels]


def _answers(branchy: np.ndarray, plain: np.ndarray, when: str) -> list[dict[str, Any]]:
    quarter = max(1, branchy.shape[1] // 4)
    branchy, plain = (np.log10(np.maximum(values, _NOTHING)) for values in (branchy, plain))
    first = plain[:, :quarter].mean(axis=1)
    early, decay = branchy[:, :quarter].mean(axis=1) - first, plain[:, -quarter:].mean(axis=1) - first
    unit = 'powers of ten'
    return [
        judge(f'{when.capitalize()}, do gradients fade towards the first layers without branches?', decay, unit=unit),
        judge(f'{when.capitalize()}, are the gradients of the first quarter larger with branches?', early, unit=unit),
    ]


def _page(record: dict[str, Any]) -> str:
    note = f'\n{JPEG_NOTE}' if record['dataset'] == 'cifar10' else ''
    return f"""# Vanishing gradients: {record['network']} on {record['dataset']}

`{record['command']}`

{record['device']}. Root mean square gradient of the kernels of each layer of the trunk, {record['seeds']} seeds,
batches of {record['batch_size']}.{note}

{bullets(record['answers'])}

![gradient of each layer](gradients_{record['network']}.png)
"""


if __name__ == '__main__':
    main()
