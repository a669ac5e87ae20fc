"""A server that is several processes: each has the whole back, and computes on a slice of every micro-batch.

The first process is a server like any other, except that its backs are `LeadingHalf`s: whatever is done to one is done
to its likes in all processes. Gradients are added up by torch's DistributedDataParallel, once for each step.
"""

import signal
import weakref
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from zsplit.codec import DTYPES, NAMES
from zsplit.config import Config, from_json, to_json
from zsplit.model import Part, randomness
from zsplit.model.joint import Slice, synchronise
from zsplit.model.randomness import place
from zsplit.train.half import Half, Workshop
from zsplit.train.machine import set_up
from zsplit.train.together import Backward, Begin, Call, End, Forward, Load, Make, Team, entries_of


class Made(NamedTuple):
    """A slice that went forward and is to go back: what went in, what came out, and how it lay."""

    x: Tensor
    outputs: Tensor
    here: Slice


class Share:
    """What one process does of a back's work. All processes have to call the same methods in the same order."""

    def __init__(self, team: Team, half: Half) -> None:
        self._team, self._half = team, half
        self._here = Slice()
        synchronise(half.part, self._here)
        half.count_with(self._here.elements)
        self._joint: DistributedDataParallel | None = None
        self._made: dict[int, Made] = {}
        team.held_by(self)

    def let_go(self) -> None:
        """Drop what adds up gradients."""
        self._joint = None

    def forget(self) -> None:
        """Forget slices that never went back."""
        self._made.clear()

    def forward(self, command: Forward, whole: Tensor | None = None) -> Tensor | None:
        """Run this process's slice of a tensor (samples, …); the first process has it, and gets the outputs of all."""
        samples = command.shape[0]
        if whole is None:
            mine = self._team.draw(command.shape, DTYPES[command.dtype], self._half.device)
        else:
            mine = self._team.deal(whole, whole[:1])
        sizes = self._team.sizes(samples)
        self._here.own, self._here.rows, self._here.total = sizes[self._team.rank], sizes[0], samples
        mine.requires_grad_(command.wants_gradient)
        with torch.set_grad_enabled(command.learns):
            outputs = self._run(mine)
        if command.learns:
            self._made[command.number] = Made(mine, outputs, Slice(sizes[self._team.rank], sizes[0], samples))
        return self._team.collect(outputs, samples)

    def _run(self, x: Tensor) -> Tensor:
        """Run the part. No gradients are added up with this pass: its backward pass may come after others' forward."""
        if self._joint is None or not torch.is_grad_enabled():
            outputs: Tensor = self._half.part(x)
            if outputs.requires_grad and self._half.parameters:
                self._joint = _joint(self._half, outputs)
        else:
            with self._joint.no_sync():
                outputs = self._joint(x)
        return outputs

    def backward(self, command: Backward, whole: Tensor | None = None) -> Tensor | None:
        """Take a slice back; the first process has the gradients of all outputs, and gets those of all inputs, if any.

        With the last slice of a step, each parameter's gradient is the sum over all processes.
        """
        x, outputs, here = self._made.pop(command.number)
        if whole is None:
            gradients = self._team.draw((here.total, *outputs.shape[1:]), outputs.dtype, self._half.device)
        else:
            gradients = self._team.deal(whole, torch.zeros_like(whole[:1]))
        if command.last and self._joint is not None:
            # What DistributedDataParallel does at the end of a forward pass; in U-shaped training, that would be before
            # the backward passes of earlier micro-batches.
            self._joint.reducer.prepare_for_backward([outputs])
        torch.autograd.backward(outputs, gradients)
        if command.last:
            # It takes the mean over the processes; what each sample counts in the mini-batch is in the loss already.
            Half.scale_gradients(self._half, self._team.size)  # in each process, untold
        if not x.requires_grad:
            return None
        return self._team.collect(x.grad if x.grad is not None else torch.zeros_like(x), here.total)


def _joint(half: Half, outputs: Tensor) -> DistributedDataParallel:
    """Return what adds up the gradients of a back, of whose first pass these are the outputs."""
    unused = len(half.parameters) - len(_used(outputs) & {id(parameter) for parameter in half.parameters})
    # All processes have loaded the same weights, and the buffers that training moves are the same everywhere.
    return DistributedDataParallel(half.part, init_sync=False, find_unused_parameters=unused > 0)


def _used(outputs: Tensor) -> set[int]:
    """Return the ids of the parameters that a tensor depends on."""
    todo, seen, found = [outputs.grad_fn], set(), set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.add(id(getattr(node, "variable", None)))
            todo += [each for each, _ in node.next_functions]
    return found


