"""What a codec that compares values cannot take."""

from torch import Tensor

from zsplit.errors import RunFailedError


def refuse_infinite(*extremes: Tensor) -> None:
    """Raise RunFailedError where an extreme of a tensor is infinite or not a number: there is no grid for that."""
    if not all(bool(each.isfinite().all()) for each in extremes):
        raise RunFailedError(
            "The smashed data or their gradients have values that are infinite or not numbers, which this codec cannot "
            "carry: lower train.lr, or set train.clip_norm"
        )
