"""Compiles every executor of every network for chips that are not here, and reports what the compilers made of them.

    python -m experiments.chips --platform=tpu --workdir=experiments/results/chips     (pip install 'jax[tpu]')
    python -m experiments.chips --platform=cuda --workdir=experiments/results/chips    (pip install 'jax[cuda13]')

A TPU v5e needs the package libtpu, an H100 the CUDA plugin of jax; neither needs the chip. Results of both go into one
page: ``chips.json`` and ``chips.md`` keep what was found for the other platform.
"""

from __future__ import annotations

import collections
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import branchy_jax as bj
from branchy_jax.report import read_json, write_json, write_text
from experiments.pages.tables import table
from experiments.run import command
from experiments.run.networks import count_exits, image_specs

_NETWORKS = ('b-lenet', 'b-alexnet', 'b-resnet110', 'b-vit')
_BATCH, _CHUNK = 64, 16
_H100 = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
 shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
 cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_CHIPS = {'tpu': 'TPU v5e', 'cuda': 'NVIDIA H100'}
# Triton chooses tiles by trying them on the chip; without one its guess may not fit, and the compiler gives up.
_OPTIONS = {'cuda': {'xla_gpu_enable_triton_gemm': False}}
_HOST = re.compile(r'callback|host|infeed|outfeed', re.IGNORECASE)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles for one platform, writing what is known after every program."""
    parser = command.parser(__doc__)
    parser.add_argument('--platform', choices=sorted(_CHIPS), required=True, help='What to compile for.')
    parser.add_argument('--workdir', type=Path, required=True, help='Folder for the results.')
    parser.add_argument('--networks', default=','.join(_NETWORKS), help='Some of them, separated by commas.')
    options = parser.parse_args(arguments)
    _as_if_there()
    path, networks = options.workdir / 'chips.json', options.networks.split(',')
    programs = read_json(path)['programs'] if path.exists() else []
    programs = [p for p in programs if (p['platform'], p['network']) not in {(options.platform, n) for n in networks}]
    place = NamedSharding(Mesh(np.array(_devices(options.platform)[:1]), ('chip',)), PartitionSpec())
    made_by = {'command': command.provenance('chips')['command'], 'jax': jax.__version__}
    for name in networks:
        for executor, run, arguments_of in _executors(name, place):
            programs.append(
                {
                    'platform': options.platform,
                    'network': name,
                    'executor': executor,
                    **compiled(run, arguments_of, options.platform),
                    **made_by,
                }
            )
            print(programs[-1], flush=True)
            programs.sort(key=lambda program: (program['platform'] != 'tpu', _NETWORKS.index(program['network'])))
            record = {'programs': programs}
            write_json(path, record)
            write_text(options.workdir / 'chips.md', page(record))


def _as_if_there() -> None:
    """Tells the libraries of chips what to be: they would look for one, and wait for a metadata server."""
    os.environ.update(
        {
            'TPU_SKIP_MDS_QUERY': '1',
            'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
            'TPU_WORKER_HOSTNAMES': 'localhost',
            'JAX_SKIP_CUDA_CONSTRAINTS_CHECK': '1',
        }
    )
    jax.config.update('jax_platforms', 'cpu')  # programs are only compiled for the chip


def _devices(platform: str) -> Sequence[Any]:
    if platform == 'tpu':
        return topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2').devices
    options = {'topology': '1x1x1', 'target_config': _H100}
    return topologies.get_topology_desc(platform='cuda', topology_name='', **options).devices


def _executors(name: str, place: NamedSharding) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Yields executors with the shapes of their arguments, for the network in the forms that suit such a chip."""
    model = bj.models.create(name)
    exits = count_exits(model, image_specs(model.image_shape))

    def spec(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *model.image_shape)))
    variables = jax.tree.map(lambda leaf: spec(leaf.shape, leaf.dtype), shapes)
    image, images = spec(model.image_shape), spec((_BATCH, *model.image_shape))
    thresholds = spec((exits - 1,))
    inference = bj.inference
    yield 'without branches', jax.jit(bj.models.without_branches(model).apply), (variables, images)
    yield 'dense', inference.dense(model), (variables, images, thresholds)
    yield 'staged', inference.staged(model), (variables, image, thresholds)
    yield 'sequential', inference.sequential(model), (variables, images, thresholds)
    yield 'compacted', inference.compacted(model, chunk_size=_CHUNK, on_host=False), (variables, images, thresholds)


def compiled(run: Any, arguments: tuple[Any, ...], platform: str) -> dict[str, Any]:
    """Compiles a program and counts what is in it."""
    start = time.perf_counter()
    traced = jax.jit(lambda *given: run(*given)).trace(*arguments)
    program = traced.lower(lowering_platforms=(platform,)).compile(_OPTIONS.get(platform))
    return {
        **counts(program.as_text()),
        'temporary_bytes': program.memory_analysis().temp_size_in_bytes,
        'compile_s': time.perf_counter() - start,
    }


def counts(text: str) -> dict[str, Any]:
    """Counts what a compiled program holds, bodies of its loops and branches included.

    Args:
        text: in HLO.
    """
    calls = collections.Counter(re.findall(r' custom-call\(.*?custom_call_target="([^"]+)"', text))

    def count(*operations: str) -> int:
        return sum(len(re.findall(rf' {operation}\(', text)) for operation in operations)

    return {
        'conditionals': count('conditional'),
        'loops': count('while'),
        'fusions': count('fusion'),
        'copies': count('copy', 'copy-start'),
        'custom_calls': dict(calls),
        'host_transfers': count('infeed', 'outfeed', 'send', 'recv')
        + sum(number for target, number in calls.items() if _HOST.search(target)),
    }


_COLUMNS = {
    'chip': '{chip}',
    'network': '{network}',
    'executor': '{executor}',
    'conditionals': '{conditionals}',
    'loops': '{loops}',
    'fusions': '{fusions}',
    'copies': '{copies}',
    'custom calls': '{calls}',
    'host transfers': '{host_transfers}',
    'temporary MB': '{mb:.2f}',
}


def page(record: dict[str, Any]) -> str:
    """Returns the Markdown page of all programs found so far."""
    rows = [
        {
            **program,
            'chip': _CHIPS[program['platform']],
            'calls': ', '.join(f'{number} {target}' for target, number in program['custom_calls'].items()) or '0',
            'mb': program['temporary_bytes'] / 1e6,
        }
        for program in record['programs']
    ]
    return '\n\n'.join(
        [
            '# What compilers for other chips make of the executors',
            '\n'.join(
                dict.fromkeys(f'- `{program["command"]}`, jax {program["jax"]}' for program in record['programs'])
            ),
            f'Compiled, not run: there is no such chip here. Batches of {_BATCH}, chunks of {_CHUNK} in `compacted` '
            'without a host; `staged` takes one image. Conditionals that were turned into selects would be missing '
            'from their column; counts are of the whole program, bodies of loops and branches included. On the H100 '
            'matrix products are left to cuBLAS, since without the chip the tiles of fused ones cannot be tried; that '
            'the host reads there what a conditional or a loop decides by is no operation of the program, and not '
            'counted.',
            table(_COLUMNS, rows) + '\n',
        ]
    )


if __name__ == '__main__':
    main()
