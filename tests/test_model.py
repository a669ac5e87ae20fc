"""Splitting is exact: parts compute what the uncut model computes, bit for bit, wherever it is cut."""

import copy
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from torchvision.ops import StochasticDepth

from zsplit.model import CutPoint, Part, Traced, randomness, split, trace
from zsplit.seeds import derive

Net: TypeAlias = tuple[Traced, list[CutPoint], tuple[Tensor, Tensor]]

PLACE = (3, 1, 4, 15, 2)  # seed, client, round, step, micro-batch


class Block(nn.Module):
    """A residual block with everything that makes cutting hard: in-place, BatchNorm, two kinds of randomness."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.3)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.depth = StochasticDepth(0.5, "row")

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.relu(self.bn1(self.conv1(x))))
        return self.relu(x + self.depth(self.bn2(self.conv2(y))))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.5, inplace=True)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(self.pool(self.blocks(self.stem(x))), 1)
        return self.fc(self.drop(x))


def small_vit() -> nn.Module:
    return models.VisionTransformer(16, 4, 4, 2, 16, 32, dropout=0.2, attention_dropout=0.2, num_classes=10)


NETS = {
    "residual": (Residual, 12, 1),
    "resnet18": (lambda: models.resnet18(num_classes=10), 32, 10),
    "mobilenet_v3_small": (lambda: models.mobilenet_v3_small(num_classes=10), 32, 10),
    "densenet121": (lambda: models.densenet121(num_classes=10, drop_rate=0.2), 32, 10),
    "vit": (small_vit, 16, 10),
    "vit_b_16": (lambda: models.vit_b_16(num_classes=10, image_size=32, dropout=0.1), 32, 10),
}


def batch(size: int, samples: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    return torch.rand(samples, 3, size, size, generator=generator), torch.arange(samples) % 10


def build(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model: nn.Module = NETS[name][0]()
    return model


def run(parts: Sequence[nn.Module], x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Run forward and backward, each part apart from the next. Return the output, and the state and gradients left."""
    took, gave = [], []
    for part in parts:
        took.append(gave[-1].detach().requires_grad_() if gave else x)
        gave.append(part(took[-1]))
    F.cross_entropy(gave[-1], y).backward()
    for out, received in zip(gave[-2::-1], took[:0:-1], strict=True):
        out.backward(received.grad)
    return gave[-1].detach(), left_in(parts)


