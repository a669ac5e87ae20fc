"""The model as a chain of stretches between neighbouring cuts, run and timed as training runs it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zsplit.config import Config
from zsplit.model import DeferredBatchNorm, randomness
from zsplit.train.half import Workshop, make_optimizer
from zsplit.train.profile.overhead import Clock
from zsplit.train.profile.witness import Witness

Moment = Any
"""A moment on a device's time line: seconds, or a CUDA event."""


class OutOfMemory(Exception):  # noqa: N818  (it says how far things went)
    """The memory is used up. `fits` counts the stretches that went before."""

    def __init__(self, fits: int) -> None:
        super().__init__(f"there was room for {fits} stretches")
        self.fits = fits


class Seconds(NamedTuple):
    """What a slice took in each stretch."""

    forward: list[float]
    backward: list[float]


class Flight:
    """A slice on its way: what the last stretch gave, and the moments at which each stretch began and ended."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.output = torch.empty(0)
        self.forward: list[tuple[Moment, Moment]] = []
        self.entered: dict[int, Moment] = {}


class Chain:
    """A copy of the model, cut everywhere: the workshop's own stays as it is, and so do the random generators.

    All stretches run in one graph, so that together they are the forward and backward pass of the uncut model. The
    optimizer's learning rate is 0: the weights stay, and so does what is measured.
    """

    def __init__(self, workshop: Workshop, config: Config, clock: Clock) -> None:
        self._clock = clock
        self.shape = workshop.traced.shape
        self._device = workshop.device
        self._seed = config.run.seed
        # Copied together: a module that two stretches use stays one.
        self.parts = [part.to(self._device).train() for part in deepcopy(workshop.traced.chain())]
        parameters = [[p for p in part.parameters() if p.requires_grad] for part in self.parts]
        self._optimizers = [make_optimizer(own, config, 0.0) if own else None for own in parameters]
        deferred = config.train.batch_norm == "deferred"
        self._norms = [DeferredBatchNorm(part) for part in self.parts] if deferred else []

    def tensors(self, stretch: int) -> list[Tensor]:
        """Return parameters and buffers of a stretch."""
        return [*self.parts[stretch].parameters(), *self.parts[stretch].buffers()]

    def batch(self, size: int) -> Tensor:
        """Return so many random samples, where a client has its data: in the host's memory."""
        return torch.randn(size, *self.shape, generator=torch.Generator().manual_seed(self._seed))

    def begin(self, slices: int) -> None:
        """Begin a mini-batch of so many slices, without gradients."""
        for norm in self._norms:
            norm.begin(slices)
        for part in self.parts:
            part.zero_grad()

    def forward(self, x: Tensor, depth: int, witness: Witness | None = None) -> Flight:
        """Run the first `depth` stretches on one slice. Raises OutOfMemory."""
        flight = Flight(depth)
        with randomness(self._seed, 0, 0, 0, 0):
            for i in range(depth):
                with room(i):
                    with witness.watch(i) if witness else nullcontext():
                        begin = self._now()
                        x = self._stretch(i, x)
                        flight.forward.append((begin, self._now()))
                    if witness and i + 1 < len(self.parts):
                        witness.look(i, x)
                    x = self._watched(x, i + 1, flight.entered) if i + 1 < depth else x
        flight.output = x
        return flight

    def backward(self, flight: Flight) -> Seconds:
        """Take a slice back; return what all of it took.

        Gradients add up to those that are there. Raises OutOfMemory.
        """
        output, depth = flight.output, flight.depth
        with room(depth - 1):
            gradient = torch.ones_like(output)
            begin = self._now()
            if output.requires_grad:  # one stretch without parameters has nothing to learn
                torch.autograd.backward(output, gradient)
            end = self._now()
        moments = [begin, *(flight.entered.get(i, end) for i in range(depth - 1, 0, -1)), end]
        return Seconds(self._seconds(flight.forward), self._seconds(list(pairwise(moments)))[::-1])

    def step(self, depth: int) -> list[float]:
        """Step the optimizer and forget the gradients; return the seconds of each stretch. Raises OutOfMemory."""
        spans: list[tuple[Moment, Moment]] = []
        for optimizer in self._optimizers[:depth]:
            with room(depth - 1):
                begin = self._now()
                if optimizer is not None:
                    optimizer.step()
                    optimizer.zero_grad()
                spans.append((begin, self._now()))
        return self._seconds(spans)

    def _stretch(self, index: int, x: Tensor) -> Tensor:
        output: Tensor = self.parts[index](x.to(self._device) if index == 0 else x)
        return loss_of(output) if index == len(self.parts) - 1 else output

    def _watched(self, x: Tensor, stretch: int, entered: dict[int, Moment]) -> Tensor:
        """Have the moment noted at which the gradient of what a stretch takes is there."""
        if not x.requires_grad:  # a back returns this gradient, whether or not the front has use for it
            x = x.detach().requires_grad_().view_as(x)

        def reached(_: Tensor) -> None:
            entered[stretch] = self._now()

        register: Callable[[Callable[[Tensor], None]], object] = x.register_hook
        register(reached)
        return x

    def _now(self) -> Moment:
        if self._device.type == "cuda":
            event: Any = torch.cuda.Event
            moment = event(enable_timing=True)
            moment.record(torch.cuda.current_stream(self._device))
            return moment
        if self._device.type == "mps":
            torch.mps.synchronize()
        return self._clock()

    def _seconds(self, spans: list[tuple[Moment, Moment]]) -> list[float]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return [max(0.0, float(begin.elapsed_time(end)) / 1000) for begin, end in spans]
        # A gradient that is there before the backward pass has begun (that of a stretch without work) took no time.
        return [max(0.0, end - begin) for begin, end in spans]


def loss_of(output: Tensor) -> Tensor:
    """Return a loss of the model's output: cross-entropy of logits (batch, classes), of anything else the sum."""
    if output.ndim != 2:
        return output.sum()
    return F.cross_entropy(output, torch.zeros(len(output), dtype=torch.int64, device=output.device))


@contextmanager
def room(stretches: int = 0) -> Iterator[None]:
    """Turn torch's many ways to be out of memory into OutOfMemory: so many stretches had room before."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise OutOfMemory(stretches) from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that there is no memory left: it has no one type for that on all devices."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return any(sign in text for sign in ("out of memory", "allocate memory", "bad_alloc"))
