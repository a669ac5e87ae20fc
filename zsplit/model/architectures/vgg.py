"""VGG for small images, as PipeLearn and MaskSparsification write it: blocks of convolution, BatchNorm and ReLU.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (2015), table 1: VGG11 is
its configuration A, VGG16 its D, VGG19 its E. A pooling rounds up, which changes nothing at 32×32; at 28×28, where
five poolings that round down leave nothing (PipeLearn's VGG11 and VGG16 stop there with an error), one pixel is left.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

from torch import nn

Shape = tuple[int, ...]

POOL = 0
"""Stands between the blocks' numbers of channels for a pooling at the end of the block before it."""

VGG5 = (32, POOL, 64, POOL, 64)
VGG11 = (64, POOL, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL)
VGG16 = (64, 64, POOL, 128, 128, POOL, *(256,) * 3, POOL, *(512,) * 3, POOL, *(512,) * 3, POOL)
VGG19 = (64, 64, POOL, 128, 128, POOL, *(256,) * 4, POOL, *(512,) * 4, POOL, *(512,) * 4, POOL)


def pipelearn_vgg5(num_classes: int, shape: Shape) -> nn.Module:
    """PipeLearn's VGG5, layer for layer: three blocks of convolution, BatchNorm and ReLU, then two linear layers.

    Its initial weights are drawn as there (Xavier's uniform distribution, biases 0). Nothing non-linear stands between
    the two linear layers there, so nothing does here: they learn no more than one would, but the time of a step
    compares. The faulty dropout of PipeLearn's dense layers is not used by its VGG5. Cut after the second block.
    """
    blocks, features = _blocks(shape, VGG5)
    layers = {
        **blocks,
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(features, 128),
        "fc2": nn.Linear(128, num_classes),
    }
    return _with_xavier(nn.Sequential(OrderedDict(layers)))


def pipelearn_vgg11(num_classes: int, shape: Shape) -> nn.Module:
    """PipeLearn's VGG11: eight blocks and three dense layers, initial weights as in its VGG5. Cut after block 2.

    As published it cannot run: where a dense layer has dropout (0.5), that is given the layer's input, so that the
    linear layer is discarded and 512 features meet a layer for 4096. Here dropout follows the linear layer, and
    between them stands the ReLU of the paper (section 2.1), which PipeLearn leaves out.
    """
    return _with_xavier(_wide(num_classes, shape, VGG11))


def pipelearn_vgg16(num_classes: int, shape: Shape) -> nn.Module:
    """PipeLearn's VGG16: thirteen blocks and three dense layers, otherwise as its VGG11 is here. Cut after block 2."""
    return _with_xavier(_wide(num_classes, shape, VGG16))


def ms_vgg19(num_classes: int, shape: Shape) -> nn.Module:
    """MaskSparsification's VGG19 for CIFAR-10: sixteen blocks and three dense layers, 39 million parameters.

    Initial weights are torch's own, as there. In its code the shallow and the medium front are swapped at the client
    but not at the server, so that neither cut runs; here they are those of its README (`ms:shallow`, after the 2nd
    layer, is the usual cut).
    """
    return _wide(num_classes, shape, VGG19)


def _wide(num_classes: int, shape: Shape, plan: Sequence[int]) -> nn.Sequential:
    """Return the blocks of a plan with the paper's classifier: twice 4096, each with ReLU and dropout."""
    blocks, features = _blocks(shape, plan)
    classifier = {
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(features, 4096),
        "relu1": nn.ReLU(inplace=True),
        "drop1": nn.Dropout(0.5),
        "fc2": nn.Linear(4096, 4096),
        "relu2": nn.ReLU(inplace=True),
        "drop2": nn.Dropout(0.5),
        "fc3": nn.Linear(4096, num_classes),
    }
    return nn.Sequential(OrderedDict({**blocks, **classifier}))


def _blocks(shape: Shape, plan: Sequence[int]) -> tuple[dict[str, nn.Module], int]:
    """Return `block1`, `block2`, … and how many features the last of them gives."""
    channels, height, width = shape
    blocks: list[nn.Sequential] = []
    for outputs in plan:
        if outputs == POOL:
            blocks[-1].add_module("pool", nn.MaxPool2d(2, ceil_mode=True))
            height, width = -(-height // 2), -(-width // 2)
        else:
            blocks.append(_block(channels, outputs))
            channels = outputs
    return {f"block{n}": block for n, block in enumerate(blocks, 1)}, channels * height * width


def _block(channels: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(channels, outputs, 3, padding=1),
            norm=nn.BatchNorm2d(outputs),
            relu=nn.ReLU(inplace=True),
        )
    )


def _with_xavier(model: nn.Module) -> nn.Module:
    """Draw the weights from Xavier's uniform distribution, and set the biases to 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(cast(nn.Parameter, module.bias))
    return model