def left_in(parts: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Return the state and the gradients of all parts."""
    left = {name: tensor for part in parts for name, tensor in part.state_dict().items()}
    gradients = {name: p.grad for part in parts for name, p in part.named_parameters() if p.grad is not None}
    return left | {f"{name}.grad": gradient for name, gradient in gradients.items()}


def assert_same(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    for name, tensor in one[1].items():
        assert torch.equal(tensor, other[1][name]), name


def copies(parts: Sequence[Part], training: bool) -> list[nn.Module]:
    return [copy.deepcopy(part).train(training) for part in parts]


def seeded_by_hooks(model: nn.Module) -> nn.Module:
    """Return a copy that seeds torch before each call of a random module, as the reference does."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout | StochasticDepth | nn.MultiheadAttention):
            seed = derive(PLACE[0], "dropout", *PLACE[1:], name)
            module.register_forward_pre_hook(lambda *_, seed=seed: torch.manual_seed(seed) and None)
    return model


@pytest.fixture(params=NETS, scope="module")
def net(request: pytest.FixtureRequest) -> Net:
    """A model with its trace, the cuts to try, and a batch of a size that it was not traced with."""
    _, size, every = NETS[request.param]
    traced = trace(build(request.param), batch(size, 2)[0])
    return traced, list(traced.cuts[::every]), batch(size, 5)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from a second thread, and bits depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Many(nn.Module):
    """Modules whose names are of one length."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(8):
            self.add_module(f"fc{i}", nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(8):
            x = self.get_submodule(f"fc{i}")(x)
        return x


@pytest.mark.parametrize("training", [True, False])
def test_parts_do_to_the_bit_what_the_uncut_model_does(net: Net, training: bool) -> None:
    traced, cuts, (x, y) = net
    torch.manual_seed(5)
    expected = run([copy.deepcopy(traced.model).train(training)], x, y)
    for cut in cuts:
        torch.manual_seed(5)
        assert_same(run(copies(traced.split(cut), training), x, y), expected)


@pytest.mark.parametrize("training", [True, False])
def test_the_chain_of_all_stretches_is_the_uncut_model_to_the_bit(net: Net, training: bool) -> None:
    traced, _, (x, y) = net
    torch.manual_seed(5)
    expected = run([copy.deepcopy(traced.model).train(training)], x, y)
    chain = [part.train(training) for part in copy.deepcopy(traced.chain())]
    assert len(chain) == len(traced.cuts) + 1
    torch.manual_seed(5)
    output = x
    for part in chain:
        output = part(output)
    F.cross_entropy(output, y).backward()
    assert_same((output.detach(), left_in(chain)), expected)


@pytest.mark.parametrize("net", ["residual", "mobilenet_v3_small", "densenet121", "vit"], indirect=True, scope="module")
def test_randomness_does_not_depend_on_the_cut(net: Net) -> None:
    traced, cuts, (x, y) = net
    with randomness(*PLACE):
        expected = run(copies(traced.split(), True), x, y)
    for cut in cuts:
        torch.manual_seed(cut.index)
        with randomness(*PLACE):
            assert_same(run(copies(traced.split(cut), True), x, y), expected)


@pytest.mark.parametrize("name", ["residual", "mobilenet_v3_small", "vit"])
def test_randomness_is_what_seeding_before_each_random_module_gives(name: str) -> None:
    model, (x, y) = build(name), batch(NETS[name][1])
    expected = run([seeded_by_hooks(model).train()], x, y)
    traced = trace(model, x)
    with randomness(*PLACE):
        assert_same(run(copies(traced.split(len(traced.cuts) // 2), True), x, y), expected)


def test_the_state_is_dealt_out_under_the_same_names(net: Net) -> None:
    traced, cuts, _ = net
    whole = traced.model.state_dict(keep_vars=True)
    for cut in cuts:
        front, back = (part.state_dict(keep_vars=True) for part in traced.split(cut))
        assert not front.keys() & back.keys()
        assert (front | back).keys() == whole.keys()
        assert all(tensor is whole[name] for name, tensor in (front | back).items())


@pytest.mark.parametrize("cuts", [("stem.0", "stem.1"), (1, "flatten"), ("blocks.0.relu_1", "blocks.1.add")])
def test_two_cuts_give_front_middle_and_tail(cuts: tuple[str | int, str | int]) -> None:
    model, (x, y) = build("residual"), batch(12)
    torch.manual_seed(1)
    expected = run([copy.deepcopy(model)], x, y)
    torch.manual_seed(1)
    front, middle, tail = copies(split(model, x, *cuts), True)
    assert_same(run([front, middle, tail], x, y), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cuts", [("stem.0", "stem.1"), ("input", "flatten"), (1, "output"), ("input", "output")])
def test_both_ends_as_one_part_and_the_middle_are_exact(cuts: tuple[str | int, str | int], training: bool) -> None:
    model, (x, y) = build("residual"), batch(12)
    torch.manual_seed(1)
    expected = run([copy.deepcopy(model).train(training)], x, y)
    ends, middle = copies(trace(model, x).ends_apart(*cuts), training)
    torch.manual_seed(1)
    output = ends(middle(ends(x)), 1)
    F.cross_entropy(output, y).backward()
    assert_same((output.detach(), left_in([ends, middle])), expected)


@pytest.mark.parametrize("end", ["input", "output"])
def test_a_cut_at_an_end_leaves_one_part_with_nothing(end: str) -> None:
    model, (x, _) = build("residual"), batch(12)
    parts = split(model, x, end)
    nothing, whole = parts if end == "input" else parts[::-1]
    assert nothing(x) is x
    assert not nothing.state_dict()
    assert whole.state_dict().keys() == model.state_dict().keys()


def test_two_threads_on_each_side_are_exact_too() -> None:
    model, (x, y) = build("residual"), batch(32, 16)
    torch.set_num_threads(2)
    try:
        torch.manual_seed(1)
        expected = run([copy.deepcopy(model)], x, y)
        torch.manual_seed(1)
        assert_same(run(copies(split(model, x, "blocks.0"), True), x, y), expected)
    finally:
        torch.set_num_threads(1)


def test_a_part_has_its_parameters_in_the_same_order_in_every_process() -> None:
    names = [name for name, _ in split(Many(), torch.zeros(2, 3), 0)[1].named_parameters()]
    assert names == [f"fc{i}.{kind}" for i in range(1, 8) for kind in ("weight", "bias")]


def test_a_copy_of_a_part_is_independent_of_the_model() -> None:
    model, (x, y) = build("residual"), batch(12)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run(copies(split(model, x, "pool"), True), x, y)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_train_and_eval_switch_between_the_two_forward_passes() -> None:
    model, (x, _) = build("residual"), batch(12)
    front, back = split(model, x, "blocks.0.add")
    front.eval()
    back.eval()
    assert torch.equal(back(front(x)), back(front(x)))
    front.train()
    back.train()
    assert not torch.equal(back(front(x)), back(front(x)))


@pytest.mark.parametrize("cut", ["0", "1"])
def test_what_a_part_takes_is_never_changed_in_place(cut: str) -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Unflatten(1, (2, 2)), nn.ReLU(inplace=True), nn.Flatten())
    given = torch.randn(3, 4)
    front, back = split(model, given, cut)
    x = given.clone()
    sent = front(x)
    assert torch.equal(x, given)
    kept = sent.clone()
    back(sent.detach().requires_grad_())
    assert torch.equal(sent, kept)


class Detour(nn.Module):
    """Changes what crosses in place, through a view whose own value nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        y.view(-1).sub_(1)
        return torch.sigmoid(y * y)


def test_a_change_through_a_view_counts_as_a_change() -> None:
    model, x, y = Detour(), torch.randn(3, 4), torch.arange(3)
    front, back = split(model, x, "fc")
    assert_same(run(copies([front, back], True), x, y), run([model], x, y))
    sent = front(x).detach()
    kept = sent.clone()
    back(sent)
    assert torch.equal(sent, kept)


def test_randomness_leaves_the_generator_as_it_was() -> None:
    model, (x, _) = build("residual"), batch(12)
    (whole,) = split(model, x)
    before = torch.get_rng_state()
    with randomness(*PLACE):
        whole(x)
        assert not torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.get_rng_state(), before)


