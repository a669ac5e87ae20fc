"""Where models can be cut, what is said about each cut, and what is refused in which words."""

import copy
import dataclasses
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from zsplit.errors import PlanError
from zsplit.model import cut_points, split, trace


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
def resnet():
    return trace(models.resnet18(), torch.zeros(1, 3, 32, 32))


def test_cuts_are_numbered_and_named_in_the_order_of_execution(resnet) -> None:
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


def test_flops_are_twice_the_multiply_adds_that_torchvision_states(resnet) -> None:
    whole = cut_points(models.resnet18(), torch.zeros(1, 3, 224, 224))[0]
    stated = models.ResNet18_Weights.DEFAULT.meta["_ops"]
    assert (whole.front_flops + whole.back_flops) / 2e9 == pytest.approx(stated, rel=1e-3)
    assert {cut.front_params + cut.back_params for cut in resnet.cuts} == {
        models.ResNet18_Weights.DEFAULT.meta["num_params"]
    }


def test_a_cut_is_given_by_name_index_digits_module_or_as_it_is(resnet) -> None:
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
def test_a_cut_that_does_not_exist_is_refused_with_the_nearest_ones(resnet, key: str | int, sentence: str) -> None:
    with pytest.raises(PlanError) as error:
        resnet.cut(key)
    assert str(error.value) == sentence


def test_cuts_are_to_be_given_in_order(resnet) -> None:
    for cuts in [("relu", "conv1"), ("relu", "relu")]:
        with pytest.raises(
            PlanError, match=r"^The cut '.*' \(\d+\) does not come after 'relu' \(2\): give the cuts in "
        ):
            resnet.split(*cuts)


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x))))


class Twice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.b(self.a(self.a(x))))


def test_tied_parameters_are_not_torn_apart() -> None:
    assert names(Tied()) == ["c"]
    assert refusal(Tied(), "b") == (
        "Tied cannot be cut at 'b', since 'a.weight' is used on both sides, and tied parameters and shared buffers "
        "have to stay on one: take 'c' (0) after it; `zsplit cuts` lists all cuts."
    )
    model = Tied()
    front, back = split(model, ROWS, "c")
    assert set(front.state_dict()) == {"a.weight", "a.bias", "b.weight", "b.bias", "c.weight", "c.bias"}
    assert copy.deepcopy(front).get_parameter("a.weight").data_ptr() != model.a.weight.data_ptr()
    assert len(list(copy.deepcopy(front).parameters())) == 5
    assert set(back.state_dict()) == {"d.weight", "d.bias"}
    assert cut_points(model, ROWS)[0].front_params == 16 + 4 + 20 + 4


def test_a_module_that_runs_twice_stays_on_one_side() -> None:
    assert names(Twice()) == ["a_1", "b"]
    assert "'a.bias' is used on both sides" in refusal(Twice(), "a")


def test_parameters_fetched_by_operations_go_where_they_are_used() -> None:
    traced = trace(models.VisionTransformer(8, 4, 1, 2, 8, 8, num_classes=3), torch.zeros(2, 3, 8, 8))
    before, behind = traced.split("permute"), traced.split("encoder.add")
    for name in ("class_token", "encoder.pos_embedding"):
        assert name in before[1].state_dict()
        assert name in behind[0].state_dict()


class Masked(Net):
    """Uses a buffer twice, a tensor that is no buffer and one that forward makes, and has what it never uses."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([1.0, 0, 1, 0]), persistent=persistent)
        self.scale = torch.tensor(3.0)
        self.unused = nn.Parameter(torch.ones(7))
        self.also_unused = self.unused

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.b(self.a(x) * self.mask) * self.mask * self.scale) + torch.arange(4)


def test_what_is_no_part_of_the_state_may_be_used_on_both_sides() -> None:
    model = Masked(persistent=False)
    assert names(model) == ["a", "mul", "b", "mul_1", "mul_2", "d"]
    for cut in names(model):
        front, back = split(model, ROWS, cut)
        assert torch.equal(copy.deepcopy(back)(copy.deepcopy(front)(ROWS)), model(ROWS))
        assert len(front.state_dict()) + len(back.state_dict()) == len(model.state_dict())


def test_a_buffer_in_the_state_stays_on_one_side() -> None:
    assert names(Masked(persistent=True)) == ["a", "mul_1", "mul_2", "d"]
    assert "'mask' is used on both sides, and tied parameters and shared buffers" in refusal(
        Masked(persistent=True), "b"
    )


class Counting(Net):
    """Changes a buffer in its own forward, and uses it twice."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        self.count.add_(1)
        return self.d(self.b(x * self.count) + self.count)


