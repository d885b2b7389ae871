"""The stages and heads of a model, found in its traced program.

*Stage n* holds the equations that exit n **and** a later exit need and that no earlier stage computed; the last stage
holds all that the last logits need, so that the last head is empty. *Head n* holds the equations that logits n alone
need. A stage hands on the values that depend on the inputs and are read later. Values that depend on weights alone are
computed where they are read.
"""

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from branchy_jax import calling
from branchy_jax.jaxprs import Program, Value, bind, count_macs, flatten, value_of, variables_of
from branchy_jax.rows import batch_axis, check_by_trial, check_rows, first_undecided
from branchy_jax.types import Array, StageCosts, Variables, num_rows

__all__ = ['stages']

BATCH = export.symbolic_shape('b')[0]
"""The symbolic batch size: a trace with it says where the batch lies in each value."""


class Reference:
    """A model as a static argument of `jax.jit`, compared by value and held weakly.

    JAX's cache of traces keeps static arguments. A weak reference lets the model be freed.
    """

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)

    def __call__(self) -> Any:
        """Returns the model."""
        return self._model()

    def __eq__(self, other: object) -> bool:
        ours, theirs = self(), other() if isinstance(other, Reference) else None
        return self is other or (ours is not None and (ours is theirs or bool(ours == theirs)))

    def __hash__(self) -> int:
        return hash(Reference)  # modules with list fields have no hash


jax.tree_util.register_static(Reference)


@jax.jit
def _logits(model: Any, variables: Variables, inputs: Any) -> tuple[Array, ...]:
    return calling.apply(model(), variables, inputs)


def trace(model: Any, variables: Variables, inputs: Any, *, derivatives: bool = False) -> Program:
    """Traces a model in evaluation mode; JAX caches the trace for equal models, shapes and dtypes.

    Args:
        model: see `branchy_jax.calling`.
        variables: arrays or their shapes.
        inputs: arrays or their shapes, of a numeric or symbolic batch size.
        derivatives: whether functions with a derivative of their own stay whole, which differentiation needs.

    Returns:
        The program over the leaves of variables, then of inputs; its outputs are the logits of every exit.
    """
    calling.check_model(model)
    with calling.explained_variables(variables):
        traced = _logits.trace(Reference(model), calling.specs(variables), calling.specs(inputs))
    return flatten(traced.jaxpr, derivatives=derivatives)


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
    """A program cut at its exits, which runs at the batch size that it was traced at.

    Attributes:
        program: the whole network.
        num_weights: how many of the program's inputs are leaves of the variables.
        exits: the exits asked.
        outputs: their logits.
        stages: for each exit asked, the numbers of the equations of its stage.
        heads: for each exit asked, those of its head.
        carried: for each stage, the values that it hands on.
        axes: for each of these, the axis that is the batch, and is moved to the front.
        weights: the leaves of the variables, to run with.
    """

    program: Program
    num_weights: int
    exits: tuple[int, ...]
    outputs: tuple[Value, ...]
    stages: tuple[tuple[int, ...], ...]
    heads: tuple[tuple[int, ...], ...]
    carried: tuple[tuple[Value, ...], ...]
    axes: tuple[tuple[int, ...], ...] = ()
    weights: Sequence[Array] = ()

    @property
    def num_exits(self) -> int:
        """N, of the model."""
        return len(self.program.outputs)

    def run_stage(self, n: int, hidden: Any) -> tuple[Array, ...]:
        """Runs the stage of the n-th exit asked on the inputs, or on what the stage before handed on."""
        env = self._run(self.stages[n], n - 1, hidden)
        return tuple(jnp.moveaxis(env[v], axis, 0) for v, axis in zip(self.carried[n], self.axes[n], strict=True))

    def run_exit(self, n: int, hidden: Any) -> Array:
        """Runs the head of the n-th exit asked on what its stage handed on."""
        return value_of(self.outputs[n], self._run(self.heads[n], n, hidden))

    def _run(self, numbers: Iterable[int], stage: int, hidden: Any) -> dict[Value, Any]:
        """Runs equations on what a stage handed on; on the inputs for stage −1."""
        env = {**self.program.consts, **dict(zip(self.program.inputs, self.weights, strict=False))}
        if stage < 0:
            env.update(zip(self.program.inputs[self.num_weights :], jax.tree.leaves(hidden), strict=True))
        else:
            for v, axis, value in zip(self.carried[stage], self.axes[stage], hidden, strict=True):
                env[v] = jnp.moveaxis(value, 0, axis)
        for number in numbers:
            equation = self.program.equations[number]
            outputs = bind(equation, [value_of(v, env) for v in equation.invars])
            env.update(zip(equation.outvars, outputs, strict=True))
        return env


