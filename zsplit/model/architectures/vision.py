"""Residual networks and MobileNets as PipeLearn and MaskSparsification use them: torchvision's, with another stem.

He et al., "Deep Residual Learning for Image Recognition" (2016); Howard et al., "Searching for MobileNetV3" (2019).
torchvision takes seconds to import, so that is done only where one of these is built.
"""

from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


def pipelearn_resnet18(num_classes: int, shape: Shape) -> nn.Module:
    """PipeLearn's ResNet18, for 32×32 as it is for 224×224: a 7×7 stem with stride 2 and a max-pool.

    Cut after the second of its layers, as all of PipeLearn's. Layers and initial weights are torchvision's. It pools
    before the classifier to one pixel whatever the size of the input; PipeLearn does not pool there, which at 32×32
    is the same and at larger sizes an error.
    """
    return _pipelearn("resnet18", "conv1", num_classes, shape)


def pipelearn_resnet50(num_classes: int, shape: Shape) -> nn.Module:
    """PipeLearn's ResNet50: the stem, 16 bottlenecks with the stride at their 3×3 convolution, and a dense layer.

    What is said of its ResNet18 holds here.
    """
    return _pipelearn("resnet50", "conv1", num_classes, shape)


def pipelearn_mobilenet_small(num_classes: int, shape: Shape) -> nn.Module:
    """PipeLearn's MobileNetSmall: MobileNetV3-Small, without dropout as there.

    PipeLearn's file with the blocks is not published; its table of layers is that of the paper (table 2), and the
    blocks here are torchvision's.
    """
    return _pipelearn("mobilenet_v3_small", "features.0.0", num_classes, shape, dropout=0.0)


def pipelearn_mobilenet_large(num_classes: int, shape: Shape) -> nn.Module:
    """PipeLearn's MobileNetLarge: MobileNetV3-Large, with the blocks of torchvision as the small one's.

    Dropout is 0.2: PipeLearn hands over 0.8, which in the paper's training (section 6.1.1) is what is kept.
    """
    return _pipelearn("mobilenet_v3_large", "features.0.0", num_classes, shape, dropout=0.2)


class _Softmax(nn.Linear):
    """A linear layer that gives probabilities."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.softmax(super().forward(input), dim=1)


def tutorial_resnet18_softmax(num_classes: int, _: Shape) -> nn.Module:
    """torchvision's ResNet18 with a softmax at its end, as the split-learning tutorial trains it.

    The loss takes logits and gets probabilities: a mistake there, which its accuracy includes, and here a variant to
    compare with. Parameters keep torchvision's names.
    """
    model: nn.Module = _torchvision("resnet18", num_classes)
    plain = model.get_submodule("fc")
    assert isinstance(plain, nn.Linear)
    classifier = _Softmax(plain.in_features, num_classes)
    classifier.load_state_dict(plain.state_dict())
    model.register_module("fc", classifier)
    return model


def ms_resnet18(num_classes: int, shape: Shape) -> nn.Module:
    """MaskSparsification's ResNet18 for CIFAR-100: a 3×3 stem without stride and no max-pool.

    Initial weights are torch's own, as there. In its code the shallow front has two convolutions in place of the
    first block, without the ReLU between them and without the shortcut, and a server after the deep cut carries
    layers that it does not use; here every cut is one of the same network.
    """
    channels, _, _ = shape
    model = _torchvision("resnet18", num_classes)
    model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return _with_torchs_weights(model)


def ms_resnet34(num_classes: int, shape: Shape) -> nn.Module:
    """MaskSparsification's ResNet34 for ImageNet: torchvision's. What is said of its ResNet18 holds here."""
    channels, _, _ = shape
    return _with_torchs_weights(_with_channels(_torchvision("resnet34", num_classes), "conv1", channels))


def _pipelearn(name: str, stem: str, num_classes: int, shape: Shape, **options: float) -> nn.Module:
    channels, _, _ = shape
    return _with_channels(_torchvision(name, num_classes, **options), stem, channels)


def _torchvision(name: str, num_classes: int, **options: float) -> Any:
    from torchvision import models

    zoo: Any = models  # which does not say what it exports
    return zoo.get_model(name, weights=None, num_classes=num_classes, **options)


def _with_channels(model: nn.Module, stem: str, channels: int) -> nn.Module:
    """Give the model a first convolution that takes so many channels, its weights drawn as torchvision draws them."""
    first = model.get_submodule(stem)
    if isinstance(first, nn.Conv2d) and first.in_channels != channels:
        first.in_channels = channels
        first.weight = nn.Parameter(torch.empty(first.out_channels, channels, *first.kernel_size))
        nn.init.kaiming_normal_(first.weight, mode="fan_out", nonlinearity="relu")
    return model


def _with_torchs_weights(model: nn.Module) -> nn.Module:
    """Draw the convolutions' weights as torch does by itself, in the place of torchvision's own way."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    return model