@pytest.mark.parametrize("persistent", [True, False])
def test_a_buffer_that_forward_changes_is_changed_once_at_every_run(persistent: bool) -> None:
    model = Counting(persistent)
    assert names(model) == ["a", "add"]
    for runs, cut in enumerate(names(model), start=1):
        front, back = split(model, ROWS, cut)
        assert (front.state_dict() | back.state_dict()).keys() == model.state_dict().keys()
        back(front(ROWS))
        assert model.count == runs


class Drawn(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        noise = torch.rand_like(self.c.bias)
        return self.d(self.b(x * noise) * noise)


def test_random_numbers_are_drawn_on_one_side_only() -> None:
    assert names(Drawn()) == ["a", "mul_1"]


def test_what_is_never_used_goes_with_what_stands_before_it() -> None:
    front, back = split(Sizes(), ROWS, "view")
    assert set(front.state_dict()) == {"a.weight", "a.bias"}
    assert {"c.weight", "d.weight"} <= back.state_dict().keys()


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


def test_a_state_that_would_be_lost_is_refused() -> None:
    class Extra(Net):
        def get_extra_state(self) -> int:
            return 1

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    with pytest.raises(PlanError) as error:
        split(Extra(), ROWS, "a")
    assert str(error.value) == (
        "The state of Extra holds '_extra_state', which is neither a parameter nor a buffer and would be lost: "
        "make it a buffer."
    )


class Optional(Net):
    def forward(self, x: Tensor, mask: Tensor | None = None, twice: bool = False, scale: float = 2.0) -> Tensor:
        x = self.a(x) if mask is None else self.a(x) * mask
        return self.b(x) * scale


def test_further_inputs_keep_their_defaults() -> None:
    model = Optional()
    assert names(model) == ["a", "b"]
    front, back = split(model, ROWS, "a")
    assert torch.equal(back(front(ROWS)), model(ROWS))


class Remembering(Net):
    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.norm(self.a(x))
        return self.b(self.drop(self.last)) + torch.ones(4)


def test_tracing_leaves_the_model_and_the_generator_as_they_are() -> None:
    model = Remembering()
    model.norm.eval()
    modes = [module.training for module in model.modules()]
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    cut_points(model, ROWS)
    assert [module.training for module in model.modules()] == modes
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert model.last is None
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


class Stateful(nn.Module):
    """Sequence first inside, batch first outside; a module of torch's with state that its forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.lstm = nn.LSTM(4, 4, 2, dropout=0.5)
        self.norm = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        out, _ = self.lstm(self.embed(tokens).transpose(0, 1))
        return F.relu(self.norm(out[-1]))


def test_sequences_of_integers_can_be_the_input() -> None:
    model, tokens = Stateful(), torch.arange(6).view(3, 2)
    assert names(model, tokens) == ["embed", "getitem_2", "norm"]
    for cut in names(model, tokens):
        whole = copy.deepcopy(model)
        torch.manual_seed(0)
        expected = whole(tokens)
        front, back = (copy.deepcopy(part) for part in split(model, tokens, cut))
        torch.manual_seed(0)
        assert torch.equal(back(front(tokens)), expected)
        left = front.state_dict() | back.state_dict()
        assert all(torch.equal(tensor, left[name]) for name, tensor in whole.state_dict().items())
