"""One side of a cut: a module that runs a stretch of the forward pass with the model's own modules."""

from collections.abc import Callable, Collection
from operator import attrgetter

from torch import Tensor, fx, nn

from zsplit.model.passes import ForwardPass, Pair, Stretch
from zsplit.model.randomness import seed_node

Forward = Callable[["Part", Tensor], Tensor]


class Part(nn.Module):
    """A front, a middle, a back or a tail: takes the smashed data (or the model's input) and gives the next.

    Mostly it is one stretch of the model. Front and tail of one owner are one part of two stretches (`Traced.ends`).
    Its parameters and modules are those of the model that it was made from, under the same names, and not copies:
    training the parts trains the model, and where both sides run one module (a ReLU, say) they have it in common, with
    its mode. `copy.deepcopy` gives an independent part. `train()` and `eval()` switch between the two forward passes
    that were traced. What a part takes is never changed in place, unless it `owns` that. It is not to be pickled:
    weights travel as a `state_dict`.
    """

    def __init__(self, model: nn.Module, names: Collection[str], *stretches: Pair, owns: bool = False) -> None:
        super().__init__()
        self.training = model.training
        self._owns = owns
        self._adopt_modules(model, [node for pair in stretches for stretch in pair for node in stretch.nodes])
        self._adopt_tensors(model, names)
        self._forwards: list[dict[bool, Forward]] = [
            {
                mode: self._function(self._graph(names, model, stretch))
                for mode, stretch in ((True, training), (False, evaluation))
            }
            for training, evaluation in stretches
        ]

    def forward(self, x: Tensor, stretch: int = 0) -> Tensor:
        """Run one of the part's stretches in the mode that the part is in."""
        return self._forwards[stretch][self.training](self, x)

    def _adopt_modules(self, model: nn.Module, nodes: Collection[fx.Node]) -> None:
        modules = dict(model.named_modules())
        paths = {str(node.target) for node in nodes if node.op in ("call_module", "get_attr")}
        # Shorter paths first: a module brings its children along. Then by name: the order of the parameters follows
        # from this, and has to be the same in every process.
        for path in sorted(paths & modules.keys(), key=lambda path: (len(path), path)):
            home, name = self._home(path)
            if name not in home._modules:
                home.add_module(name, modules[path])

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
        """Return the module in this part that holds what the path names, made where it lacks, and the last name."""
        home: nn.Module = self
        *atoms, name = path.split(".")
        for atom in atoms:
            if atom not in home._modules:
                home.add_module(atom, nn.Module())
            home = home.get_submodule(atom)
        return home, name

    def _graph(self, names: Collection[str], model: nn.Module, stretch: Stretch) -> fx.Graph:
        source, graph = stretch.source, fx.Graph()
        copies = {stretch.takes: graph.placeholder("x")}
        # What is not our own the sender may need, and autograd refuses to change its leaves.
        if source.facts[stretch.takes].changed and not self._owns:
            copies[stretch.takes] = graph.call_method("clone", (copies[stretch.takes],))
        for node in stretch.nodes:
            if node in copies:
                continue
            if source.facts[node].draws:
                graph.call_function(seed_node, (source.names[node],))
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.op == "get_attr":
                copies[node].target = self._fetched(str(node.target), names, model, source)
        if stretch.gives is not None:
            graph.output(copies[stretch.gives])
        return graph

    def _function(self, graph: fx.Graph) -> Forward:
        # fx makes a class for each graph; the function in it takes any module that has what the graph names.
        function: Forward = type(fx.GraphModule(self, graph)).forward
        return function

    def _fetched(self, path: str, names: Collection[str], model: nn.Module, source: ForwardPass) -> str:
        """Return where in this part is what `path` names in the model; what is not in its state is kept in a buffer."""
        if path in names or path in dict(self.named_modules()):
            return path
        constant = f"constant/{source.mode}/{path.replace('.', '/')}"
        if constant not in self._buffers:
            # Tensors that forward makes without its input are with the copy that was traced.
            holder = model if hasattr(model, path.partition(".")[0]) else source.root
            self.register_buffer(constant, attrgetter(path)(holder), persistent=False)
        return constant
