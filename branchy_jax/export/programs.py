"""The programs that a network is exported as: flat functions of arrays, with names for arguments and results."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax import lax
from jax.extend.mlir import ir
from jax.interpreters import mlir

from branchy_jax import calling, program
from branchy_jax.criteria import Criterion
from branchy_jax.inference.onnx_program import ANSWER
from branchy_jax.inference.optimize import optimize
from branchy_jax.inference.steps import arrays_of
from branchy_jax.jaxprs import variables_of
from branchy_jax.types import Array, ExitPolicy, Variables

PLATFORMS = ('cpu', 'cuda', 'tpu')
"""The platforms that every program is lowered for, in one module."""

_MOST_EMBEDDED_BYTES = 2**24
_MORE_THAN_STABLEHLO = ('stablehlo.custom_call', 'stablehlo.infeed', 'stablehlo.outfeed', 'stablehlo.send')

Weights = dict[str, Array]
"""Arrays by name, as stored beside the programs; empty if they are constants of the programs."""

Specs = dict[str, jax.ShapeDtypeStruct]
"""Shapes and dtypes by name."""


@dataclasses.dataclass(frozen=True)
class Program:
    """One exported function.

    Attributes:
        name: ``'staged'``, ``'batch'``, ``'stage 0'``, ``'exit 0'``, ….
        function: ``(weights, *inputs) → outputs``, a tuple of arrays.
        portable: the same in forms that suit every platform.
        weights: the weights that the function reads.
        inputs: shapes and dtypes by name; with a symbolic first axis the program takes any number of images.
        outputs: the names of the results.
        details: more entries of the manifest.
    """

    name: str
    function: Callable[..., tuple[Array, ...]]
    portable: Callable[..., tuple[Array, ...]]
    weights: Weights
    inputs: Specs
    outputs: tuple[str, ...]
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Network:
    """A network rewritten for export.

    Attributes:
        inputs: shapes and dtypes of one set of inputs, ``[1, …]``.
        criterion: of the policy.
        portable: the network in forms that suit every platform, and its variables ``{'params': {name: array}}``.
        on_cpu: the network in the forms that a CPU runs fastest, and its variables; ``None`` if ``portable`` serves.
        stages: of ``portable``.
        weights: all weights that lie beside the programs; empty if they are constants of the programs.
    """

    inputs: Any
    criterion: Criterion
    portable: tuple[Any, Variables]
    on_cpu: tuple[Any, Variables] | None
    stages: program.Stages
    weights: Weights

    def whole(self, name: str, build: Callable[..., Any], images: dict[str, Any], **details: Any) -> Program:
        """Returns the program of an executor; its function contains the form for the platform that will compile it.

        Args:
            name: of the program.
            build: returns the executor of a model.
            images: shapes and dtypes of its inputs, under the name of the input of the program.
            **details: more entries of the manifest.
        """
        structure = jax.tree.structure(self.inputs)

        def run(form: tuple[Any, Variables], *inputs: Array) -> tuple[Array, ...]:
            (model, variables), policy = form, ExitPolicy(self.criterion, inputs[-1])
            return arrays_of(build(model).program(variables, jax.tree.unflatten(structure, inputs[:-1]), policy))

        def portable(weights: Weights, *inputs: Array) -> tuple[Array, ...]:
            return run((self.portable[0], self._variables(weights)), *inputs)

        def function(weights: Weights, *inputs: Array) -> tuple[Array, ...]:
            if self.on_cpu is None:
                return portable(weights, *inputs)
            on_cpu, elsewhere = functools.partial(run, self.on_cpu), functools.partial(portable, weights)
            return lax.platform_dependent(*inputs, cpu=on_cpu, default=elsewhere)

        thresholds = jax.ShapeDtypeStruct((self.stages.num_exits - 1,), jnp.float32)
        inputs = _named({**images, 'thresholds': thresholds})
        return Program(name, function, portable, self.weights, inputs, ANSWER, details)

    def _variables(self, weights: Weights) -> Variables:
        """Returns the variables of the portable form. Of weights that a program does not read, shapes suffice."""
        return {'params': {**calling.specs(self.weights), **weights}} if self.weights else self.portable[1]

    def parts(self) -> tuple[list[Program], list[dict[str, Any]]]:
        """Returns every stage and head alone, for any number of images, so that they can run on different machines.

        No two arrays have one name: a part that runs in another order lacks an input.

        Returns:
            The programs; and for the inputs and each early exit, the arrays that later parts receive and their bytes
            per image.

        Raises:
            ValueError: a network that runs at the batch size of the example alone.
        """
        hidden: dict[str, Any] = {'image': calling.with_batch(self.inputs, program.BATCH)}
        carry: dict[str, Any] = {}
        programs, cuts = [], [_cut_after('input', hidden)]
        for n in range(self.stages.num_exits):
            run_stage, run_exit = functools.partial(self._run_stage, n), functools.partial(self._run_exit, n)
            stage, hidden = self._part(f'stage {n}', run_stage, hidden)
            head, answer = self._part(f'exit {n}', run_exit, {**hidden, **carry})
            carry = {f'carry_{n}': answer[f'carry_{n}']}
            programs += [stage, head]
            cuts.append(_cut_after(head.name, {**hidden, **carry}))
        return programs, cuts[:-1]  # nothing follows the last exit

    def _part(self, name: str, run: Callable[..., Any], given: dict[str, Any]) -> tuple[Program, Any]:
        """Returns the program of a stage or head with the weights that it reads, and the shapes of its results."""
        structure = jax.tree.structure(tuple(given.values()))

        def function(weights: Weights, *leaves: Array) -> dict[str, Any]:
            return run(self._variables(weights), *jax.tree.unflatten(structure, leaves))

        def flat(weights: Weights, *leaves: Array) -> tuple[Array, ...]:
            return tuple(jax.tree.leaves(function(weights, *leaves)))

        inputs = _named(given)
        traced, results = jax.make_jaxpr(function, return_shape=True)(self.weights, *inputs.values())
        read = {v for equation in traced.eqns for v in variables_of(equation.invars)}
        names = zip(sorted(self.weights), traced.jaxpr.invars, strict=False)
        own = {key: self.weights[key] for key, v in names if v in read}
        return Program(name, flat, flat, own, inputs, tuple(_named(results))), results

    def _run_stage(self, n: int, variables: Variables, hidden: Any) -> dict[str, Any]:
        with jax.named_scope(f'stage_{n}'):
            return {f'hidden_{n}': self.stages.run_stage(n, variables, hidden)}

    def _run_exit(self, n: int, variables: Variables, hidden: Any, carry: Any = None) -> dict[str, Any]:
        with jax.named_scope(f'exit_{n}'):
            logits = self.stages.run_exit(n, variables, hidden)
        with jax.named_scope(f'criterion_{n}'):
            logits, uncertainty, carry = self.criterion(logits, carry, n)
            label = self.criterion.decide(logits)
        return {'label': label, 'logits': logits, 'uncertainty': uncertainty, f'carry_{n}': carry}


def rewrite(model: Any, variables: Variables, criterion: Criterion, inputs: Any, platforms: Sequence[str]) -> Network:
    """Rewrites a network for export, exactly up to rounding.

    Weights of up to 16 MiB become constants of the programs. A program can then hold two forms of the network, those
    that `branchy_jax.inference.optimize` would choose: one for CPUs and one for every other platform.

    Args:
        model: a network with N exits.
        variables: trained.
        criterion: of the policy.
        inputs: an example, or its shapes.
        platforms: some of `PLATFORMS`.
    """
    inputs = calling.with_batch(inputs, 1)
    portable = optimize(model, variables, inputs=inputs, banded=False)
    stages = program.stages(*portable, inputs)
    weights, on_cpu = portable[1]['params'], None
    if sum(leaf.nbytes for leaf in weights.values()) <= _MOST_EMBEDDED_BYTES:
        weights = {}
        if 'cpu' in platforms:
            on_cpu = optimize(model, variables, inputs=inputs, banded=True)
    return Network(inputs, criterion, portable, on_cpu, stages, weights)


def plain_text(part: Program) -> str | None:
    """Lowers a program for one platform and prints it, without source locations and without attributes of JAX.

    The module is ``@network``, its function ``@main``, which takes the weights in the order of their names, then the
    inputs. A program for any number of images becomes one for a single image: other compilers need fixed shapes.

    Any compiler may read the text, so convolutions are not banded products.

    Returns:
        The text; ``None`` if the program needs more than StableHLO, such as a function of its process.
    """
    lower = jax.export.export(jax.jit(part.portable, keep_unused=True), platforms=['cpu'])
    sizes = [[size if isinstance(size, int) else 1 for size in spec.shape] for spec in part.inputs.values()]
    one = [jax.ShapeDtypeStruct(shape, spec.dtype) for shape, spec in zip(sizes, part.inputs.values(), strict=True)]
    exported = lower(calling.specs(part.weights), *one)
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


def _named(trees: dict[str, Any]) -> Specs:
    """Names the leaves of pytrees; several leaves of one are numbered."""
    named = {}
    for name, tree in trees.items():
        leaves = jax.tree.leaves(tree)
        named.update({name if len(leaves) == 1 else f'{name}_{n + 1}': leaf for n, leaf in enumerate(leaves)})
    return named


def _cut_after(place: str, handed_on: dict[str, Any]) -> dict[str, Any]:
    arrays = _named(handed_on)
    sizes = [math.prod(spec.shape[1:]) * spec.dtype.itemsize for spec in arrays.values()]
    return {'after': place, 'arrays': list(arrays), 'bytes_per_image': sum(sizes)}