class LeadingHalf(Half):
    """The first process's back: what is done to it, all others do too."""

    def __init__(
        self, team: Team, part: Part, config: Config, rate: float, device: torch.device, weights: str = "raw"
    ) -> None:
        super().__init__(part, config, rate, device, weights)
        self._team = team
        self._number = -1
        self._forwards = self._backwards_left = 0

    def lead(self, number: int) -> None:
        """Begin to lead the others' backs of this number."""
        self._number = number
        self._share = Share(self._team, self)
        # An empty one that takes gradients, so that torch asks for them also where the inputs want none.
        self._learner = torch.empty(0, requires_grad=bool(self.parameters))

    def load(self, version: str, tensors: Mapping[str, Tensor]) -> None:
        super().load(version, tensors)
        self._share.forget()
        self._team.tell(Load(self._number, self._owner, version, entries_of(tensors)))
        self._team.give(list(tensors.values()))

    def use_epoch(self, epoch: int) -> None:
        self._call("use_epoch", epoch)
        super().use_epoch(epoch)

    def begin_step(self, slices: int) -> None:
        self._call("begin_step", slices)
        super().begin_step(slices)
        self._share.forget()
        self._backwards_left = slices

    def scale_gradients(self, scale: float) -> None:
        self._call("scale_gradients", scale)
        super().scale_gradients(scale)

    def step(self) -> None:
        self._call("step")
        super().step()

    def _call(self, method: str, *arguments: int | float) -> None:
        self._team.tell(Call(self._number, method, arguments))

    def forward(self, x: Tensor) -> Tensor:
        """Run the back on a micro-batch, a slice of it in each process; a backward pass does so too."""
        outputs: Tensor = _Everywhere.apply(x, self._learner, self, torch.is_grad_enabled())
        return outputs

    def spread(self, x: Tensor, learns: bool, wants_gradient: bool) -> tuple[int, Tensor]:
        """Run all slices; return the number of this pass and the outputs."""
        self._forwards += 1
        command = Forward(
            self._number,
            self._forwards,
            NAMES[x.dtype],
            tuple(x.shape),
            self.part.training,
            learns,
            wants_gradient,
            place(),
        )
        self._team.tell(command)
        outputs = self._share.forward(command, x)
        assert outputs is not None
        return self._forwards, outputs

    def gather(self, number: int, gradients: Tensor) -> Tensor | None:
        """Take all slices of a pass back; return the gradients of what went in, where they are wanted."""
        self._backwards_left -= 1
        command = Backward(self._number, number, self._backwards_left == 0)
        self._team.tell(command)
        return self._share.backward(command, gradients)


class _Everywhere(torch.autograd.Function):
    """A back's forward and backward pass over all processes, as one operation."""

    @staticmethod
    def forward(context, x, _, half, learns):  # type: ignore[no-untyped-def]
        context.half = half
        context.number, outputs = half.spread(x.detach(), learns, learns and context.needs_input_grad[0])
        return outputs

    @staticmethod
    def backward(context, gradients):  # type: ignore[no-untyped-def]
        return context.half.gather(context.number, gradients), None, None, None


class LeadingWorkshop(Workshop):
    """The first process's workshop: the others build the same model and make the same backs."""

    def __init__(
        self,
        team: Team,
        config: Config,
        shape: tuple[int, ...],
        device: torch.device,
        model: nn.Module | None = None,
        allowed: Collection[str] = (),
    ) -> None:
        self._team = team
        self._count = 0
        self._gone: list[int] = []
        team.tell(Begin(to_json(config), shape))
        super().__init__(config, shape, device, model, allowed=allowed)

    def back(self, cut: str, tail: str = "") -> Half:
        half = super().back(cut, tail)
        assert isinstance(half, LeadingHalf)
        gone, self._gone[:] = tuple(self._gone), []
        self._team.tell(Make(self._count, cut, tail, gone))
        half.lead(self._count)
        weakref.finalize(half, self._gone.append, self._count)
        self._count += 1
        return half

    def _half(self, part: Part, rate: float, weights: str) -> Half:
        return LeadingHalf(self._team, deepcopy(part).to(self.device), self.config, rate, self.device, weights)


def follow(team: Team, device: str = "", model: nn.Module | None = None, allowed: Collection[str] = ()) -> str:
    """Do what the first process says, until the run is over; return a sentence.

    Raises ConfigError as `Workshop` and `Team.device` do, SystemExit where the first process is gone.

    `device`, `model` and `allowed` are as in `zsplit.train.peer`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process decides when it is over
    while not isinstance(command := team.hear(), End):
        match command:
            case Begin(config=config, shape=shape):
                follower = Follower(team, from_json(config), shape, device, model, allowed)
            case _:
                follower.obey(command)
    team.leave()
    return f"process {team.rank + 1} of {team.size} of this server is done"


class Follower:
    """The backs of a process that has no link, by number."""

    def __init__(
        self,
        team: Team,
        config: Config,
        shape: tuple[int, ...],
        device: str,
        model: nn.Module | None,
        allowed: Collection[str],
    ) -> None:
        self._team = team
        set_up(config, config.server.threads)
        place = team.device(device or config.server.device)
        self._workshop = Workshop(config, shape, place, model, allowed=allowed)
        self._halves: dict[int, tuple[Half, Share]] = {}

    def obey(self, command: Make | Load | Call | Forward | Backward) -> None:
        """Do what the first process does to its own back."""
        if isinstance(command, Make):
            for number in command.forget:
                del self._halves[number]
            half = self._workshop.back(command.cut, command.tail)
            self._halves[command.half] = half, Share(self._team, half)
            return
        half, share = self._halves[command.half]
        match command:
            case Load(owner=owner, version=version, entries=entries):
                half.keep_for(owner)
                half.load(version, self._team.take(entries))
                share.forget()
            case Call(method="begin_step", arguments=arguments):
                half.begin_step(int(arguments[0]))
                share.forget()
            case Call(method=method, arguments=arguments):
                getattr(half, method)(*arguments)
            case Forward(training=training, place=place):
                half.part.train(training)
                with _randomness(place, self._team.rank):
                    share.forward(command)
            case Backward():
                share.backward(command)


def _randomness(place: tuple[int, ...], rank: int) -> AbstractContextManager[None]:
    """Draw from the same place as the first process, and from this process's number; as torch does where it does."""
    if not place:
        return nullcontext()
    seed, client, round_, step, micro = place
    return randomness(seed, client, round_, step, micro, slice=rank)
