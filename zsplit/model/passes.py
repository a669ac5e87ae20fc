"""A model's tensors, and its forward pass in one mode: nodes in order, what crosses after each of them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, fx, nn

from zsplit.model.observe import observe
from zsplit.model.tracer import follow, skeleton


class Inventory:
    """The names of a model's parameters and buffers, in the order of its state_dict.

    Tied tensors have several names, the first of which stands for all of them. Buffers that are not
    persistent come last.
    """

    def __init__(self, model: nn.Module) -> None:
        tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        tensors |= dict(model.named_buffers(remove_duplicate=False))
        stored = [name for name in model.state_dict() if name in tensors]
        first: dict[int, str] = {}
        self._main = {name: first.setdefault(id(tensors[name]), name) for name in [*stored, *tensors]}
        self._stored = frozenset(self._main[name] for name in stored)
        self._elements = {self._main[name]: parameter.numel() for name, parameter in model.named_parameters()}
        self._under: dict[str, set[str]] = {}
        for name, main in self._main.items():
            for path in accumulate(name.split("."), "{}.{}".format):
                self._under.setdefault(path, set()).add(main)

    def under(self, path: str) -> frozenset[str]:
        """Return the tensors of a module, or the one tensor that the path names."""
        return frozenset(self._under.get(path, ()))

    def stores(self, path: str) -> bool:
        """Whether the path names a tensor that the state_dict holds."""
        return self._main.get(path) in self._stored

    def deal(self, used: Sequence[Collection[str]]) -> list[list[str]]:
        """Return the names that go with each part, given the tensors that each uses; no tensor is in two of them.

        What none uses goes with what stands before it in the model, and what stands first with the first part that
        uses anything.
        """
        shares: list[list[str]] = [[] for _ in used]
        owner = {main: part for part, mains in enumerate(used) for main in mains}
        part = next((part for part, mains in enumerate(used) if mains), 0)
        for name, main in self._main.items():
            if main in owner or main in self._stored:
                part = owner.setdefault(main, part)
                shares[part].append(name)
        return shares

    def parameters(self, names: Collection[str]) -> int:
        """Return how many numbers the parameters among these have, tied ones counted once."""
        return sum(self._elements.get(main, 0) for main in {self._main[name] for name in names})


Sample = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of one sample of a value."""


@dataclass(frozen=True)
class Stretch:
    """A part of a forward pass: its nodes in order, the node whose value it takes, and the one whose value it gives.

    The first part takes the model's input. The last gives the model's output: its `gives` is None.
    """

    source: "ForwardPass"
    nodes: tuple[fx.Node, ...]
    takes: fx.Node
    gives: fx.Node | None

    @property
    def reads(self) -> set[str]:
        """The tensors of the model's state that it uses, and the buffers that forward changes."""
        return {name for node in self.nodes for name in self.source.reads[node]}

    @property
    def flops(self) -> int:
        """FLOPs for one sample, forward."""
        return sum(self.source.facts[node].flops for node in self.nodes) // self.source.batch


Pair = tuple[Stretch, Stretch]
"""A stretch in training and in evaluation mode."""


