"""Models by name: torchvision's classification models, those of the systems that we follow, and one's own.

torchvision takes seconds to import, so that is done only where one of its models is asked for.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from zsplit import own
from zsplit.errors import ConfigError
from zsplit.model.architectures import small, vgg, vision
from zsplit.model.kinds import name_model
from zsplit.model.tracer import first_line
from zsplit.seeds import derive

Shape = tuple[int, ...]

SMALL, ONE, USUAL = (3, 32, 32), (1, 28, 28), (3, 224, 224)


@dataclass(frozen=True)
class Entry:
    """A model of our own: how it is built from number of classes and input shape, its usual input and cut."""

    build: Callable[[int, Shape], nn.Module]
    input: Shape
    cut: str


OWN = {
    "digits/cnn": Entry(small.digits_cnn, (1, 8, 8), "pool"),
    "splitnn/mlp": Entry(small.splitnn_mlp, ONE, "relu2"),
    "pipelearn/vgg5": Entry(vgg.pipelearn_vgg5, SMALL, "block2.pool"),
    "pipelearn/vgg11": Entry(vgg.pipelearn_vgg11, SMALL, "block2.pool"),
    "pipelearn/vgg16": Entry(vgg.pipelearn_vgg16, SMALL, "block2.pool"),
    "pipelearn/resnet18": Entry(vision.pipelearn_resnet18, SMALL, "layer1.0.relu_1"),
    "pipelearn/resnet50": Entry(vision.pipelearn_resnet50, SMALL, "layer1.0.relu_2"),
    "pipelearn/mobilenet_small": Entry(vision.pipelearn_mobilenet_small, SMALL, "features.1.block.2.1"),
    "pipelearn/mobilenet_large": Entry(vision.pipelearn_mobilenet_large, SMALL, "features.1.add"),
    "tutorial/resnet18-softmax": Entry(vision.tutorial_resnet18_softmax, SMALL, "maxpool"),
    "ms/vgg19": Entry(vgg.ms_vgg19, SMALL, "block2.pool"),
    "ms/resnet18": Entry(vision.ms_resnet18, SMALL, "layer1.0.relu_1"),
    "ms/resnet34": Entry(vision.ms_resnet34, USUAL, "layer1.0.relu_1"),
}


def names() -> list[str]:
    """Return the names of all models but one's own."""
    models = _torchvision_models()
    return [*OWN, *models.list_models(module=models)]


def build(name: str, num_classes: int, seed: int, input_shape: Shape, allowed: Collection[str] = ()) -> nn.Module:
    """Return a new model for inputs of this shape (channels, height, width), without pretrained weights.

    Its initial weights are those that follow `torch.manual_seed(derive(seed, "init"))`; the caller's random state
    stays as it is. `package.module:function` is called with number of classes and shape, where the module is among
    the `allowed` (see `zsplit.own`). Raises ConfigError for an unknown name, for a function that cannot be used, and
    for a shape that the model cannot be built for.
    """
    _check_known(name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, "init"))
        if _is_ones_own(name):
            return own.make(name, allowed, "model.name", nn.Module, num_classes, input_shape)
        try:
            model = (
                OWN[name].build(num_classes, input_shape) if name in OWN else _vision(name, num_classes, input_shape)
            )
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"{name} cannot be built for inputs of {_show(input_shape)} ({first_line(error)}): "
                f"its usual input is {_show(default_input(name))}."
            ) from error
    name_model(model, name)
    return model


def default_input(name: str) -> Shape:
    """Return the shape of input (channels, height, width) that the model was made for.

    Raises ConfigError for an unknown model, and for one's own, which does not say.
    """
    _check_known(name)
    if _is_ones_own(name):
        raise ConfigError(f"{name} does not tell the shape of its input: give it, with --input or as model.input.")
    if name in OWN:
        return OWN[name].input
    return (3, 299, 299) if name == "inception_v3" else USUAL


def default_cut(name: str) -> str | None:
    """Return where the model is cut by custom, or None. Raises ConfigError."""
    _check_known(name)
    return OWN[name].cut if name in OWN else None


def _vision(name: str, num_classes: int, shape: Shape) -> nn.Module:
    channels, height, width = shape
    if channels != 3:
        raise ValueError(f"it takes images of 3 channels, not {channels}")
    special: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        special = {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        special = {"image_size": height}
    elif name.startswith("maxvit_"):
        special = {"input_size": (height, width)}
    model: nn.Module = _torchvision_models().get_model(name, weights=None, num_classes=num_classes, **special)
    return model


def _torchvision_models() -> Any:
    from torchvision import models

    return models


def _is_ones_own(name: str) -> bool:
    return ":" in name


def _check_known(name: str) -> None:
    if name in OWN or _is_ones_own(name):
        return
    known = names()
    if name not in known:
        near = get_close_matches(name, known, cutoff=0.5) or list(OWN)
        raise ConfigError(
            f"There is no model '{name}': the nearest names are {', '.join(near)}; "
            "torchvision's classification models have their own names."
        )


def _show(shape: Shape) -> str:
    return "×".join(map(str, shape))
