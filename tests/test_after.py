"""After a run, on a real one: its model is tested, asked and exported, and is the uncut model each time."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ending
from helpers import config_of
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from zsplit.after.coded import cuts_of
from zsplit.after.export import FORMATS, codec_warning
from zsplit.after.export import export as write
from zsplit.after.images import read_images, scale_of
from zsplit.after.names import CIFAR100, class_names
from zsplit.after.trained import Trained, load_trained
from zsplit.data import gather, open_data
from zsplit.errors import ConfigError
from zsplit.model import split
from zsplit.model.zoo import build
from zsplit.results import open_run

Here = Callable[..., Ending]

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(digits_run: Path) -> Trained:
    """The model of the run."""
    return load_trained(open_run(digits_run), CPU)


@pytest.fixture
def run(digits_run: Path, tmp_path: Path) -> Path:
    """A copy of the run's folder, to be damaged: `run` in this test's folder."""
    return Path(shutil.copytree(digits_run, tmp_path / "run"))


def digits(*indices: int) -> tuple[Tensor, Tensor]:
    """Return test samples and their labels."""
    return gather(open_data(config_of()).test, torch.tensor(indices))


def write_digit(path: Path, index: int, size: tuple[int, int] = (8, 8)) -> int:
    """Write a test sample as an image file of 8 bits; return its label."""
    test: Any = open_data(config_of()).test
    pixels = (test.pixels[index, 0].double() * 255 / 16).round().to(torch.uint8).numpy()
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(path)
    return int(test.labels[index])


# zsplit eval


def test_the_uncut_model_tests_as_the_cut_one_did(digits_run: Path, here: Here) -> None:
    summary = json.loads((digits_run / "summary.json").read_text())
    code, out, err = here("eval", str(digits_run), "--device", "cpu", "--json")
    answer = json.loads(out)
    assert (code, err) == (0, "")
    assert (answer["accuracy"], answer["top5"]) == (summary["test_accuracy"], summary["test_top5"])
    assert answer["loss"] == pytest.approx(summary["test_loss"], rel=1e-6)
    assert (answer["samples"], answer["same"]) == (len(open_data(config_of()).test), True)
    assert answer["weights"] == str(digits_run / "model.safetensors")


def test_eval_says_what_it_found_and_that_it_is_what_the_summary_says(digits_run: Path, here: Here) -> None:
    summary = json.loads((digits_run / "summary.json").read_text())
    accuracy, loss = f"test accuracy {100 * summary['test_accuracy']:.2f} %", f"loss {summary['test_loss']:.4f}"
    code, out, err = here("eval", str(digits_run))
    assert (code, err) == (0, "")
    first, second, third = out.splitlines()
    assert first == f"{accuracy}, top-5 {100 * summary['test_top5']:.2f} %, {loss}"
    assert second == f"355 samples, weights of {digits_run}/model.safetensors"
    assert third == f"Equal to the run's summary: {accuracy}, {loss}."


def test_eval_says_that_other_weights_are_not_what_the_summary_says(run: Path, here: Here) -> None:
    weights = load_file(run / "model.safetensors")
    save_file({name: tensor * 0.5 for name, tensor in weights.items()}, run / "model.safetensors")
    out = here("eval", "run").out
    assert out.splitlines()[-1].startswith("Not equal to the run's summary: test accuracy ")


def test_eval_compares_with_what_the_summary_says_of_the_model_without_its_codec(run: Path, here: Here) -> None:
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"test_accuracy": 0.5, "test_accuracy_codec": 0.5}))
    assert json.loads(here("eval", "run", "--json").out)["same"] is True
    (run / "summary.json").write_text(json.dumps(summary | {"test_accuracy_raw": 0.5}))
    assert json.loads(here("eval", "run", "--json").out)["same"] is False


def test_a_run_that_was_stopped_is_tested_with_its_last_version(run: Path, here: Here) -> None:
    whole = json.loads(here("eval", "run", "--json").out)
    (run / "model.safetensors").unlink()
    stopped = json.loads(here("eval", "run", "--json").out)
    last = json.loads((run / "summary.json").read_text())["stored"][-1]
    assert stopped == whole | {"weights": f"run/versions/{last}.safetensors"}


def test_a_run_whose_broker_was_killed_has_nothing_to_compare_with(run: Path, here: Here) -> None:
    (run / "model.safetensors").unlink()
    (run / "summary.json").unlink()
    code, out, _ = here("eval", "run")
    assert (code, out.splitlines()[-1]) == (0, "The run's summary has no test figures to compare with.")


def test_eval_reads_the_data_from_another_folder(tmp_path: Path, here: Here) -> None:
    for part in ("train", "test"):
        for label in ("left", "right"):
            (tmp_path / "moved" / part / label).mkdir(parents=True)
            Image.new("RGB", (32, 32), "red" if label == "left" else "blue").save(
                tmp_path / "moved" / part / label / "0.png"
            )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(
        '[model]\nname = "pipelearn/vgg5"\nnum_classes = 2\ninput = [3, 32, 32]\n'
        '[data]\nname = "imagefolder"\npath = "gone"\n[schedule]\nclients = 1\n'
    )
    save_file(build("pipelearn/vgg5", 2, 0, (3, 32, 32)).state_dict(), tmp_path / "run" / "model.safetensors")
    assert here("eval", "run").code == 2
    code, out, _ = here("eval", "run", "--data", "moved", "--json")
    assert (code, json.loads(out)["samples"], json.loads(out)["top5"]) == (0, 2, 1.0)
    code, out, _ = here("predict", "run", "moved/test/left/0.png", "--data", "moved", "--json")
    assert {guess["name"] for guess in json.loads(out)[0]["classes"]} == {"left", "right"}


# zsplit predict


def test_predict_names_the_classes_with_the_probabilities_of_the_model(
    digits_run: Path, trained: Trained, here: Here, tmp_path: Path
) -> None:
    labels = [write_digit(tmp_path / f"{index}.png", index) for index in (0, 100)]
    code, out, err = here("predict", str(digits_run), "0.png", "100.png", "--json")
    answer = json.loads(out)
    assert (code, err, [each["image"] for each in answer]) == (0, "", ["0.png", "100.png"])
    with torch.no_grad():
        expected = trained.model(digits(0, 100)[0]).softmax(dim=1)
    for each, probabilities, label in zip(answer, expected, labels, strict=True):
        found = {guess["index"]: guess["probability"] for guess in each["classes"]}
        assert list(found.values()) == sorted(found.values(), reverse=True)
        assert next(iter(found)) == int(probabilities.argmax()) == label
        for index, probability in found.items():
            assert probability == pytest.approx(float(probabilities[index]), abs=0.01)  # 16 levels became 256


def test_predict_prints_the_five_most_probable_classes(digits_run: Path, here: Here, tmp_path: Path) -> None:
    label = write_digit(tmp_path / "it.png", 0)
    code, out, err = here("predict", str(digits_run), "it.png")
    lines = out.splitlines()
    assert (code, err, lines[0], len(lines)) == (0, "", "it.png", 6)
    assert lines[1].split()[1:] == ["%", str(label)]


def test_images_of_another_size_are_brought_to_the_model_when_asked(
    digits_run: Path, here: Here, tmp_path: Path
) -> None:
    label = write_digit(tmp_path / "digit.png", 0)
    large = Image.new("L", (64, 8))
    large.paste(Image.open(tmp_path / "digit.png"), (28, 0))
    large.save(tmp_path / "large.png")
    code, _, err = here("predict", str(digits_run), "large.png")
    assert (code, err) == (
        2,
        "zsplit: large.png has 64×8 pixels, the model takes 8×8 (width×height): --resize brings it there.\n",
    )
    code, out, _ = here("predict", str(digits_run), "large.png", "--resize", "--json")
    assert (code, json.loads(out)[0]["classes"][0]["index"]) == (0, label)
    whole = here("predict", str(digits_run), "digit.png", "--json").out
    assert json.loads(out)[0]["classes"] == json.loads(whole)[0]["classes"]  # it was in the middle


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_kind_have_the_channels_of_the_model(tmp_path: Path, mode: str, channels: int) -> None:
    Image.new("RGB", (5, 4), "white").convert("L" if mode == "LA" else mode).convert(mode).save(tmp_path / "it.tiff")
    scale = scale_of(config_of(data__name="mnist"), channels)
    (pixels,) = read_images([tmp_path / "it.tiff"], (channels, 4, 5), scale, False)
    assert pixels.shape == (channels, 4, 5)
    assert torch.allclose(pixels, torch.tensor((1 - 0.1307) / 0.3081), atol=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_images_of_16_bits_are_those_of_8_bits(tmp_path: Path, channels: int) -> None:
    pixels = np.arange(0, 240, 12, dtype=np.uint8).reshape(4, 5)
    Image.fromarray(pixels).save(tmp_path / "8.png")
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "16.png")
    scale = scale_of(config_of(data__name="mnist"), channels)
    eight, sixteen = read_images([tmp_path / "8.png", tmp_path / "16.png"], (channels, 4, 5), scale, False)
    assert torch.equal(eight, sixteen)


def test_an_image_file_is_scaled_as_the_training_data_were(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    for part in ("train", "test"):
        (tmp_path / part / "only").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / part / "only" / "0.png")
    config = config_of(data__name="imagefolder", data__path=str(tmp_path))
    trained_on = open_data(config).train[0][0]
    read = read_images([tmp_path / "train/only/0.png"], (3, 6, 5), scale_of(config, 3), False)
    assert torch.equal(read[0], trained_on)


def test_made_up_images_are_scaled_as_the_training_data_were(tmp_path: Path) -> None:
    config = config_of(data__name="fake", data__shape=(3, 4, 5), data__samples=1)
    train: Any = open_data(config).train
    Image.fromarray(train.pixels[0].permute(1, 2, 0).numpy()).save(tmp_path / "0.png")
    read = read_images([tmp_path / "0.png"], (3, 4, 5), scale_of(config, 3), False)
    assert torch.equal(read[0], train[0][0])


def test_classes_have_the_names_of_their_dataset() -> None:
    assert class_names(config_of(data__name="cifar10", data__path="x"))[:2] == ("airplane", "automobile")
    assert class_names(config_of()) == ()
    assert len(CIFAR100) == len(set(CIFAR100)) == 100
    assert list(CIFAR100) == sorted(CIFAR100)


# zsplit export


def exported(run: Path, trained: Trained, suffix: str, here: Here) -> Path:
    code, out, err = here("export", str(run), "--to", f"it{suffix}")
    assert (code, out, err) == (0, f"Written: it{suffix}\n", "")
    return Path(f"it{suffix}").resolve()


def same(trained: Trained, model: Callable[[Tensor], Tensor], size: int, close: float = 0.0) -> bool:
    """Whether a model gives what the uncut one does, for a batch of any size; bit for bit unless `close`."""
    x, _ = digits(*range(size))
    with torch.no_grad():
        found, expected = model(x), trained.model(x)
    assert found.shape == (size, 10)
    return torch.allclose(found, expected, atol=close, rtol=0)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_an_exported_state_dict_is_the_uncut_model_s(
    digits_run: Path, trained: Trained, suffix: str, here: Here
) -> None:
    path = exported(digits_run, trained, suffix, here)
    state = torch.load(path, weights_only=True) if suffix == ".pt" else load_file(path)
    model = build("digits/cnn", 10, 99, (1, 8, 8)).eval()
    model.load_state_dict(state)
    assert same(trained, model, 5)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_exported_files_can_be_read_by_whoever_reads_other_files(digits_run: Path, suffix: str, here: Here) -> None:
    assert here("export", str(digits_run), "--to", f"it{suffix}").code == 0
    other = Path("other")
    other.touch()
    assert Path(f"it{suffix}").stat().st_mode == other.stat().st_mode


@pytest.mark.parametrize("size", [1, 3])
def test_an_exported_program_gives_the_outputs_of_the_uncut_model(
    digits_run: Path, trained: Trained, size: int, here: Here
) -> None:
    program = torch.export.load(exported(digits_run, trained, ".pt2", here))
    assert same(trained, program.module(), size, 1e-5)


@pytest.mark.parametrize("suffix", [".ts", ".torchscript"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.load.*:FutureWarning")
def test_torchscript_gives_the_outputs_of_the_uncut_model(
    digits_run: Path, trained: Trained, suffix: str, here: Here
) -> None:
    model = torch.jit.load(exported(digits_run, trained, suffix, here))
    assert same(trained, model, 1, 1e-5)
    assert same(trained, model, 3, 1e-5)


@pytest.mark.filterwarnings("ignore")
def test_an_onnx_model_gives_the_outputs_of_the_uncut_model(digits_run: Path, trained: Trained, here: Here) -> None:
    onnx = pytest.importorskip("onnx", reason="zsplit[onnx] is not installed")
    pytest.importorskip("onnxscript", reason="zsplit[onnx] is not installed")
    from onnx.reference import ReferenceEvaluator

    path = exported(digits_run, trained, ".onnx", here)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    evaluator = ReferenceEvaluator(model)
    for size in (1, 3):
        assert same(trained, lambda x: torch.tensor(evaluator.run(["logits"], {"input": x.numpy()})[0]), size, 1e-4)


def test_onnx_without_its_packages_is_said_in_a_sentence(
    digits_run: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zsplit.after.graphs.ONNX_PACKAGES", ("onnx_of_nowhere", "onnxscript_of_nowhere"))
    assert here("export", str(digits_run), "--to", "onnx") == (
        2,
        "",
        "zsplit: Writing ONNX needs onnx_of_nowhere and onnxscript_of_nowhere, not installed here: "
        "pip install 'zsplit[onnx]', or write .pt2.\n",
    )


def test_front_and_back_are_two_files_with_the_cut_of_the_run(
    digits_run: Path, trained: Trained, here: Here, tmp_path: Path
) -> None:
    code, out, err = here("export", str(digits_run), "--to", "front+back")
    assert (code, err) == (0, "")
    assert out.splitlines() == ["Written: demo-front.safetensors", "Written: demo-back.safetensors"]
    parts = split(build("digits/cnn", 10, 99, (1, 8, 8)), torch.zeros(2, 1, 8, 8), "pool")
    for part, name in zip(parts, ("front", "back"), strict=True):
        part.load_state_dict(load_file(tmp_path / f"demo-{name}.safetensors"))
        part.eval()
    assert same(trained, lambda x: parts[1](parts[0](x)), 3)


def test_front_and_back_may_part_elsewhere(digits_run: Path, here: Here, tmp_path: Path) -> None:
    assert here("export", str(digits_run), "--to", "two.front+back", "--cut", "relu1").code == 0
    assert sorted(load_file(tmp_path / "two-front.safetensors")) == ["conv1.bias", "conv1.weight"]
    code, _, err = here("export", str(digits_run), "--to", "other.front+back", "--cut", "rel9")
    assert (code, "There is no 'rel9' in Sequential" in err) == (2, True)
    assert not list(tmp_path.glob("other*"))


def test_a_model_that_is_cut_twice_is_three_files(
    digits_run: Path, trained: Trained, here: Here, tmp_path: Path
) -> None:
    code, out, err = here("export", str(digits_run), "--to", "it.front+back", "--cut", "relu1", "--cut", "flatten")
    names = ("front", "middle", "tail")
    assert (code, err, out.splitlines()) == (0, "", [f"Written: it-{name}.safetensors" for name in names])
    parts = split(build("digits/cnn", 10, 99, (1, 8, 8)), torch.zeros(2, 1, 8, 8), "relu1", "flatten")
    for part, name in zip(parts, names, strict=True):
        part.load_state_dict(load_file(tmp_path / f"it-{name}.safetensors"))
        part.eval()
        with safe_open(tmp_path / f"it-{name}.safetensors", framework="pt") as file:
            assert file.metadata() == {"format": "pt", "part": name, "cut": "relu1", "tail": "flatten"}
    assert same(trained, lambda x: parts[2](parts[1](parts[0](x))), 3)


def test_what_lies_at_an_end_of_the_model_is_no_part(trained: Trained, tmp_path: Path) -> None:
    files = write(trained, tmp_path / "it.front+back", ("input", "flatten"))
    assert [file.name for file in files] == ["it-middle.safetensors", "it-tail.safetensors"]
    files = write(trained, tmp_path / "other.front+back", ("relu1", "output"))
    assert [file.name for file in files] == ["other-front.safetensors", "other-middle.safetensors"]
    for cut in ("input", "output"):
        with pytest.raises(ConfigError) as error:
            write(trained, tmp_path / "none.front+back", (cut,))
        assert str(error.value) == (
            f"The model is cut at its {cut}, so one part is all of it: write .safetensors, "
            "or name a place inside it with --cut."
        )


def test_more_than_two_cuts_are_refused(digits_run: Path, here: Here) -> None:
    cuts = [option for cut in ("relu1", "pool", "flatten") for option in ("--cut", cut)]
    assert here("export", str(digits_run), "--to", "front+back", *cuts) == (
        2,
        "",
        "zsplit: --cut names 3 places: name one for front and back, two for front, middle and tail.\n",
    )


def test_a_file_is_replaced_only_when_that_is_asked_for(digits_run: Path, here: Here, tmp_path: Path) -> None:
    (tmp_path / "demo.pt").write_text("dear")
    assert here("export", str(digits_run), "--to", "pt") == (
        2,
        "",
        "zsplit: demo.pt exists already: choose another --to, or replace it with --force.\n",
    )
    assert (tmp_path / "demo.pt").read_text() == "dear"
    assert here("export", str(digits_run), "--to", "pt", "--force").code == 0
    assert (
        torch.load(tmp_path / "demo.pt", weights_only=True).keys()
        == build("digits/cnn", 10, 0, (1, 8, 8)).state_dict().keys()
    )
    assert [path.name for path in tmp_path.iterdir()] == ["demo.pt"]


def test_a_model_that_no_graph_can_hold_is_said_in_a_sentence(trained: Trained, tmp_path: Path) -> None:
    odd = trained._replace(model=Undecided())
    with pytest.raises(ConfigError, match=r"^The model cannot be written as an exported program \(.*\): write"):
        write(odd, tmp_path / "it.pt2")
    assert list(tmp_path.iterdir()) == []


class Undecided(torch.nn.Module):
    """What it computes depends on the values that come in."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


