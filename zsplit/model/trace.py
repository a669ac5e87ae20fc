"""Where a model can be cut, what is on either side of each cut, and cutting it."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from zsplit.errors import PlanError
from zsplit.model.kinds import keys_of, resolve
from zsplit.model.part import Part
from zsplit.model.passes import ForwardPass, Inventory, Pair, Sample


@dataclass(frozen=True)
class CutPoint:
    """A place where exactly one tensor crosses, named after the module or operation that makes it.

    `index` counts from 0 in the order of execution; the two ends of the model have −1 (`input`) and the number of cuts
    (`output`). `shape` is that of one sample, without the batch; `dtype` is
    torch's name without the package (`float32`). Parameters are counted in numbers, tied ones once. FLOPs are
    those of the forward pass of one sample in matrix products, convolutions and attention; a multiply-add is 2.
    """

    index: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes_per_sample: int
    front_params: int
    back_params: int
    front_flops: int
    back_flops: int

    def __str__(self) -> str:
        return f"'{self.name}' ({self.index})"


Cut = CutPoint | str | int
"""What a cut may be given as."""

INPUT, OUTPUT = "input", "output"
"""The names of the two ends of a model, which are cuts as well: nothing before the one, nothing behind the other."""


class Traced:
    """A model, its forward pass in each mode, and the places where it can be cut, in order. Made by `trace`.

    `shape` is that of one sample.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.model = model
        self.shape = tuple(example.shape[1:])
        self._dtype = example.dtype
        self._kind = type(model).__name__
        self._inventory = Inventory(model)
        # Two sizes of batch: a dimension that has both is the batch. BatchNorm needs two samples.
        batch = max(2, len(example))
        self._training = ForwardPass(model, self._inventory, example, True, batch)
        self._evaluation = ForwardPass(model, self._inventory, example, False, batch + 1)
        self._refused: dict[str, str] = {}
        self.cuts: tuple[CutPoint, ...] = tuple(self._find_cuts())

    def cut(self, key: Cut) -> CutPoint:
        """Return the cut of this name or index (also in digits); a module's name stands for its last operation.

        `input` and `output` are the ends of the model, unless a cut inside it has that name; `child:3`, `pipelearn:2`
        and `ms:deep` are cuts as other systems say them (`zsplit.model.kinds`). Raises PlanError where there is none,
        naming the nearest ones.
        """
        name = key.name if isinstance(key, CutPoint) else str(key)
        named = [cut for cut in self.cuts if cut.name == name]
        if named and not isinstance(key, int):
            return named[0]
        if name in self.ends:
            return self.ends[name]
        if ":" in name:
            return self._end_of(resolve(self.model, name))
        if not self.cuts:
            raise PlanError(self._uncuttable(name))
        if isinstance(key, int) or name.isdecimal():
            return self._at(int(name))
        if any(each.position(name) is not None for each in (self._training, self._evaluation)):
            raise PlanError(self._cannot(name))
        inside = [node for node in self._training.names.values() if node.startswith(f"{name}.")]
        if inside:
            return self.cut(inside[-1])
        raise PlanError(self._unknown(name))

    def aliases(self) -> dict[str, list[str]]:
        """Return for the names of cuts what other systems call these places (`child:3`, …), where they do."""
        known: dict[str, list[str]] = {}
        for key in keys_of(self.model):
            with suppress(PlanError):
                known.setdefault(self.cut(key).name, []).append(key)
        return known

    def split(self, *cuts: Cut) -> tuple[Part, ...]:
        """Return the parts: front and back for one cut, front, middle and tail for two, the whole for none.

        Their state_dicts hold, together and without overlap, what the model's holds. Raises PlanError for a cut that
        does not exist, and for cuts that are not in the model's order.
        """
        parts = self._parts([[pair] for pair in self._between(cuts)])
        self._check_state(parts)
        return parts

    def ends_apart(self, cut: Cut, tail: Cut) -> tuple[Part, Part]:
        """Return front and tail as one part of two stretches, 0 and 1, and the middle between the two cuts.

        So whoever has both ends has one set of names and one optimizer. Raises PlanError as `split` does.
        """
        front, middle, last = self._between((cut, tail))
        parts = self._parts([[front, last], [middle]])
        self._check_state(parts)
        return parts[0], parts[1]

    @cached_property
    def ends(self) -> dict[str, CutPoint]:
        """The two ends of the model by name. An output that is no tensor with the batch first has no shape."""
        (pair,) = self._stretches()
        parameters = self._inventory.parameters(self._inventory.deal([_reads(pair)])[0])
        flops = pair[0].flops
        shape, dtype = self._training.result() or ((), None)
        return {
            INPUT: _point(-1, INPUT, self.shape, self._dtype, (0, parameters), (0, flops)),
            OUTPUT: _point(len(self.cuts), OUTPUT, shape, dtype, (parameters, 0), (flops, 0)),
        }

    def is_input(self, cut: Cut) -> bool:
        """Whether a cut is the one before the whole model."""
        return self.cut(cut).index < 0

    def is_output(self, cut: Cut) -> bool:
        """Whether a cut is the one behind the whole model."""
        return self.cut(cut).index == len(self.cuts)

    def chain(self) -> tuple[Part, ...]:
        """Return the parts between all neighbouring cuts, to be run one after the other, as the uncut model runs.

        What one gives belongs to the next, which may change it in place where the model does.
        """
        return self._parts([[pair] for pair in self._between(self.cuts)], owns=True)

    def _parts(self, groups: Sequence[Sequence[Pair]], owns: bool = False) -> tuple[Part, ...]:
        """Return a part for each group of stretches."""
        shares = self._inventory.deal([set().union(*map(_reads, pairs)) for pairs in groups])
        return tuple(Part(self.model, names, *pairs, owns=owns) for names, pairs in zip(shares, groups, strict=True))

    def _between(self, cuts: Sequence[Cut]) -> list[Pair]:
        """Return the stretches between these cuts and the ends of the model; at an end itself, nothing."""
        points = [self.cut(cut) for cut in cuts]
        for one, other in pairwise(points):
            if other.index <= one.index:
                raise PlanError(f"The cut {other} does not come after {one}: give the cuts in the model's order.")
        stretches = self._stretches(*(point.name for point in points if 0 <= point.index < len(self.cuts)))
        nothing = self._training.nothing(), self._evaluation.nothing()
        before = [nothing] if points and points[0].index < 0 else []
        behind = [nothing] if points and points[-1].index == len(self.cuts) else []
        return [*before, *stretches, *behind]

    def _find_cuts(self) -> Iterator[CutPoint]:
        index, last = 0, -1
        for name in self._training.places:
            sample = self._training.sample(name)
            refusal = self._refusal(name, sample, last)
            if refusal or sample is None:
                self._refused[name] = refusal
            else:
                yield self._point(index, name, *sample)
                index, last = index + 1, self._evaluation.places[name]

    def _refusal(self, name: str, sample: Sample | None, last: int) -> str:
        """Return why there is no cut where in training mode one `sample` crosses, or nothing.

        `last` is the position of the cut before it in evaluation mode.
        """
        if name not in self._evaluation.places:
            return f"in evaluation mode {self._evaluation.obstacle(name)}"
        if self._evaluation.places[name] <= last:
            return "operations run in another order in evaluation mode"
        if sample is None or sample != self._evaluation.sample(name):
            return "what crosses there is not a floating-point tensor with the batch as its first dimension"
        front, back = map(_reads, self._stretches(name))
        if both := sorted(front & back):
            return f"'{both[0]}' is used on both sides, and tied parameters and shared buffers have to stay on one"
        return ""

    def _point(self, index: int, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> CutPoint:
        pairs = self._stretches(name)
        front, back = map(self._inventory.parameters, self._inventory.deal([_reads(pair) for pair in pairs]))
        return _point(index, name, shape, dtype, (front, back), (pairs[0][0].flops, pairs[1][0].flops))

    def _stretches(self, *places: str) -> list[Pair]:
        """Return the parts between these places and the ends of the model, in both modes."""
        passes = self._training, self._evaluation
        ends = pairwise((None, *places, None))
        return [(passes[0].stretch(takes, gives), passes[1].stretch(takes, gives)) for takes, gives in ends]

    def _check_state(self, parts: Sequence[Part]) -> None:
        held = {name for part in parts for name in part.state_dict()}
        if other := self.model.state_dict().keys() - held:
            raise PlanError(
                f"The state of {self._kind} holds {sorted(other)[0]!r}, which is neither a parameter nor a buffer "
                "and would be lost: make it a buffer."
            )

    def _end_of(self, path: str) -> CutPoint:
        """Return the cut at the end of a module, whose name may be a number, or at an end of the model."""
        inside = [node for node in self._training.names.values() if node == path or node.startswith(f"{path}.")]
        last = "output" if inside and self._training.is_output(inside[-1]) else [path, *inside][-1]
        if last in ("input", "output"):
            return self.cut(last)
        for cut in self.cuts:
            if cut.name == last:
                return cut
        raise PlanError(self._cannot(last) if inside else self._unknown(path))

    def _at(self, index: int) -> CutPoint:
        if not 0 <= index < len(self.cuts):
            raise PlanError(f"There is no cut {index}: {self._extent()}.")
        return self.cuts[index]

    def _uncuttable(self, name: str) -> str:
        """Return the sentence for a model without cuts."""
        for place in (name, *self._refused):
            if place in self._refused:
                return f"{self._kind} has no cut: one tensor crosses at '{place}', but {self._refused[place]}."
        return f"{self._kind} has no cut: nowhere in it does exactly one tensor cross."

    def _extent(self) -> str:
        return f"the cuts of {self._kind} go from {self.cuts[0]} to {self.cuts[-1]}, and `zsplit cuts` lists them"

    def _cannot(self, name: str) -> str:
        """Return the sentence for a node after which there is no cut."""
        here = self._evaluation if self._training.position(name) is None else self._training
        position = here.position(name) or 0
        before = [cut for cut in self.cuts if here.places[cut.name] < position]
        after = [cut for cut in self.cuts if here.places[cut.name] >= position]
        nearest = [f"{cut} before it" for cut in before[-1:]] + [f"{cut} after it" for cut in after[:1]]
        reason = self._refused.get(name) or self._training.obstacle(name)
        return (
            f"{self._kind} cannot be cut at '{name}', since {reason}: "
            f"take {' or '.join(nearest)}; `zsplit cuts` lists all cuts."
        )

    def _unknown(self, name: str) -> str:
        """Return the sentence for a name that is nothing in the model."""
        cuts = {cut.name: cut for cut in self.cuts}
        near = ", ".join(str(cuts[one]) for one in get_close_matches(name, cuts, cutoff=0.5))
        hint = f"the nearest cuts are {near}, and `zsplit cuts` lists all" if near else self._extent()
        return f"There is no '{name}' in {self._kind}: {hint}."


def _reads(pair: Pair) -> set[str]:
    return pair[0].reads | pair[1].reads


def _point(
    index: int,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype | None,
    params: tuple[int, int],
    flops: tuple[int, int],
) -> CutPoint:
    """Return a cut; without a dtype, what crosses there is no tensor."""
    return CutPoint(
        index=index,
        name=name,
        shape=shape,
        dtype=str(dtype).removeprefix("torch.") if dtype else "",
        bytes_per_sample=prod(shape) * dtype.itemsize if dtype else 0,
        front_params=params[0],
        back_params=params[1],
        front_flops=flops[0],
        back_flops=flops[1],
    )


def trace(model: nn.Module, example: Tensor) -> Traced:
    """Follow the model's forward pass in training and in evaluation mode and find where it can be cut.

    `example` is a batch like those that the model will see: its first dimension is the batch, of any size,
    and only its shape, dtype and device matter. The model is left as it is: its modes, buffers and the random
    generators. torch.fx patches `nn.Module` while it follows: let no other thread run a module meanwhile. Raises
    PlanError for a model that torch.fx cannot follow, and for an example that it cannot run on.
    """
    if example.dim() == 0 or len(example) == 0:
        raise PlanError(f"An example of shape {list(example.shape)} is no batch: give it a first dimension of samples.")
    if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        raise PlanError(f"{type(model).__name__} has lazy modules without weights: run it once on a batch first.")
    return Traced(model, example)


def cut_points(model: nn.Module, example: Tensor) -> list[CutPoint]:
    """Return every place where the model can be cut, in order. See `trace`."""
    return list(trace(model, example).cuts)


def split(model: nn.Module, example: Tensor, *cuts: Cut) -> tuple[Part, ...]:
    """Return the parts of the model: front and back for one cut, front, middle and tail for two. See `Traced.split`."""
    return trace(model, example).split(*cuts)
