"""Cuts as other systems say them: `child:3` (the tutorial), `pipelearn:2`, and `ms:deep` (MaskSparsification)."""

from collections.abc import Callable, Iterator

from torch import nn

from zsplit.errors import PlanError


def _layers(*counts: int) -> tuple[str, ...]:
    """Return the blocks of a residual network after its stem; the last one's pooling belongs to it."""
    blocks = [f"layer{stage}.{n}" for stage, count in enumerate(counts, 1) for n in range(count)]
    return ("maxpool", *blocks[:-1], "avgpool")


PIPELEARN: dict[str, tuple[str, ...]] = {
    "pipelearn/vgg5": (*(f"block{n}" for n in range(1, 4)), "fc1"),
    "pipelearn/vgg11": (*(f"block{n}" for n in range(1, 9)), "drop1", "drop2"),
    "pipelearn/vgg16": (*(f"block{n}" for n in range(1, 14)), "drop1", "drop2"),
    "pipelearn/resnet18": _layers(2, 2, 2, 2),
    "pipelearn/resnet50": _layers(3, 4, 6, 3),
    "pipelearn/mobilenet_small": (*(f"features.{n}" for n in range(13)), "classifier.2"),
    "pipelearn/mobilenet_large": (*(f"features.{n}" for n in range(17)), "classifier.2"),
}
"""The module at whose end each of PipeLearn's layers ends (its `config.py`), all but the last, which ends the model."""

MS: dict[str, dict[str, str]] = {
    "ms/vgg19": {"shallow": "block2", "medium": "block8", "deep": "block15"},
    "ms/resnet18": {"shallow": "layer1.0", "medium": "layer2", "deep": "layer3"},
    "ms/resnet34": {"shallow": "layer1.0", "medium": "layer2", "deep": "layer3"},
}
"""MaskSparsification's cuts: after the 2nd, 8th and 15th layer of VGG19, the 2nd, 9th and 13th of ResNet18, the 2nd,
15th and 27th of ResNet34 (its README). Layers are convolutions on the main path; after the 2nd one a residual network
is in the middle of a block, and is cut at its end, as in its code."""


def name_model(model: nn.Module, name: str) -> None:
    """Remember on the model which one of the zoo it is, for the kinds of cuts that only that one has."""
    object.__setattr__(model, "zoo_name", name)


def resolve(model: nn.Module, key: str) -> str:
    """Return the place that a key such as `child:3` means: a module, whose end it is, or `input` or `output`.

    Raises PlanError for a kind that does not exist or that this model does not have, and for a number out of range.
    """
    kind, _, value = key.partition(":")
    if kind not in KINDS:
        raise PlanError(f"'{key}' is no cut: a kind is child:N, pipelearn:N or ms:shallow, ms:medium, ms:deep.")
    places = KINDS[kind](model)
    if not places:
        raise PlanError(f"'{key}' means nothing for {_name(model)}: {kind}: is for {', '.join(_OWNERS[kind])}.")
    if value not in places:
        raise PlanError(f"There is no '{key}' in {_name(model)}: {_range(kind, list(places))}.")
    return places[value]


def keys_of(model: nn.Module) -> Iterator[str]:
    """Yield every key that `resolve` answers for this model."""
    for kind, places in KINDS.items():
        yield from (f"{kind}:{value}" for value in places(model))


def _children(model: nn.Module) -> dict[str, str]:
    """The tutorial's `cut_layer`: after the child of this number, from 0, in `list(model.children())`."""
    return {str(n): name for n, (name, _) in enumerate(model.named_children())}


def _pipelearn(model: nn.Module) -> dict[str, str]:
    """PipeLearn's `layer_num_on_client`: so many layers are on the client, 0 none, -1 all."""
    layers = PIPELEARN.get(_zoo_name(model))
    return (
        {} if layers is None else {str(n): place for n, place in enumerate(("output", "input", *layers, "output"), -1)}
    )


def _ms(model: nn.Module) -> dict[str, str]:
    return MS.get(_zoo_name(model), {})


KINDS: dict[str, Callable[[nn.Module], dict[str, str]]] = {"child": _children, "pipelearn": _pipelearn, "ms": _ms}

_OWNERS = {"child": ["models that have children"], "pipelearn": list(PIPELEARN), "ms": list(MS)}


def _range(kind: str, values: list[str]) -> str:
    if kind == "ms":
        return f"there are {', '.join(f'ms:{value}' for value in values)}"
    return f"{kind}:N goes from {values[0]} to {values[-1]}"


def _zoo_name(model: nn.Module) -> str:
    return str(getattr(model, "zoo_name", ""))


def _name(model: nn.Module) -> str:
    return _zoo_name(model) or type(model).__name__
