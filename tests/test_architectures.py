"""The networks of the systems that we follow: their sizes, their cuts, and what they are made of."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from zsplit.errors import ConfigError
from zsplit.model import trace, zoo


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute with one thread: on a busy machine two that wait for each other take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Numbers of parameters, from torchvision's own (for 1000 classes) and the layers that differ.


def published(weights: models.Weights, features: int, classes: int) -> int:
    """Return what torchvision states for a model, with a last layer for so many classes."""
    return int(weights.meta["num_params"]) + (features + 1) * (classes - 1000)


def vgg(weights: models.Weights, classes: int) -> int:
    """The same for VGG: its first dense layer has one pixel in the place of 7×7."""
    return published(weights, 4096, classes) - 512 * 48 * 4096


PARAMETERS: dict[str, tuple[int, int]] = {
    "digits/cnn": (10, (9 * 32 + 32) + (9 * 32 * 64 + 64) + (1024 * 128 + 128) + 1290),
    "splitnn/mlp": (10, 785 * 128 + 129 * 640 + 641 * 10),
    "pipelearn/vgg5": (10, 582_346),
    "pipelearn/vgg11": (10, vgg(models.VGG11_BN_Weights.DEFAULT, 10)),
    "pipelearn/vgg16": (10, vgg(models.VGG16_BN_Weights.DEFAULT, 10)),
    "pipelearn/resnet18": (10, published(models.ResNet18_Weights.DEFAULT, 512, 10)),
    "pipelearn/resnet50": (10, published(models.ResNet50_Weights.DEFAULT, 2048, 10)),
    "pipelearn/mobilenet_small": (10, published(models.MobileNet_V3_Small_Weights.DEFAULT, 1024, 10)),
    "pipelearn/mobilenet_large": (10, published(models.MobileNet_V3_Large_Weights.DEFAULT, 1280, 10)),
    "tutorial/resnet18-softmax": (10, published(models.ResNet18_Weights.DEFAULT, 512, 10)),
    "ms/vgg19": (10, vgg(models.VGG19_BN_Weights.DEFAULT, 10)),
    "ms/resnet18": (100, published(models.ResNet18_Weights.DEFAULT, 512, 100) - 3 * 64 * (49 - 9)),
    "ms/resnet34": (1000, published(models.ResNet34_Weights.DEFAULT, 512, 1000)),
}


@pytest.mark.parametrize("name", zoo.OWN)
def test_a_model_has_the_parameters_of_its_source(name: str) -> None:
    classes, count = PARAMETERS[name]
    with torch.device("meta"):
        model = zoo.build(name, classes, 0, zoo.default_input(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_vgg19_has_the_39_million_parameters_of_the_reference() -> None:
    assert round(PARAMETERS["ms/vgg19"][1] / 1e6) == 39


def test_the_tutorial_s_variant_is_torchvision_s_network_with_a_softmax_at_its_end() -> None:
    variant = zoo.build("tutorial/resnet18-softmax", 10, 0, (3, 32, 32)).eval()
    plain = models.resnet18(num_classes=10).eval()
    plain.load_state_dict(variant.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(variant(x), torch.softmax(plain(x), dim=1))


# Cuts


def steady(model: nn.Module) -> nn.Module:
    """Return the model without what is drawn."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("name", zoo.OWN)
def test_front_and_back_give_what_the_uncut_model_gives(name: str) -> None:
    shape = (3, 64, 64) if name == "ms/resnet34" else zoo.default_input(name)
    model = steady(zoo.build(name, 10, 1, shape))
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    traced = trace(model, x)
    usual = traced.cut(str(zoo.default_cut(name)))
    assert usual.name == zoo.default_cut(name)
    middle = traced.cuts[len(traced.cuts) // 2]
    with torch.no_grad():
        for training in (False, True):
            whole = model.train(training)(x)
            assert whole.shape == (2, 10)
            for cut in (usual, traced.cuts[0], middle, traced.cuts[-1]):
                front, back = traced.split(cut)
                sent = front.train(training)(x)
                assert sent.shape == (2, *cut.shape)
                assert torch.equal(back.train(training)(sent), whole), cut


# What they are made of


def convolutions(model: nn.Module) -> nn.Sequential:
    """Return what stands before the classifier of a VGG of ours."""
    return nn.Sequential(*(child for path, child in model.named_children() if path.startswith("block")))


@pytest.mark.parametrize(
    ("name", "build"),
    [("pipelearn/vgg11", models.vgg11_bn), ("pipelearn/vgg16", models.vgg16_bn), ("ms/vgg19", models.vgg19_bn)],
)
def test_vgg_s_convolutions_are_torchvision_s(name: str, build: Callable[..., models.VGG]) -> None:
    ours = convolutions(zoo.build(name, 10, 0, (3, 32, 32))).eval()
    with torch.device("meta"):
        theirs = build(weights=None).features.eval()
    same = dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True))
    theirs.load_state_dict(same, assign=True)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("name", ["pipelearn/vgg11", "pipelearn/vgg16", "ms/vgg19"])