def test_the_cut_is_known_where_all_clients_had_the_same() -> None:
    assert cuts_of({"plan": {"0": {"cut": "relu"}, "1": {"cut": "relu"}}}) == ("relu",)
    assert cuts_of({"plan": {"0": {"cut": "relu", "tail": "pool"}}}) == ("relu", "pool")
    assert cuts_of({"plan": {"0": {"cut": "relu"}, "1": {"cut": "pool"}}}) == cuts_of({}) == ()


def test_a_codec_that_changed_the_accuracy_by_more_than_a_point_is_warned_of() -> None:
    assert codec_warning({"test_accuracy_codec": 0.93, "test_accuracy_raw": 0.85}) == (
        "The exported model has no codec at the cut: its test accuracy is 85.00 %, with the run's codec it was "
        "93.00 %; --with-codec puts it there."
    )
    assert codec_warning({"test_accuracy_codec": 0.93, "test_accuracy_raw": 0.925}) == codec_warning({}) == ""


def test_export_warns_of_the_codec_on_stderr(run: Path, here: Here) -> None:
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"test_accuracy_codec": 0.5, "test_accuracy_raw": 0.9}))
    code, out, err = here("export", "run", "--to", "pt")
    assert (code, out, err.startswith("The exported model has no codec at the cut: ")) == (
        0,
        "Written: demo.pt\n",
        True,
    )


