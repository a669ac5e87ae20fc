"""Where models can be cut, what is said about each cut, and what is refused in which words."""

import dataclasses
import threading

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from zsplit.errors import PlanError
from zsplit.model import Traced, cut_points, trace


class Net(nn.Module):
    """Takes rows of four; subclasses say in `forward` what is done with the linear layers a, b, c and d."""

    def __init__(self) -> None:
        super().__init__()
        for name in "abcd":
            self.add_module(name, nn.Linear(4, 4))


ROWS = torch.ones(2, 4)


def names(model: nn.Module, example: Tensor = ROWS) -> list[str]:
    return [cut.name for cut in cut_points(model, example)]


def refusal(model: nn.Module, cut: str | int, example: Tensor = ROWS) -> str:
    with pytest.raises(PlanError) as error:
        trace(model, example).cut(cut)
    return str(error.value)


def untraceable(model: nn.Module, example: Tensor = ROWS) -> str:
    with pytest.raises(PlanError) as error:
        trace(model, example)
    return str(error.value)


@pytest.fixture(scope="module")
def resnet() -> Traced:
    return trace(models.resnet18(), torch.zeros(1, 3, 32, 32))


def test_cuts_are_numbered_and_named_in_the_order_of_execution(resnet: Traced) -> None:
    assert [cut.index for cut in resnet.cuts] == list(range(22))
    assert [cut.name for cut in resnet.cuts][:6] == [
        "conv1", "bn1", "relu", "maxpool", "layer1.0.add", "layer1.0.relu_1",
    ]  # fmt: skip


def test_names_are_those_of_torchvisions_feature_extraction() -> None:
    from torchvision.models.feature_extraction import get_graph_node_names

    for model in (models.resnet18(), models.squeezenet1_0()):
        known, _ = get_graph_node_names(model)
        assert set(names(model, torch.zeros(1, 3, 64, 64))) <= set(known)


def test_a_module_whose_name_ends_in_a_number_keeps_it() -> None:
    class Numbered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc_2, self.fc_1, self.relu, self.relu_1 = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(), nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu_1(self.relu(self.fc_1(self.relu(self.fc_2(x))))) + 1

    assert names(Numbered()) == ["fc_2", "relu", "fc_1", "relu_2", "relu_1"]


def test_a_cut_says_what_crosses_and_what_is_on_either_side() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 36, 5), nn.ReLU(), nn.Linear(5, 2))
    for samples in (1, 2, 5):
        first, *_, last = cut_points(model.half(), torch.zeros(samples, 3, 6, 6, dtype=torch.half))
        assert dataclasses.asdict(first) == {
            "index": 0,
            "name": "0",
            "shape": (8, 6, 6),
            "dtype": "float16",
            "bytes_per_sample": 8 * 36 * 2,
            "front_params": 8 * 27 + 8,
            "back_params": 8 * 36 * 5 + 5 + 12,
            "front_flops": 2 * 36 * 8 * 27,
            "back_flops": 2 * (8 * 36 * 5 + 5 * 2),
        }
        assert (last.name, last.shape, last.back_flops) == ("3", (5,), 20)


def test_flops_are_twice_the_multiply_adds_that_torchvision_states(resnet: Traced) -> None:
    whole = cut_points(models.resnet18(), torch.zeros(1, 3, 224, 224))[0]
    stated = models.ResNet18_Weights.DEFAULT.meta["_ops"]
    assert (whole.front_flops + whole.back_flops) / 2e9 == pytest.approx(stated, rel=1e-3)
    assert {cut.front_params + cut.back_params for cut in resnet.cuts} == {
        models.ResNet18_Weights.DEFAULT.meta["num_params"]
    }


def test_a_cut_is_given_by_name_index_digits_module_or_as_it_is(resnet: Traced) -> None:
    cut = resnet.cuts[7]
    assert cut.name == "layer1.1.relu_1"
    for key in (7, "7", "layer1.1.relu_1", "layer1", "layer1.1", cut):
        assert resnet.cut(key) == cut