def test_dropout_follows_the_dense_layer_and_does_not_replace_it(name: str) -> None:
    with torch.device("meta"):
        classifier = list(zoo.build(name, 10, 0, (3, 32, 32)).children())[-8:]
    assert [type(layer).__name__ for layer in classifier] == [
        "Flatten", "Linear", "ReLU", "Dropout", "Linear", "ReLU", "Dropout", "Linear",
    ]  # fmt: skip
    sizes = [(layer.in_features, layer.out_features) for layer in classifier if isinstance(layer, nn.Linear)]
    assert sizes == [(512, 4096), (4096, 4096), (4096, 10)]


@pytest.mark.parametrize(("name", "share"), [("pipelearn/mobilenet_small", 0.0), ("pipelearn/mobilenet_large", 0.2)])
def test_mobilenets_drop_what_their_source_says(name: str, share: float) -> None:
    with torch.device("meta"):
        model = zoo.build(name, 10, 0, (3, 32, 32))
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [share]


def test_the_resnet_for_cifar_keeps_the_size_of_the_image_up_to_its_second_stage() -> None:
    with torch.device("meta"):
        model = zoo.build("ms/resnet18", 100, 0, (3, 32, 32))
    shapes = {cut.name: cut.shape for cut in trace(model, torch.zeros(2, 3, 32, 32, device="meta")).cuts}
    assert (shapes["relu"], shapes["maxpool"]) == ((64, 32, 32), (64, 32, 32))
    assert shapes["layer2.1.relu_1"] == (128, 16, 16)


IMAGES = [name for name in zoo.OWN if name.startswith(("pipelearn/", "ms/"))]


@pytest.mark.parametrize("name", IMAGES)
def test_a_model_takes_the_images_of_mnist_too(name: str) -> None:
    with torch.device("meta"):
        model = zoo.build(name, 7, 0, (1, 28, 28))
    assert model(torch.zeros(2, 1, 28, 28, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("name", IMAGES)
def test_a_model_for_images_refuses_what_is_none(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        zoo.build(name, 10, 0, (784,))
    assert str(caught.value).startswith(f"{name} cannot be built for inputs of 784 (")
    assert str(caught.value).endswith(f"): its usual input is {'×'.join(map(str, zoo.default_input(name)))}.")


# Initial weights


def first_weight(name: str, channels: int) -> Tensor:
    """Return the first convolution's weights."""
    with torch.random.fork_rng():
        model = zoo.build(name, 10, 3, (channels, 32, 32))
    return next(module.weight.detach() for module in model.modules() if isinstance(module, nn.Conv2d))


@pytest.mark.parametrize("channels", [1, 3])
def test_initial_weights_are_drawn_as_in_the_source(channels: int) -> None:
    # Xavier's uniform distribution (PipeLearn's VGG): ±√(6 / (in + out)).
    weight = first_weight("pipelearn/vgg11", channels)
    assert 0.95 < float(weight.abs().max()) / (6 / (9 * (channels + 64))) ** 0.5 <= 1
    # torch's own (MaskSparsification): ±√(1 / in).
    weight = first_weight("ms/resnet18", channels)
    assert 0.95 < float(weight.abs().max()) / (1 / (9 * channels)) ** 0.5 <= 1
    # Kaiming's normal distribution by outputs (PipeLearn's residual networks): deviation √(2 / out).
    weight = first_weight("pipelearn/resnet18", channels)
    assert float(weight.std()) / (2 / (49 * 64)) ** 0.5 == pytest.approx(1, rel=0.05)
