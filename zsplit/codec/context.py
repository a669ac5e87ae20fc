"""What both ends know of a tensor that went one way, for the one that answers it on the way back."""

from torch import Tensor


class Context:
    """The positions that a codec has kept of a tensor of this `shape`: int64, of the flat tensor, ascending.

    Encoding and decoding fill it in alike, so that `mask` can use it at both ends. `kept` is None where nothing was.
    """

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.kept: Tensor | None = None

    def keep(self, shape: tuple[int, ...], positions: Tensor) -> None:
        """Remember what was kept of a tensor."""
        self.shape, self.kept = shape, positions
