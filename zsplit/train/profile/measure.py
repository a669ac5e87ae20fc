"""What this peer takes for each stretch of the model: measured as training runs it, in bounded time."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Literal, NamedTuple

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from zsplit.config import Config
from zsplit.train.half import Workshop
from zsplit.train.profile.chain import Chain, Flight, OutOfMemory, Seconds, room
from zsplit.train.profile.overhead import Clock, Messenger, batch_seconds
from zsplit.train.profile.witness import Witness
from zsplit.wire.messages import Profile, Stretch

Peer = Literal["client", "server"]

SLICES = (1, 2, 4, 8, 16, 32)
"""Numbers of micro-batches whose slices are measured."""

TOGETHER = 3
"""Slices of a mini-batch that are measured one after the other, where there are so many."""


def measure(
    workshop: Workshop,
    config: Config,
    load: Callable[[], object] | None = None,
    role: Peer = "client",
    clock: Clock = time.perf_counter,
) -> Profile:
    """Return what every stretch of the model costs this peer, with the threads that torch has now.

    Forward and backward run as in training and in train mode, on a copy of the model: weights, buffers and random
    generators stay as they are. Seconds are medians over `plan.profile_steps` repetitions, all sizes in turn in each
    of them, after a warm-up. It takes about `plan.profile_seconds`; where that is too short, repetitions are left out
    first, then sizes in the middle. Largest and smallest size are measured at least once. `load` loads a mini-batch.
    `up` and `down` are without labels and headers.

    Where the memory is not enough, the profile holds what fits and `note` says so. All micro-batches of a client may
    be in flight, so a client needs room for the whole mini-batch: stretches for which there is none are missing from
    the end. A server has one slice at a time: sizes that do not fit are missing, and no slice may be larger.
    """
    until = clock() + config.plan.profile_seconds
    batch_norm = has_batch_norm(workshop)
    witness = Witness(workshop.traced.cuts, config.codec, role, clock)
    sizes = wanted = slice_sizes(config, batch_norm)
    stretches: list[Stretch] = []
    with Messenger(clock, config.codec.up) as messenger:
        try:
            with room():
                survey = Survey(Chain(workshop, config, clock), config, role, clock, until, messenger)
            sizes, stretches = survey.take(wanted, witness)
        except OutOfMemory:
            pass  # nothing fits
    cuts = tuple(cut.name for cut in workshop.traced.cuts)
    return Profile(
        cuts=cuts,
        up=tuple(witness.up),
        down=tuple(witness.down),
        sizes=tuple(sizes),
        stretches=tuple(stretches),
        encode=tuple(witness.encode) if any(witness.encode) else (),
        decode=tuple(witness.decode) if any(witness.decode) else (),
        batch_seconds=batch_seconds(load, clock) if load is not None else 0.0,
        message_seconds=messenger.seconds,
        batch_norm=batch_norm,
        note=note(cuts, len(stretches), sizes[-1] if sizes[-1] < wanted[-1] else None),
    )


def slice_sizes(config: Config, batch_norm: bool) -> list[int]:
    """Return the sizes of slices that are to be measured, ascending: of 1 to 32 slices, and of `micro_batches`.

    A slice of one sample is left out under BatchNorm, which needs two values for each channel.
    """
    batch = config.train.batch_size
    sizes = {batch // count for count in SLICES if count <= batch} | fixed_sizes(config)
    return sorted(sizes - {1} if batch_norm and batch > 1 else sizes)


def fixed_sizes(config: Config) -> set[int]:
    """Return the sizes of the slices that the config asks for, if it does."""
    batch, micros = config.train.batch_size, config.train.micro_batches
    return {batch // micros, -(-batch // micros)} if isinstance(micros, int) else set()


def has_batch_norm(workshop: Workshop) -> bool:
    """Whether the model has BatchNorm: then the size of a slice matters to what is learnt."""
    return any(isinstance(module, _BatchNorm) for module in workshop.model.modules())


def note(cuts: Sequence[str], depth: int, largest: int | None) -> str:
    """Return what a profile says about memory: `depth` stretches fit, slices of `largest` samples at most."""
    sentences: list[str] = []
    if depth == 0:
        sentences.append("Out of memory before the first cut: no cut is left.")
    elif depth <= len(cuts):
        sentences.append(
            f"Out of memory: '{cuts[depth - 1]}' is the last cut whose front fits, later cuts are excluded."
        )
    if depth and largest is not None:
        sentences.append(f"Out of memory: slices of more than {largest} samples do not fit.")
    return " ".join(sentences)


class Repetition(NamedTuple):
    """What every stretch took in one mini-batch's first slices of each size, and in the optimizer's step."""

    slices: dict[int, list[Seconds]]
    step: list[float]


class Survey:
    """Measures a chain as a peer of this role runs it, and a message after each size. `clock` stops it at `until`."""

    def __init__(
        self, chain: Chain, config: Config, role: Peer, clock: Clock, until: float, messenger: Messenger
    ) -> None:
        self._chain, self._config, self._role, self._messenger = chain, config, role, messenger
        self._clock, self._until = clock, until
        self._batch = config.train.batch_size
        self._depth = len(chain.parts)

    def take(self, sizes: Sequence[int], witness: Witness) -> tuple[list[int], list[Stretch]]:
        """Return the sizes that were measured and the figures of the stretches that fit.

        Raises OutOfMemory where there is not enough memory for anything.
        """
        limit = self._depth
        while True:
            sizes, cold = self._fit(sizes, limit, witness)
            try:
                chosen = self._warm(sizes, cold)
                done = self._repeat(chosen)
            except OutOfMemory:  # there was room for one slice, but not for several
                sizes, limit = (sizes[:-1], limit) if self._role == "server" else (sizes, self._depth - 1)
                continue
            return chosen, [self._figures(i, chosen, done, witness.saved[i]) for i in range(self._depth)]

    def _left(self) -> float:
        return self._until - self._clock()

    def _fit(self, sizes: Sequence[int], limit: int, witness: Witness) -> tuple[list[int], float]:
        """Return the sizes that there is memory for, and the seconds that the largest of them took.

        At most `limit` stretches of the chain are run: a server needs them all, a client those that fit.
        """
        for size in reversed(sizes):
            self._depth = limit
            while self._depth:
                began = self._clock()
                try:
                    self._try(size, witness)
                except OutOfMemory as error:
                    self._depth = 0 if self._role == "server" else min(error.fits, self._depth - 1)
                else:
                    return [each for each in sizes if each <= size], self._clock() - began
        raise OutOfMemory(0)

    def _try(self, size: int, witness: Witness) -> None:
        """Run a slice as deep as is hoped for, optimizer included, and see what it leaves in memory."""
        witness.begin(size, [tensor for i in range(self._depth) for tensor in self._chain.tensors(i)])
        self._chain.begin(1)
        self._chain.backward(self._chain.forward(self._chain.batch(size), self._depth, witness))
        self._chain.step(self._depth)

    def _warm(self, sizes: Sequence[int], cold: float) -> list[int]:
        """Run sizes for the first time, the largest excepted; return those that there is time for, ascending.

        `cold` are the seconds of the largest.
        """
        smallest, largest = sizes[0], sizes[-1]
        asked = fixed_sizes(self._config)
        chosen = {largest}
        for size in sorted(sizes[:-1], key=lambda each: (each != smallest, each not in asked, each)):
            samples = sum(each * self._together(each) for each in (*chosen, size, size))
            if size == smallest or cold * samples / largest < self._left():
                self._measure(size)
                chosen.add(size)
        return sorted(chosen)

    def _repeat(self, sizes: Sequence[int]) -> list[Repetition]:
        done: list[Repetition] = []
        took = 0.0
        while len(done) < max(1, self._config.plan.profile_steps) and (not done or took < self._left()):
            began = self._clock()
            done.append(Repetition(self._measure_all(sizes), self._chain.step(self._depth)))
            took = self._clock() - began
        return done

    def _measure_all(self, sizes: Sequence[int]) -> dict[int, list[Seconds]]:
        taken: dict[int, list[Seconds]] = {}
        for size in sizes:
            taken[size] = self._measure(size)
            self._messenger.pass_on()
        return taken

    def _measure(self, size: int) -> list[Seconds]:
        """Run the first slices of this size: a client all forward, then all backward, a server one after the other."""
        samples, together = self._chain.batch(size), range(self._together(size))
        self._chain.begin(self._count(size))
        if self._role == "server":
            return [self._chain.backward(self._forward(samples)) for _ in together]
        return [self._chain.backward(flight) for flight in [self._forward(samples) for _ in together]]

    def _forward(self, samples: Tensor) -> Flight:
        return self._chain.forward(samples, self._depth)

    def _count(self, size: int) -> int:
        """Return how many slices of this size a mini-batch has."""
        return max(1, round(self._batch / size))

    def _together(self, size: int) -> int:
        """Return how many of them are measured at a time."""
        return min(self._count(size), TOGETHER)

    def _figures(self, stretch: int, sizes: Sequence[int], done: Sequence[Repetition], saved: float) -> Stretch:
        def means(way: int) -> tuple[float, ...]:
            by_size = ([each.slices[size] for each in done] for size in sizes)
            taken = [[[slice[way][stretch] for slice in slices] for slices in same] for same in by_size]
            return tuple(map(self._mean, sizes, taken))

        return Stretch(
            forward=means(0),
            backward=means(1),
            step=median(each.step[stretch] for each in done),
            saved=saved,
            weights=sum(tensor.nbytes for tensor in self._chain.tensors(stretch)),
        )

    def _mean(self, size: int, measured: list[list[float]]) -> float:
        """Return what a slice takes, averaged over a mini-batch, from the seconds of its first ones in each repetition.

        The very first is unlike the others: it finds the caches cold, and no gradients to add its own to.
        """
        first = median(one[0] for one in measured)
        others = [seconds for one in measured for seconds in one[1:]]
        return max(0.0, first + (median(others) - first) * (1 - 1 / self._count(size)) if others else first)
