"""Cuts as other systems say them: the same place in the same network, and a sentence where there is none."""

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import nn

from zsplit.errors import PlanError
from zsplit.model import Traced, cut_points, kinds, split, trace, zoo


@cache
def traced(name: str, classes: int = 10) -> Traced:
    """Return a model of the zoo without memory for its weights, for a small input."""
    shape = (3, 224, 224) if name == "ms/resnet34" else (3, 32, 32)
    with torch.device("meta"):
        return trace(zoo.build(name, classes, 0, shape), torch.zeros(2, *shape))


def layers(part: nn.Module) -> list[str]:
    """Return the convolutions and linear layers that a part has, shortcuts and squeeze-and-excitation excepted."""
    kinds = (nn.Conv2d, nn.Linear)
    named = ((path, module) for path, module in part.named_modules() if isinstance(module, kinds))
    return [path for path, _ in named if not any(word in path for word in ("downsample", ".fc1", ".fc2"))]


# MaskSparsification

# By its README the 2nd, 8th and 15th layer; after the 2nd a residual network is cut at the end of the block.
LAYERS = {
    "ms/vgg19": {"shallow": (2, (64, 16, 16)), "medium": (8, (256, 4, 4)), "deep": (15, (512, 2, 2))},
    "ms/resnet18": {"shallow": (3, (64, 32, 32)), "medium": (9, (128, 16, 16)), "deep": (13, (256, 8, 8))},
    "ms/resnet34": {"shallow": (3, (64, 56, 56)), "medium": (15, (128, 28, 28)), "deep": (27, (256, 14, 14))},
}


@pytest.mark.parametrize("name", LAYERS)
def test_ms_cuts_have_the_layers_before_them_and_the_smashed_data_of_the_reference(name: str) -> None:
    model = traced(name)
    for depth, (count, shape) in LAYERS[name].items():
        cut = model.cut(f"ms:{depth}")
        assert (len(layers(model.split(cut)[0])), cut.shape) == (count, shape)


def test_the_usual_ms_cut_is_the_shallow_one() -> None:
    for name in kinds.MS:
        model = traced(name)
        assert model.cut("ms:shallow").name == zoo.default_cut(name)


# PipeLearn

# Layers by its `config.py`, and how many convolutions and linear layers the last of them on the client adds.
STEPS = {
    "pipelearn/vgg5": [1] * 5,
    "pipelearn/vgg11": [1] * 11,
    "pipelearn/vgg16": [1] * 16,
    "pipelearn/resnet18": [1, *[2] * 8, 1],
    "pipelearn/resnet50": [1, *[3] * 16, 1],
    "pipelearn/mobilenet_small": [1, 2, *[3] * 10, 1, 1, 1],
    "pipelearn/mobilenet_large": [1, 2, *[3] * 14, 1, 1, 1],
}


def count_layers(model: Traced) -> Iterator[int]:
    """Yield how many layers each of PipeLearn's layers has, the last one excepted."""
    before = 0
    for number in range(1, len(kinds.PIPELEARN[str(getattr(model.model, "zoo_name", ""))]) + 1):
        here = len(layers(model.split(f"pipelearn:{number}")[0]))
        yield here - before
        before = here


@pytest.mark.parametrize("name", kinds.PIPELEARN)
def test_pipelearn_s_layers_end_where_they_end_there(name: str) -> None:
    model = traced(name)
    found = list(count_layers(model))
    assert found == STEPS[name][:-1]
    assert len(layers(model.model)) - sum(found) == STEPS[name][-1]


@pytest.mark.parametrize("name", kinds.PIPELEARN)
def test_no_layer_on_the_client_is_a_cut_at_the_input_and_all_are_one_at_the_output(name: str) -> None:
    with torch.device("meta"):
        model = zoo.build(name, 10, 0, (3, 32, 32))
    assert kinds.resolve(model, "pipelearn:0") == "input"
    assert kinds.resolve(model, "pipelearn:-1") == kinds.resolve(model, f"pipelearn:{len(STEPS[name])}") == "output"


