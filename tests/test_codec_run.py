"""Runs through codecs: real processes end with the weights of a plain model that has the slow codec in its graph."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from nets import Plain, images
from slow_codec import SlowMs, ms
from test_exact import SGD, TESTS, assert_same, names_up_to, train_plain, train_split
from torch import Tensor, nn

from zsplit.launch import Result

RATIO, BITS = "0.8", 2
SPEC = f"ms:ratio={RATIO},bits={BITS}"


class Coded(Plain):
    """`Plain` with the slow codec behind `relu1` or `fc2`: what the server sees, and what comes back."""

    def __init__(self, cut: str) -> None:
        super().__init__()
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        for name in ("flatten", "fc1", "relu1", "fc2", "relu2", "fc3"):
            x = self.get_submodule(name)(x)
            if name == self.cut:
                x = SlowMs.apply(x, RATIO, BITS)  # type: ignore[no-untyped-call]
        return x


def run_coded(out: Path, cut: str, clients: int, **keys: object) -> tuple[Result, nn.Module]:
    """Train `Plain` through the codec; return the result, and the model as it was."""
    torch.manual_seed(11)
    model = Plain()
    settings = replace(SGD, policy="parallel", micro_batches=2)
    codecs = {"codec.up": SPEC, "codec.down": "mask"}
    return train_split(out, deepcopy(model), cut, clients, settings, **{**codecs, **keys}), model


@pytest.mark.parametrize("cut", ["relu1", "fc2"])
def test_a_run_through_ms_and_mask_ends_with_the_weights_of_the_reference(cut: str, tmp_path: Path) -> None:
    result, model = run_coded(tmp_path / "run", cut, clients=2)
    coded = Coded(cut)
    coded.load_state_dict(model.state_dict())
    front = names_up_to(model, "fc1") if cut == "relu1" else names_up_to(model, "fc1", "fc2")
    settings = replace(SGD, policy="parallel", micro_batches=2)
    assert_same(result, train_plain(coded, front, 2, settings))


def accuracies(model: nn.Module, batch: int) -> tuple[float, float]:
    """Return the test accuracy of the model as it is, and with what the codec makes of each batch after `relu1`."""
    x, y = images(TESTS, seed=1)
    parts = list(model.children())
    right = [0, 0]
    for xs, ys in zip(x.split(batch), y.split(batch), strict=True):
        smashed = nn.Sequential(*parts[:3])(xs)
        decoded = torch.tensor(ms(smashed.reshape(-1).tolist(), RATIO, BITS).decoded).reshape(smashed.shape)
        for way, tensor in enumerate((smashed, decoded)):
            right[way] += int((nn.Sequential(*parts[3:])(tensor).argmax(1) == ys).sum())
    return right[0] / TESTS, right[1] / TESTS


@pytest.mark.parametrize("through", [True, False])
def test_the_test_data_are_evaluated_both_ways_and_the_config_says_which_counts(through: bool, tmp_path: Path) -> None:
    result, model = run_coded(tmp_path / "run", "relu1", 1, **{"codec.eval": through})
    from safetensors.torch import load_file

    model.load_state_dict(load_file(result.folder / "model.safetensors"))
    model.eval()
    with torch.no_grad():
        raw, coded = accuracies(model, SGD.batch_size)
    summary = result.summary
    assert (summary["test_accuracy_raw"], summary["test_accuracy_codec"]) == (raw, coded)
    assert summary["test_accuracy"] == (coded if through else raw)
    assert summary["test_loss"] == summary["test_loss_codec" if through else "test_loss_raw"]
    assert summary["test_loss_raw"] != summary["test_loss_codec"]
    x, y = images(TESTS, seed=1)
    with torch.no_grad():
        assert summary["test_loss_raw"] == pytest.approx(float(F.cross_entropy(model(x), y)), rel=1e-5)


def test_the_summary_has_the_bytes_that_were_sent_and_those_that_raw_would_have_been(tmp_path: Path) -> None:
    result, _ = run_coded(tmp_path / "run", "relu1", clients=2)
    sent, raw = (result.summary[name]["kinds"] for name in ("bytes", "bytes_raw"))
    samples = result.summary["samples"]
    assert raw["smashed"]["up"] == raw["gradients"]["down"] == samples * 12 * 4
    assert sent["gradients"]["down"] < 0.2 * raw["gradients"]["down"]
    assert sent["smashed"]["up"] < 0.6 * raw["smashed"]["up"]
    assert raw["labels"] == sent["labels"]
    assert raw["evaluation"]["up"] > sent["evaluation"]["up"]


CASES = {
    "random places, and the way back by them": {
        "codec.up": "randtopk:ratio=0.7,alpha=0.3+half+lz4",
        "codec.down": "mask+quantize:bits=6,round=stochastic",
    },
    "stochastic rounding both ways": {
        "codec.up": "quantize:bits=4,scope=channel,round=stochastic",
        "codec.down": "topk:ratio=0.5,scope=sample",
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_loses_something_loses_the_same_each_time(case: str, tmp_path: Path) -> None:
    runs = [run_coded(tmp_path / name, "relu1", clients=2, **CASES[case])[0] for name in ("one", "two")]
    assert all(run.ok for run in runs)
    assert runs[0].summary["versions"] == runs[1].summary["versions"]
    assert runs[0].summary["test_loss_codec"] == runs[1].summary["test_loss_codec"]


def test_lossless_codecs_change_no_bit(tmp_path: Path) -> None:
    coded, _ = run_coded(tmp_path / "coded", "relu1", 2, **{"codec.up": "lz4", "codec.down": "lz4"})
    plain, _ = run_coded(tmp_path / "plain", "relu1", 2, **{"codec.up": "raw", "codec.down": "raw"})
    assert coded.summary["versions"] == plain.summary["versions"]
    assert coded.summary["test_loss_raw"] == coded.summary["test_loss_codec"] == plain.summary["test_loss"]


def test_values_that_are_no_numbers_end_the_run_with_a_sentence(tmp_path: Path) -> None:
    torch.manual_seed(11)
    model = Plain()
    with torch.no_grad():
        model.fc1.weight[0, 0] = torch.nan
    settings = replace(SGD, policy="parallel")
    result = train_split(tmp_path / "run", model, "relu1", 1, settings, **{"codec.up": SPEC})
    assert not result.ok
    assert "which this codec cannot carry: lower train.lr, or set train.clip_norm" in result.sentence
