"""`zsplit eval`, `zsplit predict` and `zsplit export`: what a finished run's model is good for."""

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from zsplit.options import allow_option, json_option
from zsplit.results import RunFolder, open_run

if TYPE_CHECKING:
    from zsplit.after.predict import Prediction
    from zsplit.after.trained import Trained

run_argument = click.argument("run", type=click.Path(path_type=Path))
device_option = click.option(
    "--device", default="auto", show_default=True, metavar="DEVICE", help="auto, cpu, cuda:0 or mps."
)
data_option = click.option(
    "--data", default="", metavar="PATH", help="Folder with the data.  [default: the run's data.path]"
)


@click.command("eval")
@run_argument
@click.option("--with-codec", is_flag=True, help="Put what crosses the cut through the run's codec.")
@data_option
@device_option
@allow_option
@json_option
def eval_command(run: Path, with_codec: bool, data: str, device: str, allow: tuple[str, ...], as_json: bool) -> None:
    """Test the merged model of RUN, uncut and in one process, on the test data of its config."""
    from zsplit.after.evaluate import evaluate

    folder = open_run(run)
    trained = _trained(folder, device, allow)
    scores = evaluate(trained, folder.summary(), data, with_codec, allow)
    if as_json:
        _print_json({**_plain(scores), "same": scores.same, "weights": str(trained.file)})
        return
    click.echo(f"test accuracy {100 * scores.accuracy:.2f} %, top-5 {100 * scores.top5:.2f} %, loss {scores.loss:.4f}")
    click.echo(f"{scores.samples} samples, weights of {trained.file}")
    click.echo(scores.verdict())


@click.command()
@run_argument
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...", type=click.Path(path_type=Path))
@click.option("--resize", is_flag=True, help="Scale and crop images to the model's size.")
@click.option(
    "--split", is_flag=True, help="Run only the front here; the back is at a server of `zsplit broker --serve`."
)
@click.option(
    "--broker", "address", default="127.0.0.1:5757", metavar="HOST:PORT", show_default=True, help="For --split."
)
@click.option("--connect-seconds", default=60.0, show_default=True, help="How long to wait for broker and server.")
@data_option
@device_option
@allow_option
@json_option
def predict(
    run: Path,
    images: tuple[Path, ...],
    resize: bool,
    split: bool,
    address: str,
    connect_seconds: float,
    data: str,
    device: str,
    allow: tuple[str, ...],
    as_json: bool,
) -> None:
    """Say what the merged model of RUN sees on each IMAGE: the most probable classes, best first."""
    from zsplit.after.predict import ask_here
    from zsplit.after.predict import predict as look
    from zsplit.after.split import Asking, ask_split
    from zsplit.after.trained import version_of
    from zsplit.data import sample_shape
    from zsplit.train.machine import choose_device

    folder = open_run(run)
    config, shape = folder.config(), sample_shape(folder.config())
    if split:
        version, place = version_of(folder.weights()), choose_device(device)
        ask = partial(ask_split, Asking(address, shape, version, place, connect_seconds, _say, allow))
    else:
        ask = partial(ask_here, _trained(folder, device, allow))
    predictions = look(config, shape, ask, images, resize, data)
    if as_json:
        _print_json([_plain(each) for each in predictions])
    else:
        _print_predictions(predictions)


@click.command()
@run_argument
@click.option(
    "--to",
    "text",
    required=True,
    metavar="FILE",
    help="Its suffix says how: .pt, .safetensors, .onnx, .pt2, .ts, .front+back; a bare `onnx` is NAME.onnx here.",
)
@click.option(
    "--cut",
    "cuts",
    multiple=True,
    metavar="CUT",
    help="Where the parts part; twice for front, middle and tail.  [default: where the run was cut]",
)
@click.option("--with-codec", is_flag=True, help="Put the run's codec into the graph, a layer at each cut.")
@click.option("--force", is_flag=True, help="Replace files that exist.")
@allow_option
def export(run: Path, text: str, cuts: tuple[str, ...], with_codec: bool, force: bool, allow: tuple[str, ...]) -> None:
    """Write the merged model of RUN for other programs."""
    from zsplit.after.coded import cuts_of
    from zsplit.after.export import codec_warning, known_suffix, target_of
    from zsplit.after.export import export as write

    folder = open_run(run)
    config, summary = folder.config(), folder.summary()
    target = target_of(text, config.run.name)
    known_suffix(target, with_codec)  # before torch is at work for seconds
    codec = config.codec.up if with_codec else ""
    for file in write(_trained(folder, "cpu", allow), target, cuts or cuts_of(summary), force, codec):
        click.echo(f"Written: {file}")
    if not with_codec and (warning := codec_warning(summary)):
        click.echo(warning, err=True)


def _trained(folder: RunFolder, device: str, allowed: tuple[str, ...]) -> "Trained":
    from zsplit.after.trained import load_trained
    from zsplit.train.machine import choose_device

    return load_trained(folder, choose_device(device), allowed)


def _say(sentence: str) -> None:
    """Tell the person at this terminal; stdout is for results."""
    click.echo(sentence, err=True)


def _print_predictions(predictions: "Iterable[Prediction]") -> None:
    for prediction in predictions:
        click.echo(prediction.image)
        for guess in prediction.classes:
            name = f"  {guess.name}" if guess.name != str(guess.index) else ""
            click.echo(f"  {100 * guess.probability:6.2f} %  {guess.index}{name}")


def _plain(record: msgspec.Struct) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(record)
    return fields


def _print_json(answer: object) -> None:
    click.echo(json.dumps(answer, indent=2))