def test_the_page_lists_every_format() -> None:
    page = (Path(__file__).parents[1] / "docs" / "after.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `.")]
    assert sorted(",".join(rows).replace("`", "").replace(" ", "").split(",")) == sorted(FORMATS)


# Errors


def test_commands_on_a_run_that_is_none_say_so(here: Here, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for command in (["eval"], ["predict"], ["export", "--to", "pt"]):
        name, *options = command
        images = ["x.png"] if name == "predict" else []
        assert here(name, "gone", *images, *options).err == (
            "zsplit: There is no run gone: give the folder of a run, such as runs/digits-1.\n"
        )
        code, out, err = here(name, "empty", *images, *options)
        assert (code, out) == (2, "")
        assert err == "zsplit: empty is no run's folder, it has no config.toml: give one such as runs/digits-1.\n"


def test_a_run_without_a_version_says_so(run: Path, here: Here) -> None:
    (run / "model.safetensors").unlink()
    shutil.rmtree(run / "versions")
    assert here("export", "run", "--to", "pt") == (
        2,
        "",
        "zsplit: run holds no version of the model: the run ended before one was stored, so start it again.\n",
    )


def test_a_run_of_a_script_s_own_model_says_what_can_be_done(run: Path, here: Here) -> None:
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace('"digits/cnn"', '"Net"'))
    code, _, err = here("eval", "run")
    assert code == 2
    assert err.startswith(
        "zsplit: The run's model cannot be built here (There is no model 'Net': the nearest names are "
    )
    assert err.endswith("let that script load run/model.safetensors with safetensors.\n")