def test_pipelearn_s_usual_cut_is_after_two_layers() -> None:
    for name in kinds.PIPELEARN:
        assert traced(name).cut("pipelearn:2").name == zoo.default_cut(name)


# The tutorial


def test_a_child_is_counted_as_the_tutorial_does() -> None:
    model = traced("resnet18")
    assert [model.cut(f"child:{n}").name for n in range(5)] == ["conv1", "bn1", "relu", "maxpool", "layer1.1.relu_1"]


def test_a_child_whose_name_is_a_number_is_no_index() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    example = torch.ones(2, 4)
    front, _ = split(model, example, "child:2")
    assert trace(model, example).cut("child:2").name == "2.1"
    assert [*front.state_dict()] == ["0.weight", "0.bias", "2.0.weight", "2.0.bias"]


def test_a_cut_that_a_kind_names_is_answered_by_that_kind() -> None:
    model = traced("pipelearn/vgg5")
    known = model.aliases()
    assert known["block1.pool"] == ["child:0", "pipelearn:1"]
    assert known["fc1"] == ["child:4", "pipelearn:4"]
    assert all(model.cut(key).name == name for name, keys in known.items() for key in keys)


# What is refused


def refusal(model: nn.Module, key: str) -> str:
    with pytest.raises(PlanError) as caught:
        kinds.resolve(model, key)
    return str(caught.value)


NET = nn.Sequential(nn.Linear(2, 2), nn.ReLU())


def test_a_kind_that_does_not_exist_is_refused() -> None:
    assert refusal(NET, "layer:3") == (
        "'layer:3' is no cut: a kind is child:N, pipelearn:N or ms:shallow, ms:medium, ms:deep."
    )


@pytest.mark.parametrize("value", ["2", "-1", "x", "", "01"])
def test_a_number_out_of_range_is_refused_with_the_range(value: str) -> None:
    assert refusal(NET, f"child:{value}") == (f"There is no 'child:{value}' in Sequential: child:N goes from 0 to 1.")


def test_a_pipelearn_number_out_of_range_is_refused_with_the_range() -> None:
    with torch.device("meta"):
        model = zoo.build("pipelearn/vgg5", 10, 0, (3, 32, 32))
    assert refusal(model, "pipelearn:6") == (
        "There is no 'pipelearn:6' in pipelearn/vgg5: pipelearn:N goes from -1 to 5."
    )


def test_a_depth_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with torch.device("meta"):
        model = zoo.build("ms/resnet18", 10, 0, (3, 32, 32))
    assert refusal(model, "ms:bottom") == (
        "There is no 'ms:bottom' in ms/resnet18: there are ms:shallow, ms:medium, ms:deep."
    )


def test_a_kind_of_another_model_is_refused_with_those_that_have_it() -> None:
    with torch.device("meta"):
        model = zoo.build("pipelearn/vgg5", 10, 0, (3, 32, 32))
    assert refusal(model, "ms:deep") == (
        "'ms:deep' means nothing for pipelearn/vgg5: ms: is for ms/vgg19, ms/resnet18, ms/resnet34."
    )
    assert refusal(NET, "pipelearn:1").startswith("'pipelearn:1' means nothing for Sequential: pipelearn: is for ")
    assert refusal(nn.Linear(2, 2), "child:0") == (
        "'child:0' means nothing for Linear: child: is for models that have children."
    )


def test_a_child_that_does_not_run_or_where_more_crosses_is_refused() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused, self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.a(x) + self.b(x))

    model = trace(Branching(), torch.ones(2, 4))
    with pytest.raises(PlanError, match="There is no 'unused' in Branching"):
        model.cut("child:0")
    with pytest.raises(PlanError, match=r"Branching cannot be cut at 'a', since 2 tensors cross there"):
        model.cut("child:1")
    assert [cut.name for cut in cut_points(Branching(), torch.ones(2, 4))] == ["add"]
