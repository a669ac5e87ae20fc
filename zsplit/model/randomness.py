"""Randomness inside a model as a function of where a step stands, never of where the model is cut.

Every operation of a `Part` that draws from torch's default generator is preceded by `seed_node`, which
does nothing unless `randomness` is active. The generator belongs to the process: run one part at a time
under `randomness`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from zsplit.seeds import derive


class _Draws:
    """The seeds of one micro-batch. The generators' own states are kept when the first one is used."""

    def __init__(self, seed: int, *place: int) -> None:
        self.place = seed, *place
        self._kept: list[tuple[torch.Generator, torch.Tensor]] = []

    def seed(self, node: str) -> None:
        """Seed the generators for one node: those of the CPU, and of CUDA once it is in use."""
        generators = (torch.default_generator, *torch.cuda.default_generators)
        if not self._kept:
            self._kept = [(generator, generator.get_state()) for generator in generators]
        seed = derive(self.place[0], "dropout", *self.place[1:], node)
        for generator in generators:
            generator.manual_seed(seed)

    def restore(self) -> None:
        for generator, state in self._kept:
            generator.set_state(state)


_active: ContextVar[_Draws | None] = ContextVar("randomness", default=None)


@contextmanager
def randomness(seed: int, client: int, round: int, step: int, micro: int, slice: int = 0) -> Iterator[None]:
    """Draw everything random in parts from (seed, client, round, step, micro-batch, node's name).

    `step` counts over the round. Before each node N that draws, the default generators get the seed
    `derive(seed, "dropout", client, round, step, micro, N)`, as if by `torch.manual_seed`; on leaving they are as they
    were. Contexts do not nest. A model in which nothing is random costs nothing. Where several processes share a
    micro-batch, `slice` says whose part this is; every one but the first, 0, has that number in its seeds too.
    """
    draws = _Draws(seed, client, round, step, micro, *([slice] if slice else []))
    token = _active.set(draws)
    try:
        yield
    finally:
        _active.reset(token)
        draws.restore()


def place() -> tuple[int, ...]:
    """Return what everything random is drawn from now, as `randomness` takes it; nothing where it is not active."""
    draws = _active.get()
    return draws.place if draws is not None else ()


def seed_node(name: str) -> None:
    """Seed the default generators for the node of this name, where `randomness` is active."""
    draws = _active.get()
    if draws is not None:
        draws.seed(name)
