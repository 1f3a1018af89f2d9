"""Walk a model's graph with boxes in place of tensors (interval bound propagation, IBP).

The model is traced once with torch.fx (torch's own modules stay leaves), so that sequential and residual nets take
one path. Each walk turns the nodes into `Step`s in topological order: an operator, its parents, its box and, where a
clean batch goes along, its clean value. The backward pass of `linear.py` reads the same steps from the end.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from surefoot.errors import SurefootError, UnsupportedOp
from surefoot.nn.bounds.operators import Box, Op, Rectifier, Scale
from surefoot.nn.bounds.rules import RULES, Ref, module_rule
from surefoot.nn.memory import keep_freed_memory

INPLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}
SHAPE_QUERIES = ("size", "dim", "numel", "nelement", "ndimension")
NONLINEAR = 10**6  # depth of whatever has passed a nonlinearity or a join


@dataclass(frozen=True, eq=False)
class Step:
    """One bounded tensor. `depth` counts weight layers since the input: up to 1 the box is exact."""

    name: str
    op: Op | None  # None for the input
    parents: tuple[int, ...]
    box: Box
    value: Tensor | None
    depth: int = 0


@dataclass(frozen=True, eq=False)
class Bounds:
    """What a walk leaves behind: `steps[0]` is the input, `steps[end]` the logits."""

    steps: tuple[Step, ...]
    end: int

    @property
    def input(self) -> Box:
        return self.steps[0].box

    @property
    def output(self) -> Box:
        """Bounds of the logits `[B, K]`."""
        return self.steps[self.end].box

    @property
    def logits(self) -> Tensor | None:
        """Logits of the clean batch, where one went along."""
        return self.steps[self.end].value

    @property
    def rectifiers(self) -> list[tuple[str, Box]]:
        """Name and pre-activation box of every ReLU and leaky ReLU, in order."""
        return [(s.name, self.steps[s.parents[0]].box) for s in self.steps if isinstance(s.op, Rectifier)]


def _operation_in_place(operation: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_function", operation, (self, other), {})


class _Proxy(fx.Proxy):
    """torch.fx takes `z += y` for `z = z + y`, which forgets that other names of z change with it."""

    __iadd__ = _operation_in_place(operator.iadd)
    __isub__ = _operation_in_place(operator.isub)
    __imul__ = _operation_in_place(operator.imul)
    __itruediv__ = _operation_in_place(operator.itruediv)


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


class Program:
    """A model with its traced graph; weights are read at every walk, so training need not trace again."""

    def __init__(self, model: nn.Module) -> None:
        try:
            graph = _Tracer().trace(model)
        except Exception as error:  # the forward is foreign code: whatever it raises on a proxy means "not traceable"
            raise UnsupportedOp(
                f"{type(model).__name__}.forward cannot be traced ({error}); rewrite it without branches on tensor values."
            ) from error
        self.model = model
        self.nodes = tuple(graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        keep_freed_memory()

    @property
    def needs_clean(self) -> bool:
        """Whether a batch-norm in training mode wants the clean batch to go along."""
        kinds = (nn.BatchNorm1d, nn.BatchNorm2d)
        return any(m.training and isinstance(m, kinds) for m in self.model.modules())


Refine = Callable[[list[Step], int, Op], Box]


def propagate(program: Program, box: Box, *, clean: Tensor | None = None, refine: Refine | None = None) -> Bounds:
    """Boxes of every tensor of the model, for inputs in `box` `[B, ...]`; differentiable in the weights.

    Modules act in the mode they are in. Batch-norm in training mode takes its statistics from `clean` `[B, ...]`, the batch
    at the centre, which goes along and alone moves the running statistics. `refine` may tighten a box before a
    nonlinearity reads it. Raises `UnsupportedOp` with the node's name where no sound rule is known.
    """
    return _Walk(program, box, clean, refine).run()


class _Walk:
    def __init__(self, program: Program, box: Box, clean: Tensor | None, refine: Refine | None) -> None:
        self.program, self.refine = program, refine
        self.steps = [Step("input", None, (), box, clean)]
        self.env: dict[fx.Node, Any] = {}
        self.refined: set[int] = set()

    def run(self) -> Bounds:
        _refuse_hooks("the model", self.program.model)
        for node in self.program.nodes:
            if node.op == "output":
                end = map_arg(node.args[0], lambda n: self.env[n])
                if not isinstance(end, Ref):
                    raise UnsupportedOp("The model must return one tensor of logits that depends on its input.")
                return Bounds(tuple(self.steps), end.index)
            try:
                self.env[node] = self._evaluate(node)
            except (UnsupportedOp, TypeError) as error:
                what = f"Node '{node.name}' ({_describe(node, self.program.model)}) has no sound bound rule"
                reason = str(error).rstrip(".")
                raise UnsupportedOp(f"{what}{': ' + reason if reason else ''}.") from error
        raise UnsupportedOp("The model returns nothing.")

    def _evaluate(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._placeholder(node)
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.program.model)
        args = map_arg(node.args, lambda n: self.env[n])
        kwargs = map_arg(node.kwargs, lambda n: self.env[n])
        if not any(isinstance(self.env[n], Ref) for n in node.all_input_nodes):
            return _concrete(node, self.program.model, args, kwargs)
        first = args[0] if args else None
        if isinstance(first, Ref):
            if node.op == "call_method" and node.target in SHAPE_QUERIES:
                return getattr(torch.empty(first.shape, device="meta"), str(node.target))(*args[1:], **kwargs)
            if node.target is getattr and args[1] in ("shape", "ndim"):
                return getattr(torch.empty(first.shape, device="meta"), str(args[1]))
            if node.target is getattr and args[1] in ("device", "dtype"):
                return getattr(self.steps[0].box.lower, str(args[1]))
        return self._apply(node, args, kwargs)

    def _placeholder(self, node: fx.Node) -> Any:
        if self.program.position[node] == 0:
            return Ref(0, self.steps[0].box, self.steps[0].value)
        if node.args:
            return node.args[0]  # the default of an optional argument
        raise UnsupportedOp("the model takes more than one input")

    def _apply(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ref:
        if node.op == "call_module":
            module = self.program.model.get_submodule(str(node.target))
            _refuse_hooks("it", module)
            found, args = module_rule(module), (module, *args)
        else:
            found = RULES.get(node.target)
        if found is None:
            raise UnsupportedOp
        made = found(*args, **kwargs)
        result = made if isinstance(made, Ref) else self._step(node.name, *made)
        if _in_place(node, self.program.model):
            changed = next(a for a in (*args, *kwargs.values()) if not isinstance(a, nn.Module))
            if not isinstance(changed, Ref):
                raise UnsupportedOp("it writes in place into a constant")
            self._forget_overwritten(node, changed.index, result)
        return result

    def _step(self, name: str, op: Op, operands: tuple[Ref, ...]) -> Ref:
        parents = tuple(ref.index for ref in operands)
        if self.refine is not None and not op.affine and parents[0] not in self.refined:
            self.refined.add(parents[0])
            better = self.refine(self.steps, parents[0], op)
            self.steps[parents[0]] = replace(self.steps[parents[0]], box=better)
        sources = [self.steps[p] for p in parents]
        values = [s.value for s in sources if s.value is not None]
        value = op.value(*values) if len(values) == len(sources) else None
        depth = max(s.depth for s in sources) + op.weight_layers
        if not op.affine or len(sources) > 1:
            depth = NONLINEAR
        self.steps.append(Step(name, op, parents, self._interval(op, sources, value), value, depth))
        return Ref(len(self.steps) - 1, self.steps[-1].box, value)

    def _interval(self, op: Op, sources: list[Step], value: Tensor | None) -> Box:
        """The operator's box. In training the box of a weight layer waits until it is read: batch-norm behind it folds its

        scale into the weights, which is cheaper than scaling centre and radius, and then nobody reads it.
        """
        below = sources[0]
        if value is not None and isinstance(op, Scale) and below.op is not None:
            folded = below.op.scaled(op)
            if folded is not None:
                return folded.interval(self.steps[below.parents[0]].box)
        if value is not None and op.affine and op.weight_layers:
            return Box.deferred(lambda: op.interval(*(s.box for s in sources)), value.shape)
        return op.interval(*(s.box for s in sources))

    def _forget_overwritten(self, node: fx.Node, old: int, new: Ref) -> None:
        """After an in-place operation every name of the old tensor means the new one; views of it cannot be followed."""
        memory: list[int] = []  # the step whose memory each step may share: views of views, slices and transposes too
        for i, step in enumerate(self.steps):
            memory.append(memory[step.parents[0]] if getattr(step.op, "shares_memory", False) else i)
        views = {i for i, own in enumerate(memory) if own == memory[old] and i != old}
        here = self.program.position[node]
        for other, ref in list(self.env.items()):
            if (
                isinstance(ref, Ref)
                and ref.index in views
                and any(self.program.position[u] > here for u in other.users)
            ):
                raise UnsupportedOp(
                    "it works in place on a view that is read later; use the form that makes a new tensor"
                )
            if isinstance(ref, Ref) and ref.index == old:
                self.env[other] = new


def _refuse_hooks(what: str, module: nn.Module) -> None:
    if module._forward_hooks or module._forward_pre_hooks:
        raise UnsupportedOp(f"{what} carries forward hooks, which could change its output; remove them first.")


def _concrete(node: fx.Node, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A node that does not depend on the input: shapes, indices, constants."""
    if node.op == "call_module":
        return model.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    if node.target in INPLACE and isinstance(args[0], Tensor):
        args = (args[0].clone(), *args[1:])  # it may be a weight of the caller's
    return node.target(*args, **kwargs)


def _in_place(node: fx.Node, model: nn.Module) -> bool:
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if node.target in INPLACE or getattr(node.target, "__name__", "").endswith("_"):
        return True
    if node.kwargs.get("inplace") is True:
        return True
    if any(a is True for a in node.args):  # possibly a positional `inplace`
        assert callable(node.target)
        try:
            return inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments.get("inplace") is True
        except (TypeError, ValueError):  # built-in functions show no signature, and have no such argument
            return False
    return False


def _describe(node: fx.Node, model: nn.Module) -> str:
    if node.op == "call_module":
        return type(model.get_submodule(str(node.target))).__name__
    return getattr(node.target, "__name__", str(node.target))


def supported(model: nn.Module, example: Tensor) -> str | None:
    """None if every node of `model` has a bound rule in evaluation mode, else the reason; `example` is `[B, ...]`."""
    flags = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            propagate(Program(model), Box(example, example))
    except SurefootError as error:
        return str(error)
    finally:
        for module, training in flags:
            module.training = training
    return None
