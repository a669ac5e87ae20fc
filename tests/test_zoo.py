"""Models by name: every one builds from its seed, can be cut, and has a usual input and cut."""

import pytest
import torch
from torch import nn

from zsplit.errors import ConfigError
from zsplit.model import cut_points, trace, zoo
from zsplit.seeds import derive

# Of each family a small one: the smallest input that it takes, and how many cuts it has. The places where one tensor
# crosses are two more: the input and the output.
FAMILIES = {
    "alexnet": (63, 21), "convnext_tiny": (32, 39), "densenet121": (32, 24), "efficientnet_b0": (32, 78),
    "efficientnet_v2_s": (32, 81), "googlenet": (32, 25), "inception_v3": (75, 31), "maxvit_t": (224, 152),
    "mnasnet0_5": (32, 71), "mobilenet_v2": (32, 72), "mobilenet_v3_small": (32, 58), "regnet_x_400mf": (32, 49),
    "regnet_y_400mf": (32, 37), "resnet18": (32, 22), "resnet50": (32, 38), "resnext50_32x4d": (32, 38),
    "shufflenet_v2_x0_5": (32, 40), "squeezenet1_1": (32, 33), "swin_t": (32, 40), "swin_v2_t": (64, 40),
    "vgg11_bn": (32, 37), "vit_b_16": (32, 31), "wide_resnet50_2": (32, 38),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_torchvision_can_be_cut(name: str) -> None:
    size, count = FAMILIES[name]
    device = "cpu" if name.startswith("regnet") else "meta"  # regnets compute their widths with tensors
    x = torch.zeros(2, 3, size, size, device=device)
    with torch.device(device):
        model = zoo.build(name, 7, 0, (3, size, size))
    traced = trace(model, x)
    assert len(traced.cuts) == count
    middle = traced.cuts[count // 2]
    front, back = traced.split(middle)
    sent = front(x)
    assert sent.shape == (2, *middle.shape)
    assert back(sent).shape == (2, 7)


def test_the_families_are_all_that_torchvision_has() -> None:
    def family(name: str) -> str:
        return name.partition("_")[0].rstrip("0123456789") if "_v" not in name else name[: name.index("_v") + 3]

    assert {family(name) for name in zoo.names() if "/" not in name} == {family(name) for name in FAMILIES}


@pytest.mark.parametrize("name", ["digits/cnn", "splitnn/mlp", "pipelearn/vgg5", "squeezenet1_1"])
def test_initial_weights_follow_from_the_seed_alone(name: str) -> None:
    shape = zoo.default_input(name)
    before = torch.get_rng_state()
    one, same, other = (zoo.build(name, 10, seed, shape).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, same[key]) for key, tensor in one.items())
    assert not all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_initial_weights_are_those_after_seeding_torch() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(5, "init"))
        first = nn.Conv2d(1, 32, 3, padding=1)
    assert torch.equal(zoo.build("digits/cnn", 10, 5, (1, 8, 8)).state_dict()["conv1.weight"], first.weight)


@pytest.mark.parametrize(("name", "size"), [("digits/cnn", (4096, 10)), ("splitnn/mlp", (2560, 10))])
def test_our_own_models_have_a_usual_cut(name: str, size: tuple[int, int]) -> None:
    shape = zoo.default_input(name)
    model = zoo.build(name, size[1], 0, shape)
    cuts = {cut.name: cut for cut in cut_points(model, torch.zeros(2, *shape))}
    assert cuts[zoo.default_cut(name)].bytes_per_sample == size[0]
    assert model(torch.zeros(3, *shape)).shape == (3, 10)


def test_our_own_models_fit_other_inputs_and_classes() -> None:
    assert zoo.build("digits/cnn", 3, 0, (3, 9, 12))(torch.zeros(2, 3, 9, 12)).shape == (2, 3)
    assert zoo.build("splitnn/mlp", 3, 0, (1, 8, 8))(torch.zeros(2, 1, 8, 8)).shape == (2, 3)


