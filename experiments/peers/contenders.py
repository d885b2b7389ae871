"""The contenders: functions that prepare a runtime for a job, each in a process of its own.

Packages are imported where they are used: a contender whose package is missing fails, and the others run. PyTorch
and ONNX Runtime get what their users would give them: BatchNorm folded, weights frozen, images laid out as they like
them best, which a short trial finds.
"""

import functools
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.peers.job import Answer, Job, Ready, fastest


def planned(job: Job, *, exits: bool = True) -> Ready:
    """Runs what `branchy_jax.inference.plan` chooses, called with arrays of NumPy's or of jax's.

    Args:
        job: what is to be done.
        exits: ``False`` for the network without exits: what the runtime is worth without them.
    """
    import jax
    import jax.numpy as jnp

    import branchy_jax as bj
    from experiments.run.timing import keep_to_one_core

    if job.cores == 1:
        keep_to_one_core()
    model, variables = bj.models.create(job.network), jax.tree.map(jnp.asarray, job.variables)
    model = model if exits else bj.models.without_branches(model)
    policy = np.array(job.thresholds if exits else (), np.float32)
    plan = bj.inference.plan(model, variables, job.images, policy, batch_size=job.batch)

    def answer(images: np.ndarray, convert: Callable[[np.ndarray], Any]) -> tuple[np.ndarray, Any]:
        found = plan(convert(images))
        return np.asarray(found.label), found.exit_index if exits else None

    conversions = {'from NumPy': np.asarray, 'from jax': jnp.asarray}
    return fastest(
        {
            name: Ready(functools.partial(answer, convert=convert), job.batches, plan.executor)
            for name, convert in conversions.items()
        }
    )


def torch_eager(job: Job) -> Ready:
    """Runs PyTorch without exits, operation by operation."""
    return _in_either_layout(job, lambda network, _: _whole(network.labels()))


def torch_exits(job: Job) -> Ready:
    """Runs PyTorch operation by operation, each stage on the rows that a mask leaves."""
    return _in_either_layout(job, functools.partial(_masked, job))


def torch_compiled(job: Job) -> Ready:
    """Runs PyTorch without exits as `torch.compile` makes it."""
    return _in_either_layout(job, lambda network, _: _whole(_compiled(network.labels())))


def torch_compiled_exits(job: Job) -> Ready:
    """Runs PyTorch with exits by masks, each stage and each head compiled."""

    def prepare(network: Any, channels_last: bool) -> Answer:
        for parts in (network.stages, network.exits):
            for n, part in enumerate(parts):
                parts[n] = _compiled(part)
        return _masked(job, network, channels_last)

    return _in_either_layout(job, prepare)


def onnx_plain(job: Job) -> Ready:
    """Runs the file that PyTorch exports of the network without exits in ONNX Runtime, which folds what it can."""
    import torch

    from experiments.peers import torch_networks

    batches = [np.ascontiguousarray(images.transpose(0, 3, 1, 2)) for images in job.batches]
    network = torch_networks.create(job.network, job.variables).labels()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the newer exporter needs one more package, and writes the same nodes
        path = Path(folder) / 'plain.onnx'
        torch.onnx.export(network, (torch.from_numpy(batches[0]),), path, dynamo=False, input_names=['image'])
        session = _session(path, job.cores)
    return Ready(lambda images: (session.run(None, {'image': images})[0], None), batches)


def onnx_if(job: Job) -> Ready:
    """Runs the file of `branchy_jax.export.save_onnx`, whose conditionals skip later stages.

    Raises:
        ValueError: more than one image in a call.
    """
    if job.batch != 1:
        raise ValueError('the file takes one image')
    import branchy_jax as bj

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'exits.onnx'
        policy, inputs = np.array(job.thresholds, np.float32), job.images[:1]
        bj.export.save_onnx(path, bj.models.create(job.network), job.variables, policy, inputs=inputs)
        session = _session(path, job.cores)
    names = ['label', 'exit_index']
    return Ready(lambda images: tuple(session.run(names, {'image': images})), job.batches)


CONTENDERS: dict[str, Callable[[Job], Ready]] = {
    'planned here': planned,
    'planned here, bare': functools.partial(planned, exits=False),
    'PyTorch': torch_eager,
    'PyTorch, exits': torch_exits,
    'torch.compile': torch_compiled,
    'torch.compile, exits': torch_compiled_exits,
    'ONNX Runtime': onnx_plain,
    'ONNX Runtime, If': onnx_if,
}
"""By the names that tables call them; the first is compared with each of the others."""


def _in_either_layout(job: Job, prepare: Callable[[Any, bool], Callable[[Any], tuple[Any, Any]]]) -> Ready:
    """Returns a PyTorch network in the faster layout of its memory.

    Args:
        job: what is to be done.
        prepare: makes what answers a tensor of a network and whether its channels come last.
    """
    import torch

    from experiments.peers import torch_networks

    torch.set_num_threads(job.cores)

    def ready(channels_last: bool) -> Ready:
        network = torch_networks.create(job.network, job.variables)
        network.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        run = prepare(network, channels_last)

        def answer(images: np.ndarray) -> tuple[np.ndarray, Any]:
            tensor = torch.from_numpy(images)
            labels, exits = run(tensor.permute(0, 3, 1, 2) if channels_last else tensor)
            return labels.numpy(), exits

        batches = job.batches
        if not channels_last:
            batches = [np.ascontiguousarray(images.transpose(0, 3, 1, 2)) for images in batches]
        return Ready(answer, batches, within=torch.inference_mode)

    return fastest({'channels first': ready(False), 'channels last': ready(True)})


def _whole(network: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, Any]]:
    return lambda images: (network(images), None)


def _masked(job: Job, network: Any, channels_last: bool) -> Callable[[Any], tuple[Any, Any]]:
    from experiments.peers import torch_networks

    return functools.partial(torch_networks.with_exits, network, thresholds=job.thresholds, channels_last=channels_last)


def _compiled(module: Any) -> Any:
    """Compiles a module for the shapes it sees, or fails: it never runs operation by operation in silence."""
    import torch
    import torch._dynamo.config as settings

    settings.recompile_limit = 64  # every stage and head in either layout is an entry of one cache, 8 by default
    return torch.compile(module, fullgraph=True, dynamic=False, options={'freezing': True})


def _session(path: Path, cores: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = cores, 1
    return onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
