"""The contenders: functions that prepare a runtime for a job, each in a process of its own.

Packages are imported where they are used: a contender whose package is missing fails, and the others run. Each
runtime gets what its users would give it: BatchNorm folded, weights frozen, images laid out as it likes them best.
"""

import functools
import io
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.peers.job import Job, Ready, fastest


def planned(job: Job, *, exits: bool = True, checkout: str = '', **options: Any) -> Ready:
    """Runs what `branchy_jax.inference.plan` chooses.

    Args:
        job: what is to be done.
        exits: ``False`` for the network without exits: what the runtime is worth without them.
        checkout: folder of another checkout of this repository, whose `branchy_jax` plans.
        **options: of the plan, such as its engine.
    """
    if checkout:
        sys.path.insert(0, checkout)  # this process has not imported branchy_jax yet
    import jax
    import jax.numpy as jnp

    import branchy_jax as bj

    jax.config.update('jax_cpu_enable_async_dispatch', job.cores > 1)  # as `run.timing.keep_to_one_core` does
    model, variables = bj.models.create(job.network), jax.tree.map(jnp.asarray, job.variables)
    model = model if exits else bj.models.without_branches(model)
    policy = np.array(job.thresholds if exits else (), np.float32)
    plan = bj.inference.plan(model, variables, job.images, policy, batch_size=job.batch, **options)

    def answer(images: np.ndarray) -> tuple[np.ndarray, Any]:
        prediction = plan(images, as_numpy=True)
        return prediction.label, prediction.exit_index if exits else None

    return Ready(answer, job.batches, str(plan.executor))


def in_torch(job: Job, *, exits: bool = True, compiled: bool = False) -> Ready:
    """Runs PyTorch, in the faster layout of its memory.

    Args:
        job: what is to be done.
        exits: whether each stage runs on the rows that a mask leaves; ``False`` for the network without exits.
        compiled: by `torch.compile`, with exits each stage and each head; or operation by operation.
    """
    import torch

    from experiments.peers import torch_networks

    torch.set_num_threads(job.cores)

    def ready(channels_last: bool) -> Ready:
        network = torch_networks.create(job.network, job.variables)
        network.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        whole = network.labels()
        if compiled and exits:
            for parts in (network.stages, network.exits):
                for n, part in enumerate(parts):
                    parts[n] = _compiled(part)
        elif compiled:
            whole = _compiled(whole)

        def answer(images: np.ndarray) -> tuple[np.ndarray, Any]:
            tensor = torch.from_numpy(images)
            tensor = tensor.permute(0, 3, 1, 2) if channels_last else tensor
            if not exits:
                return whole(tensor).numpy(), None
            labels, left = torch_networks.with_exits(network, tensor, job.thresholds, channels_last=channels_last)
            return labels.numpy(), left

        batches = job.batches if channels_last else job.channels_first
        return Ready(answer, batches, within=torch.inference_mode)

    return fastest({'channels first': ready(False), 'channels last': ready(True)})


def _compiled(module: Any) -> Any:
    """Compiles a module for the shapes of its inputs, or fails: it never falls back to single operations."""
    import torch
    import torch._dynamo.config as settings

    settings.recompile_limit = 64  # every stage and head in either layout is an entry of one cache, 8 by default
    return torch.compile(module, fullgraph=True, dynamic=False, options={'freezing': True})


def in_onnxruntime(job: Job) -> Ready:
    """Runs the network without exits in ONNX Runtime, with its own optimisations."""
    session = session_of(_exported(job), job)
    return Ready(lambda images: (session.run(None, {'image': images})[0], None), job.channels_first)


def session_of(content: bytes, job: Job) -> Any:
    """Opens a file in ONNX Runtime on the cores of a job."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = job.cores, 1
    return onnxruntime.InferenceSession(content, options, providers=['CPUExecutionProvider'])


def in_openvino(job: Job) -> Ready:
    """Runs the network without exits in OpenVINO, with its settings for single calls."""
    import openvino

    core, settings = openvino.Core(), {'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_NUM_THREADS': job.cores}
    network = core.compile_model(core.read_model(_exported(job)), 'CPU', settings)
    return Ready(lambda images: (network(images)[0], None), job.channels_first)


def _exported(job: Job) -> bytes:
    """Returns the ONNX file that PyTorch exports of the network without exits, for batches of the job's size."""
    import torch

    from experiments.peers import torch_networks

    network, content = torch_networks.create(job.network, job.variables).labels(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the newer exporter needs one more package, and writes the same nodes
        example = (torch.from_numpy(job.channels_first[0]),)
        torch.onnx.export(network, example, content, dynamo=False, input_names=['image'])
    return content.getvalue()


CONTENDERS: dict[str, Callable[[Job], Ready]] = {
    'planned': planned,
    'planned, bare': functools.partial(planned, exits=False),
    'planned, XLA alone': functools.partial(planned, engine='xla'),
    'PyTorch': in_torch,
    'PyTorch, bare': functools.partial(in_torch, exits=False),
    'torch.compile': functools.partial(in_torch, compiled=True),
    'torch.compile, bare': functools.partial(in_torch, compiled=True, exits=False),
    'ONNX Runtime, bare': in_onnxruntime,
    'OpenVINO, bare': in_openvino,
}
"""By the names that tables call them, bare those without exits; the first is compared with each of the others."""