def test_weights_of_another_model_are_refused(run: Path, here: Here) -> None:
    weights = load_file(run / "model.safetensors")
    sentence = (
        "zsplit: run/model.safetensors is not of the model that the run's config names, they differ in '{}': put the "
        "run's own files back.\n"
    )
    save_file({name: tensor for name, tensor in weights.items() if name != "fc1.bias"}, run / "model.safetensors")
    assert here("eval", "run") == (1, "", sentence.format("fc1.bias"))
    save_file(weights | {"fc2.bias": torch.zeros(11)}, run / "model.safetensors")
    assert here("eval", "run") == (1, "", sentence.format("fc2.bias"))


def test_weights_that_are_damaged_are_refused(run: Path, here: Here) -> None:
    (run / "model.safetensors").write_bytes(b"\0" * 20)
    code, out, err = here("eval", "run")
    assert (code, out) == (1, "")
    assert err.startswith("zsplit: run/model.safetensors cannot be read (")
    assert err.endswith("): put it back from a copy, or run again.\n")


def test_what_is_no_image_is_said_in_a_sentence(digits_run: Path, here: Here, tmp_path: Path) -> None:
    (tmp_path / "it.png").write_text("no picture")
    assert here("predict", str(digits_run), "it.png").err == (
        "zsplit: it.png is not an image that Pillow reads: give one such as a PNG or a JPEG.\n"
    )
    assert here("predict", str(digits_run), "gone.png").err == ("zsplit: There is no image gone.png: check the path.\n")
    whole = tmp_path / "whole.png"
    write_digit(whole, 0, (80, 80))
    (tmp_path / "torn.png").write_bytes(whole.read_bytes()[:150])
    code, _, err = here("predict", str(digits_run), "torn.png", "--resize")
    assert (code, err.startswith("zsplit: torn.png cannot be read (")) == (2, True)


