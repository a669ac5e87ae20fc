"""The loss, at whichever side has the labels: training's backward pass from it, and the scores of an evaluation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from zsplit.errors import ConfigError


def learn(outputs: Tensor, labels: Tensor, batch: int) -> float:
    """Go backward from the mean loss of a slice, weighted by its share of the mini-batch; return that mean loss.

    `outputs` (b, classes) and `labels` (b,) are those of a slice of `batch` samples. Raises as `check_labels` does.
    """
    check_labels(labels, outputs)
    loss = F.cross_entropy(outputs, labels)
    torch.autograd.backward(loss * (len(labels) / batch))
    return float(loss.detach())


def check_labels(labels: Tensor, outputs: Tensor) -> None:
    """Raise ConfigError unless the outputs are logits (batch, classes) with one for each of the labels."""
    if outputs.ndim != 2:
        raise ConfigError(f"The model's output has {outputs.ndim} dimensions: training needs logits (batch, classes)")
    if int(labels.max()) >= outputs.shape[1]:
        raise ConfigError(
            f"The data has the label {int(labels.max())}, the model only {outputs.shape[1]} outputs: "
            "give it one for each class (model.num_classes)"
        )


def score(outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """Return loss, top-1 and top-5 summed over samples, in float64 and exactly."""
    losses = F.cross_entropy(outputs, labels, reduction="none").double().sum()
    ranked = outputs.topk(min(5, outputs.shape[1]), dim=1).indices == labels[:, None]
    return {
        "loss": float(losses),
        "top1": float(ranked[:, 0].sum()),
        "top5": float(ranked.any(dim=1).sum()),
        "samples": float(len(labels)),
    }
