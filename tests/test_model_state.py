"""What goes where when a model is cut: tied and unused parameters, buffers, constants, further inputs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_model_cuts import ROWS, Net, names, refusal
from torch import Tensor, nn
from torchvision import models

from zsplit.errors import PlanError
from zsplit.model import cut_points, split, trace


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
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("like", torch.ones(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        noise = torch.rand_like(self.like)
        return self.d(self.b(x * noise) * noise)


def test_random_numbers_are_drawn_on_one_side_only() -> None:
    assert names(Drawn()) == ["a", "mul_1"]


class Defaults(Net):
    def forward(self, x: Tensor, mask: Tensor | None = None, *more: int, scale: float = 2.0, **named: int) -> Tensor:
        x = self.a(x) if mask is None else self.a(x) * mask
        return self.b(x) * scale


def test_further_inputs_keep_their_defaults() -> None:
    model = Defaults()
    assert names(model) == ["a", "b"]
    front, back = split(model, ROWS, "a")
    assert torch.equal(back(front(ROWS)), model(ROWS))


def test_what_is_never_used_goes_with_what_stands_before_it() -> None:
    front, back = split(Defaults(), ROWS, "a")
    assert set(front.state_dict()) == {"a.weight", "a.bias"}
    assert {"c.weight", "d.weight"} <= back.state_dict().keys()


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
