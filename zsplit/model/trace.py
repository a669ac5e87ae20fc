"""Where a model can be cut, what is on either side of each cut, and cutting it."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from math import prod

from torch import Tensor, nn

from zsplit.errors import PlanError
from zsplit.model.part import Part
from zsplit.model.passes import ForwardPass, Inventory, Stretch


@dataclass(frozen=True)
class CutPoint:
    """A place where exactly one tensor crosses, named after the module or operation that makes it.

    `index` counts from 0 in the order of execution. `shape` is that of one sample, without the batch; `dtype` is
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


class Traced:
    """A model, its forward pass in each mode, and the places where it can be cut, in order. Made by `trace`."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.model = model
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

        Raises PlanError where there is none, naming the nearest ones.
        """
        if not self.cuts:
            raise PlanError(f"{self._kind} cannot be cut: nowhere in it does exactly one tensor cross.")
        name = key.name if isinstance(key, CutPoint) else str(key)
        named = [cut for cut in self.cuts if cut.name == name]
        if named and not isinstance(key, int):
            return named[0]
        if isinstance(key, int) or name.isdecimal():
            return self._at(int(name))
        if any(each.position(name) is not None for each in (self._training, self._evaluation)):
            raise PlanError(self._cannot(name))
        inside = [node for node in self._training.names.values() if node.startswith(f"{name}.")]
        if inside:
            return self.cut(inside[-1])
        raise PlanError(self._unknown(name))

    def split(self, *cuts: Cut) -> tuple[Part, ...]:
        """Return the parts: front and back for one cut, front, middle and tail for two, the whole for none.

        Their state_dicts hold, together and without overlap, what the model's holds. Raises PlanError for a cut that
        does not exist, and for cuts that are not in the model's order.
        """
        points = [self.cut(cut) for cut in cuts]
        for one, other in pairwise(points):
            if other.index <= one.index:
                raise PlanError(f"The cut {other} does not come after {one}: give the cuts in the model's order.")
        stretches = self._stretches(*(point.name for point in points))
        shares = self._inventory.deal([self._reads(stretch) for stretch in stretches])
        parts = tuple(Part(self.model, *both) for both in zip(shares, stretches, strict=True))
        self._check_state(parts)
        return parts
