"""Where a run's model was cut, and the model with the run's codec there, as it was used split."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from zsplit.after.trained import Trained
from zsplit.codec.layer import CodecLayer
from zsplit.errors import ConfigError
from zsplit.model import trace


class Place(NamedTuple):
    """Where one client's model was cut, once or (U-shaped) twice, and the codec that its activations took there."""

    cuts: tuple[str, ...]
    codec: str


def places_of(summary: Mapping[str, Any]) -> dict[int, Place]:
    """Return the place of each client at the end of a run, from its summary; nothing where that does not say."""
    return {int(client): _place(plan) for client, plan in summary.get("plan", {}).items()}


def _place(plan: Mapping[str, Any]) -> Place:
    cuts = plan["cut"], plan.get("tail", "")
    return Place(tuple(cut for cut in cuts if cut), plan.get("up", "raw"))


def cuts_of(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """Return where a run was cut last; nothing where that is unknown or clients differed."""
    found = {place.cuts for place in places_of(summary).values()}
    return found.pop() if len(found) == 1 else ()


def coded(trained: Trained, cuts: Sequence[str], codec: str) -> nn.Module:
    """Return the model in evaluation mode with a layer at each cut that does what the codec does to activations there.

    Where the whole model is the client's, cut at its output, nothing takes a codec: that is the model as it is. Raises
    ConfigError as `check_cuts`, PlanError for a cut that does not exist.
    """
    check_cuts(cuts)
    traced = trace(trained.model, torch.zeros(2, *trained.shape, device=trained.device))
    front, *others = traced.split(*cuts)
    if traced.is_output(cuts[0]):
        return trained.model
    return nn.Sequential(front, *(layer for part in others for layer in (CodecLayer(codec), part))).eval()


def check_cuts(cuts: Sequence[str]) -> None:
    """Raise ConfigError unless these are one cut, or two for a U-shaped model."""
    if not cuts:
        raise ConfigError(
            "The run does not say where its model is cut, or not once for all: name the place with --cut."
        )
    if len(cuts) > 2:
        raise ConfigError(
            f"--cut names {len(cuts)} places: name one for front and back, two for front, middle and tail."
        )
