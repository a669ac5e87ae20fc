"""One side of a cut: a module that runs a stretch of the forward pass with the model's own modules."""

from collections.abc import Callable, Collection, Mapping

from torch import Tensor, fx, nn

from zsplit.model.passes import ForwardPass, Stretch
from zsplit.model.randomness import seed_node

CONSTANT = "_constant_"
"""Prefix of the buffers in which a part keeps tensors that are not in the model's state."""


class Part(nn.Module):
    """A front, a middle, a back or a tail: takes the smashed data (or the model's input) and gives the next.

    Its parameters and modules are those of the model that it was made from, under the same names, not copies:
    training the parts trains the model. `copy.deepcopy` gives an independent part. `train()` and `eval()` switch
    between the two forward passes that were traced. The tensor that it takes is never changed in place. Not
    to be pickled: weights travel as a `state_dict`.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Collection[str],
        passes: Mapping[bool, ForwardPass],
        stretches: Mapping[bool, Stretch],
    ) -> None:
        super().__init__()
        self.training = model.training
        self._adopt_modules(model, [node for stretch in stretches.values() for node in stretch.nodes])
        self._adopt_tensors(model, names)
        self._forwards: dict[bool, Callable[[Part, Tensor], Tensor]] = {
            mode: self._compile(passes[mode], stretch) for mode, stretch in stretches.items()
        }

    def forward(self, x: Tensor) -> Tensor:
        return self._forwards[self.training](self, x)

    def _adopt_modules(self, model: nn.Module, nodes: Collection[fx.Node]) -> None:
        # Shorter paths first: a module brings its children along.
        for path in sorted({str(node.target) for node in nodes if node.op == "call_module"}, key=len):
            home, name = self._home(path)
            if name not in home._modules:
                home.add_module(name, model.get_submodule(path))

    def _adopt_tensors(self, model: nn.Module, names: Collection[str]) -> None:
        stored = model.state_dict().keys()
        parameters = dict(model.named_parameters(remove_duplicate=False))
        buffers = dict(model.named_buffers(remove_duplicate=False))
        for path in names:
            home, name = self._home(path)
            if path in parameters and name not in home._parameters:
                home.register_parameter(name, parameters[path])
            elif path in buffers and name not in home._buffers:
                home.register_buffer(name, buffers[path], persistent=path in stored)

    def _home(self, path: str) -> tuple[nn.Module, str]:
        """Return the module under this part that holds what the path names, made where it lacks, and the last name."""
        home: nn.Module = self
        *atoms, name = path.split(".")
        for atom in atoms:
            if atom not in home._modules:
                home.add_module(atom, nn.Module())
            home = home.get_submodule(atom)
        return home, name

    def _compile(self, forward_pass: ForwardPass, stretch: Stretch) -> Callable[["Part", Tensor], Tensor]:
        graph = self._graph(forward_pass, stretch)
        # The class that fx makes for the graph, for the sake of the function in it, which takes any such module.
        return type(fx.GraphModule(self, graph)).forward

    def _graph(self, forward_pass: ForwardPass, stretch: Stretch) -> fx.Graph:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        source = stretch.takes or forward_pass.nodes[0]
        copies[source] = graph.placeholder("x")
        if forward_pass.facts[source].changed:  # the sender still needs it, and a leaf cannot be changed in place
            copies[source] = graph.call_method("clone", (copies[source],))
        for node in stretch.nodes:
            if node in copies:
                continue
            if forward_pass.facts[node].draws:
                graph.call_function(seed_node, (forward_pass.names[node],))
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.op == "get_attr":
                copies[node].target = self._constant(str(node.target), forward_pass)
        if stretch.gives is not None:
            graph.output(copies[stretch.gives])
        return graph
