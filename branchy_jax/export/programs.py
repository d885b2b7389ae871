"""The programs that a network is exported as: flat functions of arrays, with the names of what goes in and out."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from flax import traverse_util
from jax import lax
from jax.extend.mlir import ir
from jax.interpreters import mlir

from branchy_jax.criteria.criterion import Criterion
from branchy_jax.inference.compacted import compacted
from branchy_jax.inference.rewriting.forms import Forms
from branchy_jax.inference.rewriting.optimize import default_forms, optimize
from branchy_jax.inference.staged import staged
from branchy_jax.inference.steps import Executor
from branchy_jax.models.branchy import BranchyNet, run_segment
from branchy_jax.types import Array, ExitPolicy, ExitPrediction, Variables, input_specs

PLATFORMS = ('cpu', 'cuda', 'tpu')
"""What programs are lowered for, all in one module."""

_MOST_EMBEDDED_BYTES = 2**24
_ANSWER = ('label', 'exit_index', 'logits', 'uncertainty')
_MORE_THAN_STABLEHLO = ('stablehlo.custom_call', 'stablehlo.infeed', 'stablehlo.outfeed', 'stablehlo.send')

Weights = dict[str, Array]
"""Name to array, as stored beside the programs; empty where they are constants of the programs."""


@dataclasses.dataclass(frozen=True)
class Program:
    """One exported function.

    Attributes:
        name: ``'staged'``, ``'batch'``, ``'stage 1'``, ``'exit 1'``, ….
        function: ``(weights, *inputs) → outputs``, a tuple of arrays.
        weights: what it takes of them.
        inputs: name to shape and dtype; a symbolic first axis takes any number of images.
        outputs: the names of what it returns.
        details: that the manifest tells besides.
    """

    name: str
    function: Callable[..., tuple[Array, ...]]
    weights: Weights
    inputs: dict[str, jax.ShapeDtypeStruct]
    outputs: tuple[str, ...]
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """A network rewritten for export.

    Attributes:
        portable: the network in forms that suit every platform, and its variables, one entry per stage and head.
        on_cpu: the same in the forms that a CPU runs fastest, weights embedded; ``None`` where weights lie beside.
        embedded: whether weights are constants of the programs.
        platforms: that programs are lowered for.
    """

    portable: tuple[BranchyNet, Variables]
    on_cpu: tuple[BranchyNet, Variables] | None
    embedded: bool
    platforms: tuple[str, ...]

    @property
    def weights(self) -> Weights:
        """All weights that lie beside the programs."""
        return {} if self.embedded else _flat(self.portable[1])


def rewrite(model: BranchyNet, variables: Variables, platforms: Sequence[str]) -> Rewritten:
    """Rewrites a network for export, exactly up to rounding.

    Weights of up to 16 MiB become constants of the programs. Then a module can hold two forms of the network, one for
    CPUs and one for everything else, as `branchy_jax.inference.optimize` would choose.

    Args:
        model: with an ``image_shape``.
        variables: trained.
        platforms: some of `PLATFORMS`.
    """
    portable = optimize(model, variables, forms=Forms(), embed=False)
    embedded = sum(leaf.nbytes for leaf in jax.tree.leaves(portable[1])) <= _MOST_EMBEDDED_BYTES
    on_cpu = None
    if embedded and 'cpu' in platforms:
        on_cpu = optimize(model, variables, forms=default_forms(platform='cpu'), embed=True)
    return Rewritten(portable, on_cpu, embedded, tuple(platforms))


def staged_program(network: Rewritten, criterion: Criterion) -> Program:
    """One image, conditionals inside: what `branchy_jax.inference.staged` runs."""
    model = network.portable[0]
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), input_specs(model.image_shape, 1))
    return Program(
        name='staged',
        function=_whole(network, criterion, staged),
        weights=network.weights,
        inputs={**_named('image', one), 'thresholds': _floats((model.num_exits - 1,))},
        outputs=_ANSWER,
        details={'conditionals': model.num_exits - 1},
    )


def batch_program(network: Rewritten, criterion: Criterion, batch_size: int, chunk_sizes: Sequence[int]) -> Program:
    """A batch of fixed size, survivors compacted: what `branchy_jax.inference.compacted` runs without a host."""
    model, chunk_sizes = network.portable[0], tuple(chunk_sizes)
    build = functools.partial(compacted, chunk_size=chunk_sizes, on_host=False)
    return Program(
        name='batch',
        function=_whole(network, criterion, build),
        weights=network.weights,
        inputs={
            **_named('images', input_specs(model.image_shape, batch_size)),
            'thresholds': _floats((model.num_exits - 1,)),
        },
        outputs=_ANSWER,
        details={'batch_size': batch_size, 'chunk_sizes': list(chunk_sizes)},
    )


def part_programs(network: Rewritten, criterion: Criterion) -> tuple[list[Program], list[dict[str, Any]]]:
    """Every stage and every head alone, for any number of images, so that they can run in different places.

    Returns:
        The programs, and for each place between them the bytes of one image: what a cut there would send.
    """
    model, variables = network.portable
    (count,) = jax.export.symbolic_shape('batch')
    hidden, carry = input_specs(model.image_shape, count), ()
    programs, cuts = [], [{'after': 'input', 'bytes_per_image': _bytes_per_image(hidden)}]
    for n in range(model.num_exits):
        run, head = functools.partial(run_segment, model, 'stage', n), functools.partial(_run_exit, model, criterion, n)
        result = jax.eval_shape(run, variables, hidden)
        programs.append(_part(network, f'stage {n + 1}', run, {'hidden': hidden}, tuple(_named('hidden', result))))
        hidden, before = result, carry
        *_, carry = jax.eval_shape(head, variables, hidden, before)
        outputs = (*(name for name in _ANSWER if name != 'exit_index'), *_named('carry', carry))
        programs.append(_part(network, f'exit {n + 1}', head, {'hidden': hidden, 'carry': before}, outputs))
        if n + 1 < model.num_exits:
            cuts.append({'after': f'exit {n + 1}', 'bytes_per_image': _bytes_per_image((hidden, carry))})
    return programs, cuts


def plain_text(program: Program) -> str | None:
    """Lowers a program for one platform and prints it, without source locations and notes that only JAX reads.

    The module is ``@network``, its function ``@main``. That takes the weights in the order of their names, then the
    inputs. A program for any number of images becomes one for a single image: other compilers want fixed shapes.

    Args:
        program: in forms that suit every platform; which one it will run on is up to who compiles the text.

    Returns:
        The text; ``None`` if the program asks for more than StableHLO, such as a function of its process.
    """
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), program.weights)
    lower = jax.export.export(jax.jit(program.function, keep_unused=True), platforms=['cpu'])
    exported = lower(weights, *map(_of_one_image, program.inputs.values()))
    with mlir.make_ir_context():
        module = ir.Module.parse(exported.mlir_module())
        notes = module.operation.attributes
        for name in [name for name in notes if '.' in name]:
            del notes[name]
        notes['sym_name'] = ir.StringAttr.get('network')
        for function in module.body.operations:
            for name in {'arg_attrs', 'res_attrs'} & set(function.attributes):
                del function.attributes[name]
        text = str(module.operation.get_asm(enable_debug_info=False))
    return None if any(operation in text for operation in _MORE_THAN_STABLEHLO) else text


def _part(
    network: Rewritten, name: str, run: Callable[..., Any], example: dict[str, Any], outputs: tuple[str, ...]
) -> Program:
    params, place = network.portable[1]['params'], name.replace(' ', '')
    own = {'params': {place: params[place]} if place in params else {}}
    structure = jax.tree.structure(tuple(example.values()))
    inputs = {part: spec for argument, tree in example.items() for part, spec in _named(argument, tree).items()}

    def function(weights: Weights, *leaves: Array) -> tuple[Array, ...]:
        used = own if network.embedded else _nested(weights)
        return tuple(jax.tree.leaves(run(used, *jax.tree.unflatten(structure, leaves))))

    return Program(name, function, {} if network.embedded else _flat(own), inputs, outputs)


def _whole(
    network: Rewritten, criterion: Criterion, build: Callable[[BranchyNet], Executor]
) -> Callable[..., tuple[Array, ...]]:
    """Returns the program of an executor, in the form that suits the platform it will be compiled for."""
    structure = jax.tree.structure(input_specs(network.portable[0].image_shape, 1))

    def run(form: tuple[BranchyNet, Variables], *inputs: Array) -> tuple[Array, ...]:
        images, thresholds = jax.tree.unflatten(structure, inputs[:-1]), inputs[-1]
        answer: ExitPrediction = build(form[0])(form[1], images, ExitPolicy(criterion, thresholds))
        return tuple(getattr(answer, name) for name in _ANSWER)

    def function(weights: Weights, *inputs: Array) -> tuple[Array, ...]:
        model, variables = network.portable
        anywhere = functools.partial(run, (model, variables if network.embedded else _nested(weights)))
        if network.on_cpu is None:
            return anywhere(*inputs)
        on_cpu = functools.partial(run, network.on_cpu)
        if network.platforms == ('cpu',):
            return on_cpu(*inputs)
        return lax.platform_dependent(*inputs, cpu=on_cpu, default=anywhere)

    return function


def _run_exit(model: BranchyNet, criterion: Criterion, n: int, variables: Variables, hidden: Any, carry: Any) -> Any:
    logits = run_segment(model, 'exit', n, variables, hidden)
    answer, uncertainty, carry = criterion.update(logits, criterion.init(logits) if n == 0 else carry, n)
    return criterion.decide(answer), answer, uncertainty, carry


def _of_one_image(spec: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    shape = tuple(size if isinstance(size, int) else 1 for size in spec.shape)
    return jax.ShapeDtypeStruct(shape, spec.dtype)


def _named(name: str, tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    leaves = jax.tree.leaves(tree)
    return {name if len(leaves) == 1 else f'{name} {n + 1}': leaf for n, leaf in enumerate(leaves)}


def _bytes_per_image(tree: Any) -> int:
    return sum(math.prod(leaf.shape[1:]) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _floats(shape: tuple[Any, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _flat(variables: Variables) -> Weights:
    return traverse_util.flatten_dict(variables['params'], sep='/')


def _nested(weights: Weights) -> Variables:
    return {'params': traverse_util.unflatten_dict(weights, sep='/')}
