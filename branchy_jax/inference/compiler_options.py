"""Options that XLA compiles executors with, and whether they help here."""

import functools
import os

import jax

COMMAND_BUFFERS = {
    'xla_gpu_enable_command_buffer': 'FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,WHILE,DYNAMIC_SLICE_FUSION',
    'xla_gpu_graph_min_graph_size': 1,
}
"""Compiler options that record whole programs, conditionals included, as CUDA graphs, so that the GPU need not wait for
the host at every exit. They may help or hurt: measure."""

ALL_CORES = {'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_DOT'}
"""Compiler options under which XLA shares every convolution and product among all cores of a CPU. By default it hands
convolutions of more than 16 channels or features to YNNPACK, which keeps each on one core, where it is a tenth faster;
these leave them to Eigen. Worth a try where there are several cores; `branchy_jax.inference.plan` tries them, and its
table says what they gave. Answers are the same but for rounding."""

ONE_CORE = {
    'xla_cpu_experimental_ynn_fusion_type': (
        'LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION,LIBRARY_FUSION_TYPE_ELTWISE'
    )
}
"""Compiler options under which XLA hands operations on single elements to YNNPACK, too, together with the convolutions
before them. On one core they make a residual network 1.1 times faster, and one with many divisions and roots slower:
measure, as `branchy_jax.inference.plan` does. Such programs do not use XLA's pool of threads, so that several of them
run at the same time without waiting for each other: the workers of a plan run them."""

BY_NAME = {'': None, 'all cores': ALL_CORES, 'one core': ONE_CORE}
"""Compiler options for a CPU by what plans and tables call them; ``''`` is XLA's own choice."""


def num_cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def usable_options() -> list[str]:
    """Returns the names of the options that may help: on a CPU, those that jaxlib knows, `ALL_CORES` on several."""
    names = ['one core', *(['all cores'] if num_cores() > 1 else [])]
    return [name for name in names if jax.default_backend() == 'cpu' and _are_known(name)]


@functools.cache
def _are_known(name: str) -> bool:
    try:
        jax.jit(lambda x: x, compiler_options=BY_NAME[name]).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
