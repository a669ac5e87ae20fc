"""The command line as a person meets it: what goes to which stream, exit codes, Ctrl-C, nothing left behind."""

import json
import os
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import pytest
from conftest import PATIENCE, QUICK, ZSPLIT, Command, Ending, Processes, is_mapped, settings, until

from zsplit.config import keys, load_config

ENDLESS = settings("broker.port=0", *QUICK, "run.rounds=100000")

STOP = 3.0
"""Seconds within which Ctrl-C has to have stopped everything."""

Here = Callable[..., Ending]


# zsplit run


class Finished(NamedTuple):
    """A run that is over: its command and its folder."""

    command: Command
    folder: Path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """A run of a config file, with keys set on top, its summary asked for as JSON."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "own.toml").write_text('[run]\nname = "own"\nrounds = 7\n[broker]\nport = 0\n')
    with Processes(folder) as processes:
        options = [*settings(*QUICK, "train.lr=0.02"), "--json", "--out", "deep/er/out"]
        yield Finished(processes.run("run", "own.toml", *options), folder / "deep" / "er" / "out")


def test_run_prints_the_summary_as_json_and_nothing_else_on_stdout(finished: Finished) -> None:
    assert finished.command.process.returncode == 0
    assert json.loads("\n".join(finished.command.out)) == json.loads((finished.folder / "summary.json").read_text())


def test_run_shows_meanwhile_on_stderr_how_it_goes(finished: Finished) -> None:
    said = finished.command.err
    assert any(" round 2/2  loss " in line for line in said)
    assert "run own finished  test" in said[-1]
    assert not any("Traceback" in line for line in said)


def test_what_is_set_on_the_command_line_overrides_the_config_file(finished: Finished) -> None:
    config = load_config(finished.folder / "config.toml")
    assert (config.run.name, config.run.rounds, config.train.lr) == ("own", 2, 0.02)


def test_run_leaves_a_log_of_every_peer_and_none_of_them_said_anything(finished: Finished) -> None:
    logs = {path.name: path.read_text() for path in (finished.folder / "logs").iterdir()}
    assert logs == {"client-0.log": "", "client-1.log": "", "server-0.log": ""}


def test_run_prints_figures_and_paths_and_numbers_the_folders(here: Here, tmp_path: Path) -> None:
    (tmp_path / "runs" / "toy-1").mkdir(parents=True)
    quick = settings("broker.port=0", *QUICK, "run.rounds=1", "run.name=toy", "schedule.policy=round_robin")
    code, out, err = here("run", *quick)
    assert (code, err) == (0, "")
    tail = out.splitlines()[-6:]
    assert tail[0].startswith("val accuracy ")
    assert tail[1].startswith("test accuracy ")
    assert tail[2].startswith("1 rounds, 42 steps in ")
    assert tail[3].endswith(" MB down")
    assert tail[4:] == ["Everything is in runs/toy-2", "The merged model is runs/toy-2/model.safetensors"]
    assert (tmp_path / "runs/toy-2/model.safetensors").is_file()


# Ctrl-C


def test_ctrl_c_stops_everything_and_says_what_was_kept(processes: Processes) -> None:
    run = processes.start("run", "--no-monitor", "--out", "out", *ENDLESS)
    run.line(" round 2/")
    run.signal(signal.SIGINT)
    began = monotonic()
    assert run.wait(STOP) == 1
    assert processes.gone(STOP + began - monotonic())
    assert monotonic() - began < STOP
    summary = json.loads((processes.folder / "out" / "summary.json").read_text())
    assert run.err == [f"zsplit: {summary['sentence']}."]
    assert f"The last version, {summary['stored'][-1][:12]}, is kept" in run.err[0]
    assert "`zsplit resume out` goes on with it" in run.err[0]
    assert run.out[-1] == "Everything is in out"


def test_ctrl_c_before_the_run_begins_leaves_nothing_at_all(processes: Processes) -> None:
    run = processes.start("run", "--no-monitor", "--out", "out", *ENDLESS)
    until(lambda: any(is_mapped("libtorch", process) for process in processes.alive()))
    run.signal(signal.SIGINT)
    began = monotonic()
    assert run.wait(STOP) == 1
    assert processes.gone(STOP + began - monotonic())
    assert monotonic() - began < STOP
    assert run.said == ["zsplit: stopped by SIGINT. Nothing was stored yet: start the run again."]
    assert not (processes.folder / "out").exists()


AT_ITS_TERMINAL = """
import os, sys