def test_where_names_are_digits_the_name_wins_over_the_index() -> None:
    traced = trace(nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4), nn.ReLU()), ROWS)
    assert [cut.name for cut in traced.cuts] == ["0.0", "0.1", "1"]
    assert traced.cut("1").name == "1"
    assert traced.cut(1).name == "0.1"
    assert traced.cut("2").name == "1"


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        (
            22,
            "There is no cut 22: the cuts of ResNet go from 'conv1' (0) to 'flatten' (21), and "
            "`zsplit cuts` lists them.",
        ),
        (
            -1,
            "There is no cut -1: the cuts of ResNet go from 'conv1' (0) to 'flatten' (21), and "
            "`zsplit cuts` lists them.",
        ),
        (
            "head",
            "There is no 'head' in ResNet: the cuts of ResNet go from 'conv1' (0) to 'flatten' (21), and "
            "`zsplit cuts` lists them.",
        ),
        (
            "layre3.1.add",
            "There is no 'layre3.1.add' in ResNet: the nearest cuts are 'layer3.1.add' (14), 'layer4.1.add' (18), "
            "'layer3.0.add' (12), and `zsplit cuts` lists all.",
        ),
        (
            "layer1.0.bn2",
            "ResNet cannot be cut at 'layer1.0.bn2', since 2 tensors cross there (maxpool, layer1.0.bn2): take "
            "'maxpool' (3) before it or 'layer1.0.add' (4) after it; `zsplit cuts` lists all cuts.",
        ),
        (
            "fc",
            "ResNet cannot be cut at 'fc', since it is the model's output: take 'flatten' (21) before it; "
            "`zsplit cuts` lists all cuts.",
        ),
        (
            "x",
            "ResNet cannot be cut at 'x', since it is the model's input: take 'conv1' (0) after it; `zsplit cuts` "
            "lists all cuts.",
        ),
    ],
)
def test_a_cut_that_does_not_exist_is_refused_with_the_nearest_ones(
    resnet: Traced, key: str | int, sentence: str
) -> None:
    with pytest.raises(PlanError) as error:
        resnet.cut(key)
    assert str(error.value) == sentence


def test_cuts_are_to_be_given_in_order(resnet: Traced) -> None:
    for cuts in [("relu", "conv1"), ("relu", "relu")]:
        with pytest.raises(
            PlanError, match=r"^The cut '.*' \(\d+\) does not come after 'relu' \(2\): give the cuts in "
        ):
            resnet.split(*cuts)


class Sizes(Net):
    def forward(self, x: Tensor) -> Tensor:
        samples = x.size(0)
        return self.b(self.a(x).view(samples, 4))


class Turned(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).t().contiguous().t())


class Rounded(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).long().float())


class Constant(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) + self.c.weight.sum())