def test_a_model_that_takes_no_images_is_not_asked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^The model takes samples of shape \[7\], and images are \[1, H, W\]"):
        read_images([tmp_path / "x.png"], (7,), scale_of(config_of(), 1), False)


def test_images_of_a_script_s_own_data_are_not_guessed_at() -> None:
    with pytest.raises(ConfigError, match=r'^data.name = "own" does not say how images are scaled: '):
        scale_of(config_of(data__name="own"), 1)


def test_data_that_are_in_no_folder_take_no_path(digits_run: Path, here: Here) -> None:
    assert here("eval", str(digits_run), "--data", "x").err == (
        'zsplit: data.name = "digits" is not read from a folder: leave --data out.\n'
    )


def test_an_unknown_suffix_names_those_that_are_known(digits_run: Path, here: Here) -> None:
    assert here("export", str(digits_run), "--to", "model.h5") == (
        2,
        "",
        f"zsplit: model.h5 does not say what to write: end it in {', '.join(FORMATS)}.\n",
    )


def test_a_place_where_nothing_can_be_written_is_said_in_a_sentence(digits_run: Path, here: Here) -> None:
    assert here("export", str(digits_run), "--to", "no/it.pt") == (
        1,
        "",
        "zsplit: no/it.pt cannot be written (No such file or directory): choose another --to.\n",
    )
