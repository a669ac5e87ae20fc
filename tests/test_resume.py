"""A broker that is started on the folder of an unfinished run takes it up, or says in one sentence why it cannot."""

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import QUICK, Processes, free_port, settings, until

from zsplit_broker.journal import JOURNAL
from zsplit_broker.versions import SUFFIX

ROUNDS = "run.rounds=4"

LEAVING = "link.lease_seconds=5"


def options(*more: str) -> list[str]:
    """Return the config of the runs here, with keys set on top."""
    return settings(*QUICK, ROUNDS, LEAVING, *more)


def start(processes: Processes, port: int, *broker: str) -> None:
    """Start a broker with these arguments, a server and both clients."""
    address = f"127.0.0.1:{port}"
    processes.start("broker", *broker).line("listens")
    for words in ("server", "client -i 0", "client -i 1"):
        processes.start(*words.split(), "--broker", address)


def versions_of(out: Path) -> list[str]:
    """Return the version of each round of a run that is over."""
    summary = json.loads((out / "summary.json").read_text())
    assert summary["ok"], summary["sentence"]
    assert summary["steps"] == 168, "42 steps in each of four rounds, none of them twice"
    return summary["versions"]


def rounds_in(out: Path) -> list[int]:
    """Return the rounds that have their line in `metrics.jsonl`, in order."""
    return [json.loads(line)["round"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The versions of the run to which nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed")
    port = free_port()
    with Processes(folder) as processes:
        start(processes, port, *options(f"broker.port={port}"), "--out", "out")
        for command in processes.started:
            assert command.wait() == 0
    assert rounds_in(folder / "out") == [1, 2, 3, 4]
    return versions_of(folder / "out")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of which every process was killed in its third round or later: never to be changed."""
    folder = tmp_path_factory.mktemp("killed")
    port = free_port()
    with Processes(folder) as processes:
        start(processes, port, *options(f"broker.port={port}", "run.rounds=400"), "--out", "out")
        monitor = processes.start("monitor", "--broker", f"127.0.0.1:{port}", "--no-live")
        monitor.line(" round 2/")
        for command in processes.started:
            command.process.kill()
        for command in processes.started:
            command.wait()
    return folder / "out"


@pytest.fixture
def unfinished(killed: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return Path(shutil.copytree(killed, tmp_path / "out"))


Lines = Callable[[list[str]], str]


def refused(processes: Processes, *arguments: str) -> tuple[int, str]:
    """Start a broker that is refused; return its exit code and its one sentence."""
    command = processes.run("broker", *arguments, "--out", "out")
    assert len(command.err) == 1, command.err
    return command.process.returncode, command.err[0]


@pytest.mark.parametrize("when", ["at once", "after a round"])
@pytest.mark.parametrize("policy", ["parallel", "round_robin"])
def test_a_run_whose_processes_are_all_killed_at_once_is_taken_up_and_ends_bit_identical(
    when: str, policy: str, processes: Processes, tmp_path: Path, undisturbed: list[str]
) -> None:
    port = free_port()
    keys = options(f"broker.port={port}", f"schedule.policy={policy}")
    start(processes, port, *keys, "--out", "out")
    monitor = processes.start("monitor", "--broker", f"127.0.0.1:{port}", "--no-live")
    monitor.line("joined" if when == "at once" else " round 2/")
    first = list(processes.started)
    for command in first:
        command.process.kill()
    for command in first:
        command.wait()
    start(processes, port, *keys, "--out", "out")
    for command in processes.started[len(first) :]:
        assert command.wait() == 0, command.err
    assert rounds_in(tmp_path / "out") == [1, 2, 3, 4]
    if policy == "parallel":
        assert versions_of(tmp_path / "out") == undisturbed
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_run_that_is_finished_is_not_taken_up(processes: Processes, digits_run: Path, tmp_path: Path) -> None:
    shutil.copytree(digits_run, tmp_path / "out")
    code, sentence = refused(processes, str(tmp_path / "out" / "config.toml"))
    assert (code, sentence) == (
        2,
        "zsplit: out holds a run that is finished: choose another --out to train anew.",
    )


def test_a_run_of_another_config_is_refused_with_the_keys_that_differ(processes: Processes, unfinished: Path) -> None:
    code, sentence = refused(processes, *options("run.rounds=400", "train.lr=0.5", "broker.port=0"))
    assert code == 2
    assert sentence == (
        "zsplit: out holds a run of another config (train.lr is 0.05 there and 0.5 here): "
        "resume it with its own (zsplit resume out), or choose another --out."
    )


def test_a_folder_in_use_by_a_live_broker_is_refused_with_its_process(processes: Processes, tmp_path: Path) -> None:
    port = free_port()
    live = processes.start("broker", *options(f"broker.port={port}"), "--out", "out")
    live.line("listens")
    code, sentence = refused(processes, *options(f"broker.port={port + 3}"))
    assert code == 1
    assert f"out is in use by process {live.process.pid} on " in sentence
    live.process.terminate()
    live.wait()


def test_a_journal_of_a_newer_format_is_refused(processes: Processes, unfinished: Path) -> None:
    from zsplit_broker import journal

    file = unfinished / JOURNAL
    lines = file.read_bytes().splitlines(keepends=True)
    header = json.loads(lines[0].split(b" ", 2)[2]) | {"format": 99, "zsplit": "9.0"}
    lines[0] = journal._line(json.dumps(header, separators=(",", ":")).encode())
    file.write_bytes(b"".join(lines))
    code, sentence = refused(processes, *options("run.rounds=400", "broker.port=0"))
    assert code == 1
    assert sentence.endswith("is a journal of a newer format (99; this zsplit reads 1): use zsplit >= 9.0.")


def damage(file: Path) -> None:
    """Change one byte of a version, in the middle of its tensors."""
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)


def test_a_run_of_which_every_version_is_damaged_is_refused_and_nothing_is_deleted(
    processes: Processes, unfinished: Path
) -> None:
    files = sorted((unfinished / "versions").glob("*" + SUFFIX))
    for file in files:
        damage(file)
    code, sentence = refused(processes, *options("run.rounds=400", "broker.port=0"))
    assert code == 1
    assert re.match(
        r"zsplit: every version in out/versions is damaged or gone \(.* does not have its digest\)", sentence
    )
    assert sorted((unfinished / "versions").glob("*" + SUFFIX)) == files


def test_a_damaged_version_is_said_and_the_one_before_it_used(processes: Processes, unfinished: Path) -> None:
    journal = (unfinished / JOURNAL).read_text()
    newest = re.findall(r'"event":"stored","digest":"(\w+)"', journal)[-1]
    damage(unfinished / "versions" / (newest + SUFFIX))
    port = free_port()
    monitor = processes.start("monitor", "--broker", f"127.0.0.1:{port}", "--no-live")
    start(processes, port, *options("run.rounds=400", f"broker.port={port}"), "--out", "out")
    monitor.line(f"version {newest[:12]} cannot be used")
    monitor.line(" round 4/")
    assert (unfinished / "versions").is_dir()
    broker = processes.started[1]
    broker.process.send_signal(signal.SIGINT)
    for command in processes.started:
        command.wait()
    assert "`zsplit resume out` goes on with it" in broker.err[-1]


def test_a_version_that_is_damaged_while_it_is_tested_is_stored_again_by_the_server_that_has_it(
    processes: Processes, tmp_path: Path, undisturbed: list[str]
) -> None:
    port = free_port()
    address = f"127.0.0.1:{port}"
    keys = options(f"broker.port={port}", "run.eval_every=0")
    crash = {"ZSPLIT_TEST_FAULTS": "1", "ZSPLIT_CRASH_AT": "client.evaluate", "ZSPLIT_CRASH_ONCE": str(tmp_path / "o")}
    broker = processes.start("broker", *keys, "--out", "out")
    broker.line("listens")
    others = [processes.start(*words.split(), "--broker", address) for words in ("server", "client -i 0")]
    assert processes.start("client", "-i", "1", "--broker", address, **crash).wait() == -signal.SIGKILL
    broker.process.kill()
    broker.wait()
    newest = tmp_path / "out" / "versions" / (undisturbed[-1] + SUFFIX)
    intact = newest.read_bytes()
    damage(newest)
    monitor = processes.start("monitor", "--broker", address, "--no-live")
    others.append(processes.start("broker", *keys, "--out", "out"))
    monitor.line(f"version {undisturbed[-1][:12]} cannot be used")
    others.append(processes.start("client", "-i", "1", "--broker", address))
    for process in others:
        assert process.wait() == 0, process.err
    assert versions_of(tmp_path / "out") == undisturbed
    assert newest.read_bytes() == intact


def test_a_broker_that_died_before_its_run_s_model_was_written_writes_it_when_it_is_started_again(
    processes: Processes, tmp_path: Path
) -> None:
    port = free_port()
    once = tmp_path / "once"
    address = f"127.0.0.1:{port}"
    keys = options(f"broker.port={port}", "run.rounds=1")
    crash = {"ZSPLIT_TEST_FAULTS": "1", "ZSPLIT_CRASH_AT": "broker.export", "ZSPLIT_CRASH_ONCE": str(once)}
    broker = processes.start("broker", *keys, "--out", "out", **crash)
    broker.line("listens")
    peers = [processes.start(*words.split(), "--broker", address) for words in ("server", "client", "client")]
    assert broker.wait() == -signal.SIGKILL
    assert once.exists()
    again = processes.start("broker", *keys, "--out", "out")
    assert again.wait() == 0
    assert again.err[-1] == "the run is finished"
    assert (tmp_path / "out" / "model.safetensors").exists()
    for peer in peers:
        assert peer.wait() == 0, peer.err


def test_a_broker_that_dies_in_the_middle_of_its_replay_is_taken_up_by_the_next(
    processes: Processes, tmp_path: Path, undisturbed: list[str]
) -> None:
    port, once = free_port(), tmp_path / "once"
    keys = options(f"broker.port={port}")
    start(processes, port, *keys, "--out", "out")
    broker = processes.started[0]
    until(lambda: (tmp_path / "out" / "metrics.jsonl").exists())
    broker.process.kill()
    broker.wait()
    crash = {"ZSPLIT_TEST_FAULTS": "1", "ZSPLIT_CRASH_AT": "broker.replay:5", "ZSPLIT_CRASH_ONCE": str(once)}
    assert processes.run("broker", *keys, "--out", "out", **crash).process.returncode == -signal.SIGKILL
    assert once.exists()
    assert processes.run("broker", *keys, "--out", "out").process.returncode == 0
    for peer in processes.started[1:4]:
        assert peer.wait() == 0, peer.err
    assert versions_of(tmp_path / "out") == undisturbed
