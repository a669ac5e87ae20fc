"""A process is killed at each of the places where it may be, started again, and nothing is lost and nothing is twice.

The places are those of `zsplit.crash`; a case fails where its place was not reached.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import Processes
from lineage import Step, lineage_of

from zsplit import crash
from zsplit.config import load_config
from zsplit.errors import ConfigError
from zsplit.launch import run_here

SMALL = {
    "broker.port": 0,
    "schedule.clients": 2,
    "run.rounds": 3,
    "data.train_size": 192,
    "data.test_size": 64,
    "train.batch_size": 32,
    "train.micro_batches": 2,
    "server.threads": 1,
    "client.threads": 1,
    "link.beat_seconds": 0.5,
}
"""Three rounds of a few steps, in two micro-batches each."""

MODES: dict[str, dict[str, object]] = {
    "round_robin": {"schedule.policy": "round_robin", "run.commit_every": 1},
    "replica": {"schedule.policy": "parallel", "schedule.aggregate_every": 2},
    "shared": {"schedule.server_model": "shared"},
    "shared, turn": {"schedule.server_model": "shared", "schedule.shared_order": "turn"},
    "fused": {"schedule.server_model": "fused"},
}

LATER = {
    "client.send": 5,
    "client.frames": 9,
    "client.answer": 6,
    "client.step": 4,
    "client.done": 2,
    "client.load": 3,
    "server.frames": 9,
    "server.apply": 6,
    "server.reply": 7,
    "server.step": 4,
    "server.done": 2,
    "server.ready": 3,
    "server.merge": 2,
    "server.merged": 2,
    "broker.journal": 30,
    "broker.journaled": 31,
    "broker.relay": 60,
    "broker.storing": 3,
    "broker.stored": 2,
    "broker.replay": 5,
}
"""At which time that it is passed a place kills: in the middle of the run where it can be."""


class Ending(NamedTuple):
    """What a run came to."""

    versions: list[str]
    steps: int
    samples: int
    accuracy: float


def run(mode: str, out: Path) -> Ending:
    """Run to the end on this machine, starting again who is killed; return what it came to."""
    result = run_here(load_config(None, SMALL | MODES[mode]), str(out))
    assert result.ok, result.sentence
    summary = result.summary
    return Ending(summary["versions"], summary["steps"], summary["samples"], summary["test_accuracy"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Ending, Counter[Step]]]:
    """What a run of a mode comes to when nothing happens to it, and the steps in it."""
    known: dict[str, tuple[Ending, Counter[Step]]] = {}

    def of(mode: str) -> tuple[Ending, Counter[Step]]:
        if mode not in known:
            out = tmp_path_factory.mktemp("undisturbed") / "out"
            ending = run(mode, out)
            known[mode] = ending, lineage_of(out).steps
            assert set(known[mode][1].values()) == {1}
            assert len(known[mode][1]) == ending.steps == 18
        return known[mode]

    return of


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", [place for place in crash.POINTS if place != "broker.replay"])  # see test_resume.py
def test_who_is_killed_here_is_started_again_and_the_run_ends_bit_identical(
    place: str,
    mode: str,
    undisturbed: Callable[[str], tuple[Ending, Counter[Step]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ending, steps = undisturbed(mode)
    once = tmp_path / "once"
    monkeypatch.setenv("ZSPLIT_TEST_FAULTS", "1")
    monkeypatch.setenv("ZSPLIT_CRASH_AT", f"{place}:{LATER.get(place, 1)}")
    monkeypatch.setenv("ZSPLIT_CRASH_ONCE", str(once))
    assert run(mode, tmp_path / "out") == ending
    assert once.exists(), f"{place} was not passed {LATER.get(place, 1)} times"
    lineage = lineage_of(tmp_path / "out")
    assert lineage.steps == steps
    assert all(client == server for client, server in lineage.samples)


def test_a_place_is_for_tests_only(processes: Processes) -> None:
    command = processes.run("cuts", "digits/cnn", ZSPLIT_CRASH_AT="client.send")
    assert (command.process.returncode, command.out) == (2, [])
    assert command.err == ["zsplit: ZSPLIT_CRASH_AT is for tests only: take it out of the environment."]


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ("client.sleep", "ZSPLIT_CRASH_AT=client.sleep names no place: give one of client.start, "),
        ("client.send:0", "ZSPLIT_CRASH_AT=client.send:0 names no place"),
        ("client.send", "ZSPLIT_CRASH_AT needs ZSPLIT_CRASH_ONCE"),
    ],
)
def test_a_place_that_does_not_exist_is_refused(asked: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why.replace("(", r"\(")):
        crash.trap_of({"ZSPLIT_TEST_FAULTS": "1", "ZSPLIT_CRASH_AT": asked})