os.open(os.ttyname(0), os.O_RDWR)  # a session's first terminal: what is typed there reaches it as signals
os.execv(sys.argv[1], sys.argv[1:])
"""

HIDDEN, SEEN = b"\x1b[?25l", b"\x1b[?25h"
"""What hides a terminal's cursor, and what shows it again."""


def shown(keyboard: int) -> bytes:
    """Return what was written to the terminal since, or nothing once nobody has it open."""
    assert select.select([keyboard], [], [], PATIENCE)[0], "nothing is written to the terminal"
    try:
        return os.read(keyboard, 65536)
    except OSError:
        return b""


def test_ctrl_c_on_the_keyboard_stops_a_run_under_its_live_screen(processes: Processes) -> None:
    keyboard, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (30, 100))
    run = subprocess.Popen(
        [sys.executable, "-c", AT_ITS_TERMINAL, ZSPLIT, "run", "--out", "out", *ENDLESS],
        cwd=processes.folder,
        env={**os.environ, "TERM": "xterm", **processes.mark},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    screen = b""
    while b"round 2/100000" not in screen:
        screen += (more := shown(keyboard))
        assert more, screen.decode()
    os.write(keyboard, b"\x03")
    began = monotonic()
    after = b"".join(iter(lambda: shown(keyboard), b""))
    os.close(keyboard)
    assert run.wait(STOP) == 1
    assert processes.gone(STOP + began - monotonic())
    assert monotonic() - began < STOP
    assert HIDDEN in screen
    assert after.rfind(SEEN) > after.rfind(HIDDEN), "the cursor is not given back"
    assert b"goes on with it" in after


def test_a_run_that_is_killed_takes_its_processes_and_its_config_with_it(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    run = processes.start("run", "--no-monitor", "--out", "out", *ENDLESS)
    run.line(" round 1/")
    assert len(processes.alive()) > len(("zsplit", "broker", "server", "client", "client"))
    run.process.kill()
    assert processes.gone(STOP)
    assert run.wait() == -signal.SIGKILL
    assert not list((tmp_path / "temporary").glob("*.toml"))
    assert "gone" in json.loads((processes.folder / "out" / "summary.json").read_text())["sentence"]


def test_ctrl_c_stops_a_broker_that_waits_and_those_who_wait_with_it(processes: Processes) -> None:
    broker = processes.start("broker", *settings("broker.port=0"), "--out", "out")
    address = broker.line("The broker listens at ").split()[4].rstrip(";")
    monitor = processes.start("monitor", "--broker", address)
    monitor.line("run digits waiting")
    broker.signal(signal.SIGINT)
    assert (broker.wait(), monitor.wait()) == (1, 0)
    sentence = "stopped by SIGINT. Nothing was stored yet: start the run again"
    assert broker.err == [sentence]
    assert monitor.out[-1].endswith(sentence)
    assert list(processes.folder.iterdir()) == []


# zsplit cuts, zsplit config

NET = """
from torch import nn


def net(num_classes, shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[-1] ** 2, 16), nn.ReLU(), nn.Linear(16, num_classes))
"""


def test_cuts_prints_every_place_as_json(here: Here) -> None:
    code, out, err = here("cuts", "resnet18", "--input", "3x32x32", "--json")
    places: list[dict[str, Any]] = json.loads(out)
    assert (code, err, len(places)) == (0, "", 22)
    fields = "index name shape bytes_per_sample front_params back_params front_flops back_flops aliases"
    assert {" ".join(place) for place in places} == {fields}
    assert [place["index"] for place in places] == list(range(22))
    first = places[0]
    assert (first["name"], first["shape"], first["bytes_per_sample"]) == ("conv1", [64, 16, 16], 4 * 64 * 16 * 16)
    assert first["front_params"] == 64 * 3 * 7 * 7
    assert {place["name"]: place["aliases"] for place in places if place["aliases"]} == {
        "conv1": ["child:0"], "bn1": ["child:1"], "relu": ["child:2"], "maxpool": ["child:3"],
        "layer1.1.relu_1": ["child:4"], "layer2.1.relu_1": ["child:5"], "layer3.1.relu_1": ["child:6"],
        "layer4.1.relu_1": ["child:7"], "avgpool": ["child:8"],
    }  # fmt: skip
    for what in ("params", "flops"):
        assert len({place[f"front_{what}"] + place[f"back_{what}"] for place in places}) == 1


def test_cuts_prints_every_place_as_a_table(here: Here) -> None:
    code, out, err = here("cuts", "splitnn/mlp")
    assert (code, err) == (0, "")
    assert "splitnn/mlp, input 1x28x28: 5 places to cut" in out
    rows = [line.split() for line in out.splitlines()]
    assert any(row[:3] == ["index", "name", "shape"] for row in rows)
    assert [row[1] for row in rows if row and row[0].isdigit()] == ["flatten", "fc1", "relu1", "fc2", "relu2"]
    assert [row[-1] for row in rows if row and row[0].isdigit()] == [f"child:{n}" for n in range(5)]
    assert "The two ends are cuts as well" in out


def test_cuts_of_a_model_of_one_s_own_are_listed_where_its_module_is_allowed(here: Here, tmp_path: Path) -> None:
    (tmp_path / "listed.py").write_text(NET)
    refused = here("cuts", "listed:net", "--input", "1x8x8")
    assert refused.code == 2
    assert "'listed:net' would import listed, which this peer was not started with" in refused.err
    shown = here("cuts", "listed:net", "--input", "1x8x8", "--allow", "listed", "--json")
    assert [place["name"] for place in json.loads(shown.out)] == ["0", "1", "2"]
    assert here("cuts", "listed:net", "--allow", "listed").err == (
        "zsplit: listed:net does not tell the shape of its input: give it, with --input or as model.input.\n"
    )


def test_config_prints_every_key_with_its_default_type_and_meaning(here: Here) -> None:
    code, out, err = here("config")
    lines = out.splitlines()
    assert (code, err, len(lines)) == (0, "", 2 * len(keys()))
    for key, first, second in zip(keys(), lines[::2], lines[1::2], strict=True):
        assert first.startswith(f"{key.key} = ")
        assert first.endswith(f"({key.type})")
        assert second.strip() == key.doc


def test_config_prints_every_key_as_json(here: Here) -> None:
    code, out, _ = here("config", "--json")
    assert code == 0
    assert [each["key"] for each in json.loads(out)] == [key.key for key in keys()]


# Help and usage


COMMANDS = [
    *("broker", "client", "compare", "config", "cuts", "data", "eval", "export", "monitor", "plan", "predict"),
    *("profile", "resume", "run", "server", "stop", "sweep", "timeline"),
]


def test_help_names_every_command(processes: Processes) -> None:
    shown = processes.run("--help")
    assert shown.process.returncode == 0
    assert shown.err == []
    named = {line.split()[0] for line in shown.out[shown.out.index("Commands:") + 1 :]}
    assert named == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help(command: str, here: Here) -> None:
    code, out, err = here(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: zsplit {command} ")


USAGE = {
    "frob": "No such command 'frob'.",
    "run --frob": "No such option '--frob'.",
    "run a b": "Got unexpected extra argument (b)",
    "client -i -1": "Invalid value for '-i' / '--index': -1 is not in the range x>=0.",
    "run none.toml": "There is no config file none.toml: check the path, or leave it out for the demo.",
    "broker none.toml": "There is no config file none.toml: check the path, or leave it out for the demo.",
    "run --set train.rl=1": "train.rl is not a key of the config: the nearest is train.lr.",
    "broker --set train.lr": "`train.lr` sets no key: write section.key=value, such as train.lr=0.05.",
    "monitor --broker nowhere": "'nowhere' is no address of a broker: give it as HOST:PORT.",
    "server --broker host:none": "'host:none' is no address of a broker: give it as HOST:PORT.",
    "cuts resnet18 --input 32": "resnet18 cannot be built for inputs of 32",
    "cuts resnet18 --input big": "'big' is no shape: give it as channels, height and width, such as 3x32x32.",
}


@pytest.mark.parametrize("arguments", USAGE)
def test_a_usage_error_is_a_sentence_and_exit_code_two(arguments: str, here: Here, tmp_path: Path) -> None:
    code, out, err = here(*arguments.split())
    assert (code, out) == (2, "")
    assert USAGE[arguments] in err.splitlines()[-1]
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", ["--debug monitor --broker nowhere", "run none.toml --debug", "--debug broker none.toml"]
)
def test_debug_shows_the_traceback_before_the_sentence(arguments: str, here: Here) -> None:
    code, _, err = here(*arguments.split())
    plain = here(*arguments.replace("--debug", "").split())
    assert (code, plain.code) == (2, 2)
    assert err.startswith("Traceback (most recent call last):\n")
    assert err.splitlines()[-1] == plain.err.rstrip()
    assert plain.err.startswith("zsplit: ")


def test_a_bug_is_called_one_in_a_sentence(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("in the middle of it")

    monkeypatch.setattr("zsplit.cli.keys", fail)
    sentence = "zsplit: this is a bug: ZeroDivisionError: in the middle of it; --debug shows where.\n"
    assert here("config") == Ending(1, "", sentence)
    code, _, err = here("config", "--debug")
    assert code == 1
    assert "Traceback" in err
