"""`zsplit stop`: whose run it is, who may end it and how; and the usage of `resume`."""

import fcntl
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import LEAVING, QUICK, Ending, Processes, settings, until

from zsplit.config import Config, load_config, to_toml
from zsplit.errors import ZsplitError
from zsplit.launch import deal_cores, share_cores
from zsplit.stopping import stop_run, under_way

Here = Callable[..., Ending]

HOST = socket.gethostname()


def run_of(folder: Path, lock: str | None = f"7 {HOST}\n", summary: dict[str, object] | None = None) -> Path:
    """Make the folder of a run, as far as it is looked at."""
    folder.mkdir(parents=True)
    (folder / "config.toml").touch()
    if lock is not None:
        (folder / "lock").write_text(lock)
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@contextmanager
def held(folder: Path) -> Iterator[int]:
    """Hold the lock of a folder, as its broker does."""
    lock = os.open(folder / "lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield lock
    finally:
        os.close(lock)


# Refusals


def refusal(folder: Path) -> str:
    with pytest.raises(ZsplitError) as caught:
        stop_run(folder, False, lambda _: None)
    return str(caught.value)


def test_a_run_that_nobody_runs_cannot_be_stopped_and_what_to_do_is_said(tmp_path: Path) -> None:
    killed, done = run_of(tmp_path / "killed"), run_of(tmp_path / "done", summary={"ok": True})
    never = run_of(tmp_path / "never", lock=None)
    assert refusal(killed) == f"No run is under way in {killed}: `zsplit resume {killed}` goes on with it"
    assert refusal(done) == f"No run is under way in {done}: it is finished"
    assert refusal(never) == f"No run is under way in {never}: it has no lock file"
    assert (
        refusal(tmp_path / "no")
        == f"There is no run {tmp_path / 'no'}: give the folder of a run, such as runs/digits-1."
    )


def test_a_run_on_another_machine_is_stopped_there(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "far", "42 far.example\n")
    with held(folder):
        assert refusal(folder) == f"{folder} is in use by process 42 on far.example: run `zsplit stop` there"


def test_a_broker_that_has_not_said_its_name_yet_is_not_guessed(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "new", "")
    with held(folder):
        assert refusal(folder) == f"{folder} was taken by a process a moment ago: try again"


def test_a_run_of_another_user_is_stopped_by_that_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(pid: int, number: int) -> None:
        raise PermissionError

    folder = run_of(tmp_path / "theirs")
    monkeypatch.setattr(os, "kill", forbidden)
    with held(folder):
        assert refusal(folder) == (f"{folder} is in use by process 7 of another user: run `zsplit stop` as that user")


def test_a_broker_that_is_gone_without_a_word_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    folder = run_of(tmp_path / "gone")
    with held(folder) as lock:

        def die(pid: int, number: int) -> None:
            sent.append((pid, number))
            fcntl.flock(lock, fcntl.LOCK_UN)

        monkeypatch.setattr(os, "kill", die)
        assert refusal(folder) == (
            f"The broker of {folder} is gone and left no summary: `zsplit resume {folder}` goes on with it"
        )
    assert sent == [(7, signal.SIGTERM)]


def test_a_run_that_leaves_no_folder_has_never_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_of(tmp_path / "early")
    with held(folder) as lock:

        def leave(pid: int, number: int) -> None:
            (folder / "config.toml").unlink()
            fcntl.flock(lock, fcntl.LOCK_UN)

        monkeypatch.setattr(os, "kill", leave)
        assert stop_run(folder, True, lambda _: None) == "The run never began, and leaves nothing behind"


def test_which_run_is_meant_is_said_where_there_is_none_or_more_than_one(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with pytest.raises(ZsplitError) as none:
        under_way(runs)
    assert str(none.value) == f"No run is under way in {runs}/: give the folder of one, as `zsplit stop RUN`"
    one, other, _ = (run_of(runs / name) for name in ("digits-1", "digits-2", "digits-3"))
    with held(other):
        assert under_way(runs) == other
        with held(one), pytest.raises(ZsplitError) as both:
            under_way(runs)
    assert str(both.value) == f"{one} and {other} are under way: say which, as `zsplit stop {other}`"


# Real processes


def test_stop_ends_the_run_in_runs_and_says_how_it_ended(processes: Processes, here: Here) -> None:
    run = processes.start("run", "--no-monitor", *settings("broker.port=0", *QUICK, "run.rounds=100000"))
    run.line(" round 2/")
    code, out, err = here("stop")
    assert (code, err) == (0, "The run in runs/digits-1 ends after the round under way; --now ends it at once\n")
    assert run.wait() == 1
    summary = json.loads((processes.folder / "runs/digits-1/summary.json").read_text())
    assert out == f"{summary['sentence']}\n"
    assert "SIGTERM" in out
    assert run.err == [f"zsplit: {summary['sentence']}."]
    assert processes.gone(LEAVING)


def test_stop_now_ends_a_run_at_once(processes: Processes, here: Here) -> None:
    run = processes.start(
        "run", "--no-monitor", "--out", "out", *settings("broker.port=0", *QUICK, "run.rounds=100000")
    )
    run.line(" round 2/")
    code, out, err = here("stop", "out", "--now")
    assert (code, err) == (0, "")
    assert out.startswith("stopped by SIGINT. The last version, ")
    assert run.wait() == 1
    assert run.err == [f"zsplit: {out.strip()}."]


def test_a_broker_that_waits_for_peers_is_stopped_and_leaves_nothing(processes: Processes, here: Here) -> None:
    broker = processes.start("broker", *settings("broker.port=0"), "--out", "out")
    broker.line("The broker listens at ")
    until(lambda: (processes.folder / "out" / "lock").exists())
    assert here("stop", "out", "--now").code == 0
    assert broker.wait() == 1
    assert broker.err == ["stopped by SIGINT. Nothing was stored yet: start the run again"]
    assert not (processes.folder / "out").exists()


# Resume


def with_threads(server: int, client: int) -> Config:
    return load_config(None, {"server.threads": server, "client.threads": client})


def test_a_run_that_is_resumed_has_the_threads_that_it_had_and_those_that_are_asked_for(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run")
    (folder / "config.toml").write_text(to_toml(with_threads(7, 9)))
    assert deal_cores(with_threads(0, 0), str(folder)) == share_cores(with_threads(0, 0))  # nobody's journal is there
    (folder / "journal.log").touch()
    assert deal_cores(with_threads(0, 0), str(folder)) == with_threads(7, 9)
    assert deal_cores(with_threads(3, 0), str(folder)) == with_threads(3, 9)
    (folder / "config.toml").write_text("[server]\nthreads = 'many'\n")  # the broker has a sentence for that
    assert deal_cores(with_threads(0, 0), str(folder)) == share_cores(with_threads(0, 0))
    assert deal_cores(with_threads(0, 0), "") == share_cores(with_threads(0, 0))


def test_a_folder_without_a_run_cannot_be_resumed(here: Here, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    no_run = "There is no run gone: give the folder of a run, such as runs/digits-1.\n"
    no_config = "empty is no run's folder, it has no config.toml: give one such as runs/digits-1.\n"
    assert here("resume", "gone") == Ending(2, "", f"zsplit: {no_run}")
    assert here("resume", "empty") == Ending(2, "", f"zsplit: {no_config}")
    assert here("broker", "--resume", "gone") == Ending(2, "", f"zsplit: {no_run}")
    assert here("broker", "--resume", "empty") == Ending(2, "", f"zsplit: {no_config}")


@pytest.mark.parametrize("options", ["own.toml", "--set train.lr=1", "--plan plan.json", "--out out"])
def test_a_broker_that_resumes_takes_all_from_the_folder(options: str, here: Here) -> None:
    assert here("broker", *options.split(), "--resume", "out") == Ending(
        2, "", "zsplit: --resume takes all from the run's folder: leave CONFIG, --set, --plan, --out out.\n"
    )


def test_a_run_whose_data_a_script_had_is_resumed_by_that_script(here: Here, tmp_path: Path) -> None:
    (run_of(tmp_path / "own") / "config.toml").write_text('[data]\nname = "own"\n')
    assert here("resume", "own") == Ending(
        2,
        "",
        "zsplit: The data of own came from a script: start that script again, with the same folder in `run_here`.\n",
    )
