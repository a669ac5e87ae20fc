"""Small networks for tests, importable by the processes that train them."""

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block with BatchNorm, in-place ReLUs used twice, and dropout."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.2)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.relu(self.bn1(self.conv1(x))))
        return self.relu(self.conv2(y) + x)


class SmallResidual(nn.Module):
    """For 1x8x8 inputs and 10 classes; its random modules are `block.drop` and `drop`."""

    RANDOM = ("block.drop", "drop")

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.block = Block(4)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.flatten = nn.Flatten()
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.flatten(self.pool(self.block(self.stem(x))))))


class Normed(nn.Module):
    """BatchNorm on either side of `relu`: run twice, with a momentum of its own, in one dimension, without weights."""

    RANDOM = ()

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.conv3 = nn.Conv2d(4, 6, 3, stride=2, bias=False)
        self.bn2 = nn.BatchNorm2d(6, momentum=0.5)
        self.flatten = nn.Flatten(2)
        self.bn3 = nn.BatchNorm1d(6, momentum=0.3, affine=False)
        self.fc = nn.Linear(54, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv2(self.bn1(self.conv1(x)))))
        x = self.bn3(self.flatten(self.bn2(self.conv3(x))))
        return self.fc(x.flatten(1))


class Plain(nn.Module):
    """A small network with nothing special: 1x8x8 inputs, 10 classes."""

    RANDOM = ()

    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(64, 12)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Linear(12, 12)
        self.relu2 = nn.ReLU()
        self.fc3 = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.relu2(self.fc2(self.relu1(self.fc1(self.flatten(x))))))


class Stack(nn.Module):
    """Two halves, to be cut at `front.3`: BatchNorm and dropout in each. 1x8x8 inputs, 10 classes."""

    RANDOM = ("front.3", "back.2")

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2))
        self.back = nn.Sequential(
            nn.Conv2d(4, 3, 3, stride=2), nn.BatchNorm2d(3), nn.Dropout(0.3), nn.Flatten(), nn.Linear(27, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.front(x))


def images(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return random images (count, 1, 8, 8) and labels of 10 classes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 8, 8, generator=generator), torch.randint(10, (count,), generator=generator)


def plain(_: int, __: tuple[int, ...]) -> nn.Module:
    """What a config names as `nets:plain`."""
    return Plain()


def normed(_: int, __: tuple[int, ...]) -> nn.Module:
    """What a config names as `nets:normed`."""
    return Normed()


def dropping(_: int, __: tuple[int, ...]) -> nn.Module:
    """What a config names as `nets:dropping`."""
    return Stack()


class Idle(nn.Module):
    """Behind `fc1` are a parameter that the forward pass does not use, a frozen one, and none at all behind `relu`."""

    RANDOM = ()

    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(64, 12)
        self.fc2 = nn.Linear(12, 10)
        self.fc2.bias.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3))
        self.relu = nn.ReLU()
        self.flatten2 = nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        x = self.flatten(x)
        return self.flatten2(self.relu(self.fc2(self.fc1(x))))


def idle(_: int, __: tuple[int, ...]) -> nn.Module:
    """What a config names as `nets:idle`."""
    return Idle()