def test_randomness_ends_with_an_error_too() -> None:
    (whole,) = split(nn.Sequential(nn.Dropout(), nn.Linear(4, 4)), torch.ones(2, 4))
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError), randomness(*PLACE):
        whole(torch.ones(2, 5))
    assert torch.equal(torch.get_rng_state(), before)
    whole(torch.ones(2, 4))
    assert not torch.equal(torch.get_rng_state(), before)


def test_every_place_of_a_run_has_its_own_randomness() -> None:
    (whole,) = split(nn.Sequential(nn.Dropout(), nn.Identity()), torch.ones(2, 64))
    drawn = set()
    for place in [PLACE, *(tuple(n + (i == j) for j, n in enumerate(PLACE)) for i in range(len(PLACE)))]:
        with randomness(*place):
            drawn.add(tuple(whole(torch.ones(1, 64))[0].tolist()))
    assert len(drawn) == 6


class Noisy(nn.Module):
    """Draws in its own forward, one way while it trains and another while it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 4)
        self.fc2 = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = x + torch.randn_like(x) if self.training else F.dropout(x, 0.5)
        return self.fc2(x)


@pytest.mark.parametrize("training", [True, False])
def test_operations_outside_modules_are_seeded_too(training: bool) -> None:
    parts = copies(split(Noisy(), torch.ones(2, 4), "fc1"), training)
    outputs = []
    for _ in range(2):
        with randomness(*PLACE):
            outputs.append(parts[1](parts[0](torch.ones(2, 4))))
    assert torch.equal(*outputs)
