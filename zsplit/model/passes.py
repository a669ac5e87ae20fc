"""A model's tensors, and its forward pass in one mode: nodes in order, what crosses after each of them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor, fx, nn

from zsplit.model.observe import observe
from zsplit.model.tracer import follow, skeleton


class Inventory:
    """The names of a model's parameters and buffers, in the order of its state_dict.

    Tied tensors have several names, the first of which stands for all of them.
    """

    def __init__(self, model: nn.Module) -> None:
        tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        tensors |= dict(model.named_buffers(remove_duplicate=False))
        self.stored = [name for name in model.state_dict() if name in tensors]
        self._first: dict[int, str] = {}
        self._main = {name: self._first.setdefault(id(tensors[name]), name) for name in self.stored}
        self._main |= {name: self._first.setdefault(id(tensor), name) for name, tensor in tensors.items()}
        self._elements = {self._main[name]: p.numel() for name, p in model.named_parameters()}

    def under(self, path: str) -> frozenset[str]:
        """Return the tensors of a module, or the one tensor that the path names."""
        return frozenset(main for name, main in self._main.items() if name == path or name.startswith(f"{path}."))

    def is_stored(self, name: str) -> bool:
        """Whether the state_dict holds the tensor: it does not hold buffers that are not persistent."""
        return self._main.get(name, "") in self.stored

    def deal(self, used: Sequence[Collection[str]]) -> list[list[str]]:
        """Return the names that go with each part, given the tensors that each uses; no tensor is in two of them.

        What none uses goes with what stands before it in the model.
        """
        shares: list[list[str]] = [[] for _ in used]
        owner = {main: part for part, mains in enumerate(used) for main in mains}
        part = 0
        for name in dict.fromkeys([*self.stored, *(n for n, main in self._main.items() if main in owner)]):
            part = owner.setdefault(self._main[name], part)
            shares[part].append(name)
        return shares

    def parameters(self, names: Collection[str]) -> int:
        """Return how many numbers the parameters among these have, tied ones counted once."""
        return sum(self._elements.get(main, 0) for main in {self._main[name] for name in names})


@dataclass(frozen=True)
class Stretch:
    """A part of a forward pass: its nodes in order, and the node whose value it takes and the one it gives.

    `takes` is None for the first part, whose input is the model's, `gives` for the last, whose output is.
    """

    nodes: tuple[fx.Node, ...]
    takes: fx.Node | None
    gives: fx.Node | None


class ForwardPass:
    """The forward pass in one mode.

    `nodes` are in the order of execution and `names` says what they are called; `facts` are what running
    them on `batch` samples showed; `ends` maps each node whose value is at some place the only one that crosses
    to the index of the last node before that place, in order. Values that do not depend on the input do not
    count: whichever side needs them computes them. Raises PlanError for a model that cannot be traced or run.
    """

    def __init__(self, model: nn.Module, inventory: Inventory, example: Tensor, training: bool, batch: int) -> None:
        self.root = skeleton(model, training)
        self.mode = "training" if training else "evaluation"
        self.batch = batch
        graph, self.names = follow(self.root)
        self.facts = observe(self.root, graph, example, batch)
        self.nodes: list[fx.Node] = list(graph.nodes)
        self.result = self.nodes[-1].args[0]
        self._index = {node: i for i, node in enumerate(self.nodes)}
        self._constants = self._find_constants()
        self.crossing = self._find_crossing()
        self.ends = self._find_ends()
        self._reads = {node: self._find_reads(node, inventory) for node in self.nodes}
        self._by_name = {name: node for node, name in self.names.items() if node in self._index}

    def find(self, name: str) -> fx.Node | None:
        """Return the node of this name."""
        return self._by_name.get(name)

    def position(self, node: fx.Node) -> int:
        """Return the node's place in the order of execution."""
        return self._index[node]

    def stretch(self, takes: fx.Node | None, gives: fx.Node | None) -> Stretch:
        """Return the part between two cuts. Values that do not depend on the input are in each part that uses them."""
        first = 0 if takes is None else self.ends[takes] + 1
        behind = len(self.nodes) if gives is None else self.ends[gives] + 1
        members = {node for node in self.nodes[first:behind] if node not in self._constants or not node.users}
        for node in reversed(self._constants):
            if any(user in members for user in node.users):
                members.add(node)
        return Stretch(tuple(sorted(members, key=self.position)), takes, gives)

    def reads(self, stretch: Stretch) -> frozenset[str]:
        """Return the model's tensors that belong to a part, since it uses them."""
        return frozenset().union(*(self._reads[node] for node in stretch.nodes))

    def flops(self, stretch: Stretch) -> int:
        """Return the floating-point operations for one sample, forward."""
        return sum(self.facts[node].flops for node in stretch.nodes) // self.batch

    def sends_batch(self, node: fx.Node) -> bool:
        """Whether the node's value is a floating-point tensor whose first dimension is the batch."""
        fact = self.facts[node]
        return fact.dtype is not None and fact.dtype.is_floating_point and bool(fact.shape) and fact.shape[0] == self.batch

    def obstacle(self, name: str) -> str:
        """Return why there is no cut after the node of this name."""
        node = self._by_name.get(name)
        if node is None:
            return f"it does not run in {self.mode} mode"
        if node in self._constants:
            return "it does not depend on the model's input"
        if node.op == "placeholder":
            return "it is the model's input"
        if node is self.result:
            return "it is the model's output"
        crossing = self.crossing[node]
        if node not in crossing:
            return "its value is not used after it"
        kind = "tensors" if all(self.facts[other].shape is not None for other in crossing) else "values"
        return f"{len(crossing)} {kind} cross there ({', '.join(self.names[other] for other in crossing)})"

    def _find_constants(self) -> dict[fx.Node, None]:
        """Return the nodes, in order, that use neither the input nor random numbers."""
        constants: dict[fx.Node, None] = {}
        for node in self.nodes:
            fixed = node.op not in ("placeholder", "output") and all(other in constants for other in node.all_input_nodes)
            if fixed and not self.facts[node].draws:
                constants[node] = None
        return constants

    def _find_crossing(self) -> dict[fx.Node, tuple[fx.Node, ...]]:
        """Return the nodes whose values are still needed after each node."""
        crossing: dict[fx.Node, tuple[fx.Node, ...]] = {}
        live: list[fx.Node] = []
        last = {node: max((self._index[user] for user in node.users), default=-1) for node in self.nodes}
        for i, node in enumerate(self.nodes):
            if node not in self._constants:
                live = [other for other in (*live, node) if last[other] > i]
                crossing[node] = tuple(live)
        return crossing

    def _find_ends(self) -> dict[fx.Node, int]:
        ends: dict[fx.Node, int] = {}
        for node, crossing in self.crossing.items():
            if len(crossing) == 1 and crossing[0] is not self.result and crossing[0].op != "placeholder":
                ends.setdefault(crossing[0], self._index[node])
        return ends

    def _find_reads(self, node: fx.Node, inventory: Inventory) -> frozenset[str]:
        if node.op not in ("call_module", "get_attr"):
            return frozenset()
        if node.op == "get_attr" and not inventory.is_stored(str(node.target)) and not self._is_changed(node):
            return frozenset()
        return inventory.under(str(node.target))

    def _is_changed(self, node: fx.Node) -> bool:
        """Whether a later node changes the buffer that this one fetches."""
        return self.facts[node].changed