def cut(program: Program, num_weights: int, exits: Sequence[int]) -> Cut:
    """Cuts a program whose outputs are the logits of every exit.

    Args:
        program: from `trace`.
        num_weights: how many of its inputs are leaves of the variables.
        exits: the exits asked, ascending.
    """
    equations, outputs = program.equations, tuple(program.outputs[n] for n in exits)
    depends = _dependent(program, num_weights)
    own = [needed(program, [output], within=depends) for output in outputs]
    done: set[int] = set()
    stages, heads = [], []
    for n, mine in enumerate(own):
        last = n == len(own) - 1
        later: set[int] = set().union(*own[n + 1 :])
        stages.append(mine - done if last else (mine - done) & later)
        heads.append(set() if last else mine - done - later)
        done |= mine - heads[-1]

    given = program.inputs[num_weights:]
    order = [*given, *(v for equation in equations for v in equation.outvars)]
    carried = []
    for n in range(len(own)):
        available = {*given, *(v for stage in stages[: n + 1] for number in stage for v in equations[number].outvars)}
        read = program.read_by(heads[n].union(*stages[n + 1 :], *heads[n + 1 :]), outputs[n:])
        carried.append(tuple(v for v in order if v in available & read))

    def with_weights(numbers: set[int], results: Sequence[Value]) -> tuple[int, ...]:
        return tuple(sorted(numbers | needed(program, program.read_by(numbers, results) - depends)))

    return Cut(
        program=program,
        num_weights=num_weights,
        exits=tuple(exits),
        outputs=outputs,
        stages=tuple(with_weights(numbers, ()) for numbers in stages),
        heads=tuple(with_weights(numbers, [output]) for numbers, output in zip(heads, outputs, strict=True)),
        carried=tuple(carried),
    )


def _dependent(program: Program, num_weights: int) -> set[Value]:
    """Returns the values that depend on the inputs, not on weights alone."""
    depends = set(program.inputs[num_weights:])
    for equation in program.equations:
        if any(v in depends for v in variables_of(equation.invars)):
            depends.update(equation.outvars)
    return depends


def needed(program: Program, wanted: Iterable[Value], within: set[Value] | None = None) -> set[int]:
    """Returns the numbers of the equations that values need; only through values ``within``, where given."""
    numbers: set[int] = set()
    values = set(variables_of(wanted))
    for number, equation in reversed(list(enumerate(program.equations))):
        if any(v in values and (within is None or v in within) for v in equation.outvars):
            numbers.add(number)
            values.update(variables_of(equation.invars))
    return numbers