class Dead(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        self.c(x)
        return self.b(x)


class Auxiliary(Net):
    """Has a second way in training mode only."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(x)
        return self.d(y) + self.c(x) if self.training else self.d(y)


class Cautious(Net):
    """Has a second way in evaluation mode only."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(x)
        return self.d(y) if self.training else self.d(y) + self.c(x)


class Reordered(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x.tanh().relu() if self.training else x.relu().tanh()
        return self.d(x)


NO_BATCH = "what crosses there is not a floating-point tensor with the batch as its first dimension: take "


@pytest.mark.parametrize(
    ("model", "cut", "reason"),
    [
        (Sizes(), "a", "2 values cross there (size, a): take 'view' (0) after it"),
        (Turned(), "t", f"{NO_BATCH}'a' (0) before it or 't_1' (1) after it"),
        (Rounded(), "long", f"{NO_BATCH}'a' (0) before it or 'float' (1) after it"),
        (Constant(), "sum", "it does not depend on the model's input: take 'a' (0) before it or 'add' (1) after it"),
        (Dead(), "c", "its value is not used: take 'a' (0) before it"),
        (Auxiliary(), "b", "2 tensors cross there (a, b): take 'a' (0) before it"),
        (Cautious(), "b", "in evaluation mode 2 tensors cross there (a, b): take 'a' (0) before it"),
        (Cautious(), "c", "it does not run in training mode: take 'a' (0) before it"),
        (Reordered(), "relu", "operations run in another order in evaluation mode: take 'tanh' (1) before it"),
    ],
)
def test_a_node_that_is_no_cut_says_why(model: nn.Module, cut: str, reason: str) -> None:
    name = type(model).__name__
    assert refusal(model, cut).startswith(f"{name} cannot be cut at '{cut}', since {reason}")


def test_the_batch_is_told_from_a_dimension_of_the_same_size() -> None:
    assert names(Turned(), torch.ones(4, 4)) == names(Turned(), ROWS)


def test_a_model_without_cuts_says_so() -> None:
    assert refusal(nn.Linear(4, 4), 0) == "Linear has no cut: nowhere in it does exactly one tensor cross."
    assert refusal(nn.Sequential(*[nn.Linear(4, 4)] * 2), "0") == (
        "Sequential has no cut: one tensor crosses at '0', but '0.bias' is used on both sides, and tied parameters and "
        "shared buffers have to stay on one."
    )


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Starred(nn.Module):
    def forward(self, *x: Tensor) -> Tensor:
        return x[0]


class Frozen(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) + torch.rand(4))


class Locked(Net):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (
            Branching(),
            "Branching cannot be traced by torch.fx (symbolically traced variables cannot be used as inputs to control "
            "flow): its forward has to be one sequence of operations, whatever the values; put what depends on values "
            "into a function marked with torch.fx.wrap.",
        ),
        (
            TwoInputs(),
            "TwoInputs.forward has the inputs (x: torch.Tensor, y: torch.Tensor) -> torch.Tensor, and a model that is "
            "cut takes one tensor: wrap it in a module that does.",
        ),
        (
            Starred(),
            "Starred.forward has the inputs (*x: torch.Tensor) -> torch.Tensor, and a model that is cut takes one "
            "tensor: wrap it in a module that does.",
        ),
        (
            Frozen(),
            "Frozen draws random numbers whose shape does not depend on its input, which tracing would freeze: use a "
            "module such as nn.Dropout, or torch.rand_like on a tensor that does.",
        ),
        (
            Locked(),
            "Locked cannot be copied (cannot pickle '_thread.lock' object): keep what cannot be copied out of the "
            "model's attributes.",
        ),
        (
            nn.Sequential(nn.LazyLinear(4)),
            "Sequential has lazy modules without weights: run it once on a batch first.",
        ),
        (
            nn.Sequential(nn.Linear(5, 4)),
            "Sequential cannot run on a batch of shape [2, 4] (a and b must have same reduction dim, but got [2, 4] X "
            "[5, 4]): a model that is cut takes batches of any size, and the example has to be like one of them.",
        ),
    ],
)
def test_a_model_that_cannot_be_followed_is_refused(
    model: nn.Module, sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert untraceable(model) == sentence
    assert capfd.readouterr() == ("", "")


def test_a_detection_model_is_refused() -> None:
    with torch.device("meta"):
        model = models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    assert untraceable(model, torch.zeros(1, 3, 320, 320)).startswith("SSD cannot be traced by torch.fx (")


def test_an_example_is_a_batch() -> None:
    for example in (torch.tensor(1.0), torch.ones(0, 4)):
        assert untraceable(nn.Linear(4, 4), example) == (
            f"An example of shape {list(example.shape)} is no batch: give it a first dimension of samples."
        )


# The two ends


def test_the_ends_of_a_model_are_cuts_outside_of_the_numbered_ones(resnet: Traced) -> None:
    first, last = resnet.cut("input"), resnet.cut("output")
    assert (first.index, last.index) == (-1, len(resnet.cuts))
    assert (first.shape, last.shape) == (resnet.shape, (1000,))
    assert (first.front_params, first.front_flops, last.back_params, last.back_flops) == (0, 0, 0, 0)
    inner = resnet.cuts[0]
    assert first.back_params == last.front_params == inner.front_params + inner.back_params
    assert first.back_flops == last.front_flops == inner.front_flops + inner.back_flops
    assert not {first, last} & set(resnet.cuts)
    assert (resnet.is_input("input"), resnet.is_output("output")) == (True, True)
    assert (resnet.is_input("conv1"), resnet.is_output(len(resnet.cuts) - 1)) == (False, False)


def test_an_index_never_means_an_end(resnet: Traced) -> None:
    for index in (-1, len(resnet.cuts)):
        with pytest.raises(PlanError, match=f"There is no cut {index}"):
            resnet.cut(index)


def test_ends_come_before_and_behind_all_cuts(resnet: Traced) -> None:
    with pytest.raises(PlanError, match=r"The cut 'conv1' \(0\) does not come after 'output' \(22\)"):
        resnet.split("output", "conv1")
    with pytest.raises(PlanError, match=r"The cut 'input' \(-1\) does not come after 'conv1' \(0\)"):
        resnet.split("conv1", "input")


class Named(Net):
    """A model with a layer that is called like its end."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.input(x))


def test_a_cut_inside_that_is_called_like_an_end_wins() -> None:
    traced = trace(Named(), ROWS)
    assert traced.cut("input").index == 0
    assert not traced.is_input("input")


class Pairs(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x)
        return y, self.b(y)


def test_an_output_that_is_no_tensor_has_no_shape() -> None:
    last = trace(Pairs(), ROWS).cut("output")
    assert (last.shape, last.dtype, last.bytes_per_sample) == ((), "", 0)