class ForwardPass:
    """The forward pass in one mode.

    `nodes` are in the order of execution, `names` says what they are called, and `facts` what running them on
    `batch` samples showed. `places` are those where only one tensor crosses: the name of the node that made it,
    and the index of the last node before the place. Values that do not depend on the input do not count as
    crossing: whichever side needs them computes them. Raises PlanError for a model that cannot be traced or run.
    """

    def __init__(self, model: nn.Module, inventory: Inventory, example: Tensor, training: bool, batch: int) -> None:
        self.mode = "training" if training else "evaluation"
        self.batch = batch
        self.root = skeleton(model, training)
        graph, self.names = follow(self.root)
        self.facts = observe(self.root, graph, example, batch)
        self.nodes: list[fx.Node] = list(graph.nodes)
        self._index = {node: i for i, node in enumerate(self.nodes)}
        self._by_name = {self.names[node]: node for node in self.nodes}
        self._constants = self._find_constants()
        self._crossing = self._find_crossing()
        self.places = self._find_places()
        self._changed = {str(node.target) for node in self.nodes if node.op == "get_attr" and self.facts[node].changed}
        self.reads = {node: self._find_reads(node, inventory) for node in self.nodes}

    def position(self, name: str) -> int | None:
        """Return where in the order of execution the node of this name stands, if there is one."""
        node = self._by_name.get(name)
        return None if node is None else self._index[node]

    def is_output(self, name: str) -> bool:
        """Whether the node of this name makes what the model gives."""
        node = self._by_name.get(name)
        return node is not None and self._is_result(node)

    def stretch(self, takes: str | None, gives: str | None) -> Stretch:
        """Return the part between two places, or one place and an end of the model.

        Values that do not depend on the input are computed in every part that uses them.
        """
        first = 0 if takes is None else self.places[takes] + 1
        behind = len(self.nodes) if gives is None else self.places[gives] + 1
        members = {node for node in self.nodes[first:behind] if node not in self._constants or not node.users}
        for node in reversed(self._constants):
            if any(user in members for user in node.users):
                members.add(node)
        return Stretch(
            source=self,
            nodes=tuple(sorted(members, key=self._index.__getitem__)),
            takes=self.nodes[0] if takes is None else self._by_name[takes],
            gives=None if gives is None else self._by_name[gives],
        )

    def nothing(self) -> Stretch:
        """Return the part without an operation: it gives what it takes."""
        return Stretch(source=self, nodes=(), takes=self.nodes[0], gives=self.nodes[0])

    def result(self) -> Sample | None:
        """Return one sample of the model's output, if that is a floating-point tensor with the batch first."""
        result = self.nodes[-1].args[0]
        return self.sample(self.names[result]) if isinstance(result, fx.Node) else None

    def sample(self, name: str) -> Sample | None:
        """Return one sample of a node's value, if that is a floating-point tensor with the batch first."""
        fact = self.facts[self._by_name[name]]
        if fact.dtype is None or not fact.dtype.is_floating_point or not fact.shape or fact.shape[0] != self.batch:
            return None
        return fact.shape[1:], fact.dtype

    def obstacle(self, name: str) -> str:
        """Return why no place is called like this node."""
        node = self._by_name.get(name)
        if node is None:
            return f"it does not run in {self.mode} mode"
        if node.op in ("placeholder", "output") or self._is_result(node):
            return f"it is the model's {'input' if node.op == 'placeholder' else 'output'}"
        if node in self._constants:
            return "it does not depend on the model's input"
        crossing = self._crossing[node]
        if node not in crossing:
            return "its value is not used"
        kind = "tensors" if all(self.facts[other].dtype is not None for other in crossing) else "values"
        return f"{len(crossing)} {kind} cross there ({', '.join(self.names[other] for other in crossing)})"

    def _is_result(self, node: fx.Node) -> bool:
        return node is self.nodes[-1].args[0]

    def _find_constants(self) -> dict[fx.Node, None]:
        """Return the nodes, in order, that use neither the input nor random numbers."""
        constants: dict[fx.Node, None] = {}
        for node in self.nodes:
            fixed = node.op not in ("placeholder", "output") and all(one in constants for one in node.all_input_nodes)
            if fixed and not self.facts[node].draws:
                constants[node] = None
        return constants

    def _find_crossing(self) -> dict[fx.Node, list[fx.Node]]:
        """Return the nodes whose values are still to be used after each node."""
        crossing: dict[fx.Node, list[fx.Node]] = {}
        live: list[fx.Node] = []
        last = {node: max((self._index[user] for user in node.users), default=-1) for node in self.nodes}
        for i, node in enumerate(self.nodes):
            if node not in self._constants:
                live = [one for one in (*live, node) if last[one] > i]
                crossing[node] = live
        return crossing

    def _find_places(self) -> dict[str, int]:
        """Return the places inside the model; its input and its output, where one tensor crosses too, are not."""
        places: dict[str, int] = {}
        for node, crossing in self._crossing.items():
            if len(crossing) == 1 and crossing[0].op != "placeholder" and not self._is_result(crossing[0]):
                places.setdefault(self.names[crossing[0]], self._index[node])
        return places

    def _find_reads(self, node: fx.Node, inventory: Inventory) -> frozenset[str]:
        path = str(node.target)
        if node.op == "call_module" or (node.op == "get_attr" and (inventory.stores(path) or path in self._changed)):
            return inventory.under(path)
        return frozenset()