@dataclasses.dataclass(frozen=True, eq=False)
class Stages:
    """The stages and heads of a model, at any batch size. In every array that a stage hands on the batch comes first.

    Attributes:
        num_exits: N, of the model.
        exits: the exits asked.
        fixed_because: why the stages run at the batch size of the example alone and hand on arrays as the program has
            them; '' where any batch size runs.
    """

    num_exits: int
    exits: tuple[int, ...]
    fixed_because: str
    _model: Any
    _variables: Any
    _inputs: Any
    _axes: tuple[tuple[int, ...], ...]

    def at(self, variables: Variables, size: Any, *, derivatives: bool = False) -> Cut:
        """Returns the stages at one batch size, with their variables; ``derivatives`` as in `trace`.

        Raises:
            ValueError: the model cannot be traced at any other size than the example's.
        """
        if self.fixed_because and size != num_rows(self._inputs):
            raise self.refusal()
        return self._at(variables, size, derivatives=derivatives)

    def _at(self, variables: Variables, size: Any, *, derivatives: bool = False) -> Cut:
        weights, inputs = jax.tree.leaves(variables), calling.with_batch(self._inputs, size)
        parts = cut(trace(self._model, variables, inputs, derivatives=derivatives), len(weights), self.exits)
        axes = self._axes or tuple((0,) * len(values) for values in parts.carried)
        return dataclasses.replace(parts, axes=axes, weights=weights)

    def run_stage(self, n: int, variables: Variables, hidden: Any) -> tuple[Array, ...]:
        """Runs the stage of the n-th exit asked on the inputs, or on what the stage before handed on."""
        return self.at(variables, self._size(n, hidden)).run_stage(n, hidden)

    def run_exit(self, n: int, variables: Variables, hidden: Any) -> Array:
        """Runs the head of the n-th exit asked. Returns logits ``[B, …, K]`` float32."""
        return self.at(variables, self._size(n + 1, hidden)).run_exit(n, hidden)

    @property
    def macs(self) -> StageCosts:
        """Multiply-accumulates of one input in the stage and the head of every exit asked."""
        parts = self._at(self._variables, 1)
        stages, heads = (
            np.array([count_macs(parts.program.equations[number] for number in numbers) for numbers in several])
            for several in (parts.stages, parts.heads)
        )
        return StageCosts(stages=stages, exits=heads)

    def refusal(self) -> ValueError:
        """Returns the error for an executor that gathers rows."""
        return ValueError(
            f'model: runs at the batch size of the example alone, since {self.fixed_because}; dense and staged run '
            'such a model, executors that gather rows and exports do not'
        )

    def _size(self, n: int, hidden: Any) -> Any:
        return num_rows(self._inputs if n > 0 and self.fixed_because else hidden)


def stages(model: Any, variables: Variables, inputs: Any, *, exits: Sequence[int] | None = None) -> Stages:
    """Finds the stages and heads of a model.

    Args:
        model: a Flax module that returns the logits of every exit, or an object with ``init`` and ``apply``.
        variables: of the model, arrays or their shapes.
        inputs: an example of any batch size, or `jax.ShapeDtypeStruct`: an array ``[B, …]``, a tuple or a dictionary.
        exits: the exits to ask, ascending, the last among them; all by default.

    Returns:
        `Stages`: ``.num_exits``, ``.run_stage(n, variables, hidden)``, ``.run_exit(n, variables, hidden)``, ``.macs``.

    Raises:
        ValueError: not a model, variables of another model, rows of a batch that influence one another (the message
            names the place), logits that do not lead with B, impossible ``exits``.

    Example:
        >>> import branchy_jax as bj
        >>> model, images = bj.models.create('b-lenet'), jnp.ones((2, 28, 28, 1))
        >>> variables = model.init(jax.random.key(0), images)
        >>> parts = stages(model, variables, images)
        >>> hidden = parts.run_stage(0, variables, images)
        >>> parts.num_exits, parts.run_exit(0, variables, hidden).shape
        (2, (2, 10))
    """
    num_rows(inputs)
    program, size, reason = _trace_at_any_size(model, variables, inputs)
    count = len(jax.tree.leaves(variables))
    num_exits = len(program.outputs)
    asked = tuple(range(num_exits)) if exits is None else calling.check_exits('exits', exits, num_exits)
    for n, aval in enumerate(output.aval for output in program.outputs):
        if aval.shape[0] != size:
            raise ValueError(
                f'model: exit {n} returns {aval.str_short()} for a batch of {size}; logits lead with B: move or '
                'reshape the axes to [B, …, K]'
            )
    parts = cut(program, count, asked)
    if not (reason and size == num_rows(inputs)):  # other axes may have that length
        # Values without elements hold no rows: `jnp.pad` cuts empty edges off the axes that it does not pad.
        dependent = {v for v in _dependent(program, count) if 0 not in v.aval.shape}
        check_rows(program, needed(program, parts.outputs, within=dependent), size)
    axes: tuple[tuple[int, ...], ...] = ()
    if not reason:
        try:
            axes = tuple(tuple(batch_axis(program, v, BATCH) for v in values) for values in parts.carried)
        except ValueError as error:
            reason = str(error)
    return Stages(num_exits, asked, reason, model, calling.specs(variables), calling.specs(inputs), axes)


