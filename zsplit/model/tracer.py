"""Following a model's forward pass with torch.fx, without touching the model."""

import copy
import inspect
import math
import re
import sys
from inspect import Parameter
from itertools import chain, count
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from zsplit.errors import PlanError


class PathTracer(fx.Tracer):
    """Names each node after the module or operation that makes its value, as torchvision's NodePathTracer does.

    A module's node has the module's own path (`layer1.0.relu`), an operation's the path of the module whose
    forward runs it and the operation (`layer1.0.add`); a repeated name gets `_1`, `_2`, …. Other than with
    torchvision, a module whose name ends in a number (`ln_2`) keeps that name.
    """

    # Without it a buffer that forward changes (`self.count.add_(1)`) would change now, and never again.
    proxy_buffer_attributes = True

    def __init__(self, root: nn.Module) -> None:
        ops = sys.modules.get("torchvision.ops")
        known: Any = (math,) if ops is None else (math, ops)  # some versions of torch say that it may be one only
        super().__init__(autowrap_modules=known)
        self.names: dict[fx.Node, str] = {}
        self._taken: set[str] = set()
        self._paths = {path for path, _ in root.named_modules()}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Do not look into torch's own modules, nor into torchvision's smallest (`StochasticDepth`, `Permute`, …)."""
        smallest = type(m).__module__.startswith("torchvision.ops") and not any(m.children())
        return smallest or super().is_leaf_module(m, module_qualified_name)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Create the node as fx does, and name it."""
        node = super().create_node(kind, target, *args, **kwargs)
        self.names[node] = self._name(node)
        self._taken.add(self.names[node])
        return node

    def _name(self, node: fx.Node) -> str:
        own = str(node.target) if node.op in ("call_module", "get_attr") else ""
        operation = re.sub(r"_\d+$", "", node.name)
        base = own or ".".join(filter(None, (self.scope.module_path, operation)))
        candidates = chain([base], (f"{base}_{n}" for n in count(1)))
        return next(name for name in candidates if name not in self._taken and (name == own or name not in self._paths))


class DrawWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notices operations that draw from a random generator, by torch's own tag on them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.drawn = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.drawn = self.drawn or _draws(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
        return False
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":  # attention has the tag whether or not it drops anything
            return bool(args[position] if position < len(args) else kwargs.get("dropout_p", argument.default_value))
    return True


def skeleton(model: nn.Module, training: bool) -> nn.Module:
    """Return a copy of the model in one mode, with its own modules and attributes but the same parameters and buffers.

    Raises PlanError for a model that cannot be copied.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    try:
        twin = copy.deepcopy(model, shared).train(training)
    except Exception as error:
        raise PlanError(
            f"{type(model).__name__} cannot be copied ({first_line(error)}): "
            "keep what cannot be copied out of the model's attributes."
        ) from error
    for module in twin.modules():
        if isinstance(module, _BatchNorm) and module.momentum is None:
            module.momentum = 0.0  # a cumulative average asks for the value of a counter, and what is traced has none
    return twin


def follow(root: nn.Module) -> tuple[fx.Graph, dict[fx.Node, str]]:
    """Return the graph of the forward pass in the root's mode, and the names of its nodes.

    Its first node is the input; other inputs of `forward` keep their defaults. Raises PlanError for a model that
    torch.fx cannot follow, that needs several inputs, or whose random numbers do not depend on its input.
    """
    model = type(root).__name__
    defaults = _defaults(root)
    tracer = PathTracer(root)
    try:
        with torch.random.fork_rng(devices=[]), DrawWatch() as watch:
            graph = tracer.trace(root, concrete_args=defaults)
    except Exception as error:
        raise PlanError(
            f"{model} cannot be traced by torch.fx ({first_line(error)}): its forward has to be one sequence of "
            "operations, whatever the values; put what depends on values into a function marked with torch.fx.wrap."
        ) from error
    if watch.drawn:
        raise PlanError(
            f"{model} draws random numbers whose shape does not depend on its input, which tracing would freeze: "
            "use a module such as nn.Dropout, or torch.rand_like on a tensor that does."
        )
    return graph, tracer.names


def first_line(error: Exception) -> str:
    """Return what went wrong in one line, without a full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")


def _defaults(root: nn.Module) -> dict[str, Any]:
    """Return the defaults of all inputs but the first."""
    signature = inspect.signature(root.forward)
    first, others = list(signature.parameters.values())[:1], list(signature.parameters.values())[1:]
    needed = [p for p in others if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if needed or [p.kind for p in first] not in ([Parameter.POSITIONAL_OR_KEYWORD], [Parameter.POSITIONAL_ONLY]):
        raise PlanError(
            f"{type(root).__name__}.forward has the inputs {signature}, and a model that is cut takes one tensor: "
            "wrap it in a module that does."
        )
    return {p.name: p.default for p in others if p.default is not p.empty}
