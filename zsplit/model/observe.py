"""What one run of a traced forward pass shows about each of its nodes. Nothing real is computed."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from zsplit.errors import PlanError
from zsplit.model.tracer import DrawWatch, first_line


@dataclass(frozen=True)
class Facts:
    """One node: its value's shape (with the batch) and dtype where that is a tensor, and what making it took.

    `flops` are those of matrix products, convolutions and attention, a multiply-add counting 2. `draws` says
    that the node uses a random generator, `changed` that a later node changes its value in place, also
    through a view.
    """

    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    flops: int = 0
    draws: bool = False
    changed: bool = False


def observe(root: nn.Module, graph: fx.Graph, example: Tensor, batch: int) -> dict[fx.Node, Facts]:
    """Run the graph on fake tensors, as many samples like the example's as `batch` says, and return each node's facts.

    Fake tensors have shapes and no values: parameters, buffers and generators stay as they are. Raises
    PlanError where the model cannot take such a batch.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    runner = _Runner(root, graph)
    state = {**dict(runner.named_parameters()), **dict(runner.named_buffers())}
    try:
        with torch.inference_mode(False), torch.enable_grad(), _silence("torch._subclasses.fake_tensor"):
            state = {name: fake.from_tensor(tensor) for name, tensor in state.items()}
            with fake:
                samples = torch.empty(batch, *example.shape[1:], dtype=example.dtype, device=example.device)
                functional_call(runner, state, (samples,))
    except Exception as error:
        shape = [batch, *example.shape[1:]]
        raise PlanError(
            f"{type(root).__name__} cannot run on a batch of shape {shape} ({first_line(error)}): "
            "a model that is cut takes batches of any size, and the example has to be like one of them."
        ) from error
    return runner.observer.facts()


@contextmanager
def _silence(logger: str) -> Iterator[None]:
    """Keep torch from logging the traceback of an error that is raised as well."""
    log = logging.getLogger(logger)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


class _Runner(nn.Module):
    """A module around the interpreter, so that `functional_call` can lend it fake parameters."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__()
        self.root = root
        self.observer = _Observer(root, graph)

    def forward(self, samples: Tensor) -> None:
        with FlopCounterMode(display=False) as flops, DrawWatch() as watch:
            self.observer.flops, self.observer.watch = flops, watch
            self.observer.run(samples, enable_io_processing=False)


class _Observer(fx.Interpreter):
    flops: FlopCounterMode
    watch: DrawWatch

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, garbage_collect_values=False, graph=graph)
        self._counts: dict[fx.Node, tuple[int, bool]] = {}
        self._versions: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        before = self.flops.get_total_flops()
        self.watch.drawn = False
        value = super().run_node(n)
        self._counts[n] = self.flops.get_total_flops() - before, self.watch.drawn
        if isinstance(value, Tensor):
            self._versions[n] = value._version
        return value

    def facts(self) -> dict[fx.Node, Facts]:
        return {node: self._facts(node, *counts) for node, counts in self._counts.items()}

    def _facts(self, node: fx.Node, flops: int, draws: bool) -> Facts:
        value = self.env[node]
        if not isinstance(value, Tensor):
            return Facts(flops=flops, draws=draws)
        # A tensor and its views share one counter of changes.
        return Facts(tuple(value.shape), value.dtype, flops, draws, value._version > self._versions[node])
