"""Networks for small images of one channel, such as digits."""

from collections import OrderedDict
from math import prod

from torch import nn

Shape = tuple[int, ...]


def digits_cnn(num_classes: int, shape: Shape) -> nn.Module:
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


def splitnn_mlp(num_classes: int, shape: Shape) -> nn.Module:
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
