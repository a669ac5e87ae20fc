"""Models by name: torchvision's classification models under their bare names, and a few small ones of our own.

torchvision takes seconds to import, so that is done only where one of its models is asked for.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from math import prod
from typing import Any, cast

import torch
from torch import nn

from zsplit.errors import ConfigError
from zsplit.model.tracer import first_line
from zsplit.seeds import derive

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A model of our own: how it is built from number of classes and input shape, its usual input and cut."""

    build: Callable[[int, Shape], nn.Module]
    input: Shape
    cut: str


def _digits_cnn(num_classes: int, shape: Shape) -> nn.Module:
    """Two convolutions and two linear layers, for the 8×8 digits: 150,000 parameters, most behind the pooling."""
    channels, height, width = shape
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 32, 3, padding=1),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(32, 64, 3, padding=1),
            relu2=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(64 * (height // 2) * (width // 2), 128),
            relu3=nn.ReLU(),
            fc2=nn.Linear(128, num_classes),
        )
    )


def _splitnn_mlp(num_classes: int, shape: Shape) -> nn.Module:
    """PySyft's SplitNN tutorial: 784-128-640-10, cut after the second ReLU.

    It ends in logits, for cross-entropy; the tutorial's LogSoftmax with NLLLoss is the same.
    """
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(prod(shape), 128),
            relu1=nn.ReLU(),
            fc2=nn.Linear(128, 640),
            relu2=nn.ReLU(),
            fc3=nn.Linear(640, num_classes),
        )
    )


def _pipelearn_vgg5(num_classes: int, shape: Shape) -> nn.Module:
    """PipeLearn's VGG5, layer for layer: three blocks of convolution, BatchNorm and ReLU, then two linear layers.

    Its initial weights are drawn as there (Xavier's uniform distribution, biases 0). Nothing non-linear stands between
    the two linear layers there, so nothing does here: they learn no more than one would, but the time of a step
    compares. The faulty dropout of PipeLearn's dense layers is not used by its VGG5. Cut after the second block.
    """
    channels, height, width = shape
    model = nn.Sequential(
        OrderedDict(
            block1=_block(channels, 32, nn.MaxPool2d(2)),
            block2=_block(32, 64, nn.MaxPool2d(2)),
            block3=_block(64, 64),
            flatten=nn.Flatten(),
            fc1=nn.Linear(64 * (height // 4) * (width // 4), 128),
            fc2=nn.Linear(128, num_classes),
        )
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(cast(nn.Parameter, module.bias))
    return model


def _block(channels: int, outputs: int, pool: nn.Module | None = None) -> nn.Module:
    layers: dict[str, nn.Module] = {
        "conv": nn.Conv2d(channels, outputs, 3, padding=1),
        "norm": nn.BatchNorm2d(outputs),
        "relu": nn.ReLU(inplace=True),
    }
    return nn.Sequential(OrderedDict(layers if pool is None else {**layers, "pool": pool}))


OWN = {
    "digits/cnn": Entry(_digits_cnn, (1, 8, 8), "pool"),
    "splitnn/mlp": Entry(_splitnn_mlp, (1, 28, 28), "relu2"),
    "pipelearn/vgg5": Entry(_pipelearn_vgg5, (3, 32, 32), "block2.pool"),
}


def names() -> list[str]:
    """Return the names of all models."""
    models = _torchvision_models()
    return [*OWN, *models.list_models(module=models)]


def build(name: str, num_classes: int, seed: int, input_shape: Shape) -> nn.Module:
    """Return a new model for inputs of this shape (channels, height, width), without pretrained weights.

    Its initial weights are those that follow `torch.manual_seed(derive(seed, "init"))`; the caller's random state
    stays as it is. Raises ConfigError for an unknown name, and for a shape that the model cannot be built for.
    """
    _check_known(name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, "init"))
        try:
            return OWN[name].build(num_classes, input_shape) if name in OWN else _vision(name, num_classes, input_shape)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"{name} cannot be built for inputs of {_show(input_shape)} ({first_line(error)}): "
                f"its usual input is {_show(default_input(name))}."
            ) from error


def default_input(name: str) -> Shape:
    """Return the shape of input (channels, height, width) that the model was made for. Raises ConfigError."""
    _check_known(name)
    if name in OWN:
        return OWN[name].input
    return (3, 299, 299) if name == "inception_v3" else (3, 224, 224)


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


def _check_known(name: str) -> None:
    if name in OWN:
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