def test_the_mlp_is_the_tutorials() -> None:
    linears = [m for m in zoo.build("splitnn/mlp", 10, 0, (1, 28, 28)) if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linears] == [(784, 128), (128, 640), (640, 10)]


def test_vgg5_is_pipelearns_layer_for_layer() -> None:
    model = zoo.build("pipelearn/vgg5", 10, 0, (3, 32, 32))
    cuts = {cut.name: cut for cut in cut_points(model, torch.zeros(2, 3, 32, 32))}
    assert list(cuts) == [
        "block1.conv", "block1.norm", "block1.relu", "block1.pool",
        "block2.conv", "block2.norm", "block2.relu", "block2.pool",
        "block3.conv", "block3.norm", "block3.relu", "flatten", "fc1",
    ]  # fmt: skip
    cut = cuts["block2.pool"]
    assert zoo.default_cut("pipelearn/vgg5") == cut.name
    # 1.64 MB each way at a mini-batch of 100.
    assert (cut.shape, 100 * cut.bytes_per_sample) == ((64, 8, 8), 1_638_400)
    convolutions = (3 * 32 * 9 + 32) + (32 * 64 * 9 + 64) + (64 * 64 * 9 + 64)
    norms = 2 * (32 + 64 + 64)
    assert cut.front_params + cut.back_params == convolutions + norms + (4096 * 128 + 128) + (128 * 10 + 10) == 582_346
    products = 1024 * 32 * 27 + 256 * 64 * 288 + 64 * 64 * 576 + 4096 * 128 + 128 * 10
    assert cut.front_flops + cut.back_flops == 2 * products == 16_976_384


def test_vgg5_begins_as_pipelearns_does() -> None:
    model = zoo.build("pipelearn/vgg5", 10, 0, (3, 32, 32))
    weights, limit = model.get_parameter("fc1.weight").detach(), (6 / (4096 + 128)) ** 0.5
    assert 0.99 * limit < float(weights.max()) <= limit
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("bias"))


def test_vgg5_ends_in_logits_for_other_inputs_and_classes_too() -> None:
    assert zoo.build("pipelearn/vgg5", 3, 0, (1, 28, 28))(torch.zeros(2, 1, 28, 28)).shape == (2, 3)


def test_torchvisions_models_have_their_own_usual_input_and_no_usual_cut() -> None:
    assert zoo.default_input("resnet18") == (3, 224, 224)
    assert zoo.default_input("inception_v3") == (3, 299, 299)
    assert zoo.default_cut("resnet18") is None


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("resnet81", "resnet18, resnet152, resnet101"),
        ("digit/cnn", "digits/cnn"),
        ("?", ", ".join(zoo.OWN)),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_ones(name: str, nearest: str) -> None:
    for call in (lambda name: zoo.build(name, 10, 0, (3, 32, 32)), zoo.default_input, zoo.default_cut):
        with pytest.raises(ConfigError) as error:
            call(name)
        assert str(error.value) == (
            f"There is no model '{name}': the nearest names are {nearest}; "
            "torchvision's classification models have their own names."
        )


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        (
            "resnet18",
            (1, 8, 8),
            "resnet18 cannot be built for inputs of 1×8×8 (it takes images of 3 channels, not 1): "
            "its usual input is 3×224×224.",
        ),
        (
            "vit_b_16",
            (3, 30, 30),
            "vit_b_16 cannot be built for inputs of 3×30×30 (Input shape indivisible by patch size!): "
            "its usual input is 3×224×224.",
        ),
        (
            "digits/cnn",
            (64,),
            "digits/cnn cannot be built for inputs of 64 (not enough values to unpack (expected 3, got 1)): "
            "its usual input is 1×8×8.",
        ),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(name: str, shape: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        zoo.build(name, 10, 0, shape)
    assert str(error.value) == sentence