def _trace_at_any_size(model: Any, variables: Variables, inputs: Any) -> tuple[Program, Any, str]:
    """Traces a model with a symbolic batch size, or at a number that divides the size of no other axis.

    Returns:
        The program, its batch size, and why that is a number; a model that runs at the size of the inputs alone is
        traced at that size.
    """
    try:
        return trace(model, variables, calling.with_batch(inputs, BATCH)), BATCH, ''
    except Exception as error:  # a model may raise anything where it asks for the number of rows
        reason = f'its trace with a symbolic batch size failed: {error}'
    program, size = trace(model, variables, inputs), max(1, num_rows(inputs))
    values = [*program.inputs, *(v for equation in program.equations for v in equation.outvars)]
    lengths = {length for v in values for length in v.aval.shape if length}
    multiple = next(n for n in itertools.count(2 * size, size) if all(length % n for length in lengths))
    try:
        return trace(model, variables, calling.with_batch(inputs, multiple)), multiple, reason
    except Exception:  # as above
        return program, size, reason


def check_rows_by_trial(model: Any, variables: Variables, inputs: Any, rows: Callable[[], Any] | None = None) -> None:
    """Refuses a model in which one row of a batch influences another, by trial if its program does not tell.

    Args:
        model: see `branchy_jax.calling`.
        variables: of the model; shapes alone stand for fresh variables.
        inputs: arrays or their shapes.
        rows: returns a few inputs to try; random ones by default.

    Raises:
        ValueError: the message names the place.
    """
    stages(model, variables, inputs)
    traced, size, reason = _trace_at_any_size(model, variables, inputs)
    place = first_undecided(traced, needed(traced, traced.outputs), size) or (reason and 'an unknown place')
    if not place or (reason and not _runs_at(model, variables, inputs, (1, 7))):
        return
    given = jax.tree.map(_drawn, calling.with_batch(inputs, 7)) if rows is None else rows()
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(variables)):
        fresh = jax.jit(lambda key: jax.tree.map(_moved, calling.init(model, key, given)))
        variables = fresh(jax.random.key(0))
    sizes = {v.aval.dtype.itemsize for equation in traced.equations for v in equation.outvars if _is_float(v.aval)}
    tolerance = 0.03 if 2 in sizes else 0.003  # of half precision, or of single
    with jax.default_matmul_precision('highest'):
        check_by_trial(lambda inputs: _logits(Reference(model), variables, inputs), given, place, tolerance)


def _runs_at(model: Any, variables: Variables, inputs: Any, sizes: Iterable[int]) -> bool:
    try:
        for size in sizes:
            trace(model, variables, calling.with_batch(inputs, size))
    except Exception:  # as in `_trace_at_any_size`
        return False
    return True


def _is_float(spec: Any) -> bool:
    return jnp.issubdtype(spec.dtype, jnp.floating)


def _drawn(spec: jax.ShapeDtypeStruct) -> Array:
    """Returns random rows, some of them small; zeros and ones where they are not floats."""
    values = jax.random.normal(jax.random.key(0), spec.shape)
    scales = jnp.expand_dims(jnp.array([1, 1, 0.3, 1, 0.1, 1, 1]), range(1, values.ndim))
    return (values * scales if _is_float(spec) else values > 0).astype(spec.dtype)


def _moved(leaf: Array) -> Array:
    """Returns a fresh variable a little off its start: many start at 0 and would hide what they do."""
    if not _is_float(leaf):
        return leaf
    return (leaf + 0.05 * jax.random.normal(jax.random.key(1), leaf.shape)).astype(leaf.dtype)


def leaves_read(model: Any, variables: Variables, inputs: Any, exits: Sequence[int]) -> frozenset[str]:
    """Returns the paths (`jax.tree_util.keystr`) of the leaves of ``variables`` that some exits read in evaluation."""
    program = trace(model, variables, inputs)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(variables)]
    outputs = [program.outputs[n] for n in exits]
    read = program.read_by(needed(program, outputs), outputs)
    return frozenset(path for path, v in zip(paths, program.inputs, strict=False) if v in read)
