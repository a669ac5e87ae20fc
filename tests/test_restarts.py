"""Who is killed under `zsplit run` is started again: when and how often, in numbers, and then in real processes."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import LEAVING, QUICK, Command, Ending, Processes, settings, until, writer_of
from hypothesis import given
from hypothesis import strategies as st

from zsplit.restarts import FIRST, LONGEST, SETTLED, Keeper, Restarts

Here = Callable[..., Ending]

ENDLESS = settings("broker.port=0", *QUICK, "run.rounds=100000")

# When, and how often


def test_the_pauses_double_up_to_the_longest() -> None:
    restarts = Restarts(9, 0.0)
    assert [restarts.again(0.0) for _ in range(10)] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0, None]


@pytest.mark.parametrize("lived", [SETTLED - 1, SETTLED])
def test_who_has_lived_long_begins_anew(lived: float) -> None:
    restarts = Restarts(2, 0.0)
    assert [restarts.again(1.0), restarts.again(2.0)] == [FIRST, 2 * FIRST]
    restarts.began(100.0)
    assert restarts.again(100.0 + lived) == (FIRST if lived >= SETTLED else None)


young = st.integers(0, int(SETTLED) * 1024 - 1).map(lambda ticks: ticks / 1024)
"""Seconds that a child lives which dies young; whatever times they are added to, the sum is exact."""


@given(st.integers(0, 10_000), st.lists(young, max_size=40))
def test_nobody_who_dies_young_is_started_more_often_than_allowed(allowed: int, lives: list[float]) -> None:
    restarts, now = Restarts(allowed, 0.0), 0.0
    for number, life in enumerate(lives):
        pause = restarts.again(now + life)
        assert (pause is None) == (number >= allowed)
        if pause is not None:
            assert FIRST <= pause <= LONGEST
            now += life + pause
            restarts.began(now)


class Puppet:
    """A child that dies when it is told to."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.killed = ""
        self.started = self.buried = 0

    def bury(self) -> None:
        self.buried += 1

    def start(self) -> None:
        self.started += 1
        self.killed = ""


def test_a_child_that_was_killed_is_started_when_it_is_due_and_the_others_are_let_be() -> None:
    said: list[str] = []
    one, other = Puppet("client 1"), Puppet("server 0")
    keeper = Keeper([one, other], 3, said.append, 0.0)
    assert (keeper.waits(one), keeper.until_due(0.0)) == (False, None)
    one.killed = "was killed by SIGKILL"
    for now, left, started in ((10.0, 0.5, 0), (10.25, 0.25, 0), (10.5, None, 1), (20.0, None, 1)):
        keeper.look(now)
        assert (keeper.until_due(now), one.started, keeper.waits(one)) == (left, started, left is not None)
    assert said == ["client 1 was killed by SIGKILL; it is started again in 0.5 s (1 of 3)"]
    assert (one.buried, other.started, other.buried) == (1, 0, 0)


def test_two_children_that_die_at_once_are_both_started() -> None:
    children = [Puppet("client 0"), Puppet("client 1")]
    keeper = Keeper(children, 1, lambda _: None, 0.0)
    for child in children:
        child.killed = "was killed by SIGKILL"
    keeper.look(1.0)
    assert keeper.until_due(1.25) == FIRST - 0.25
    assert keeper.until_due(9.0) == 0.0
    keeper.look(1.0 + FIRST)
    assert [child.started for child in children] == [1, 1]
    assert keeper.lost is None


@pytest.mark.parametrize(
    ("allowed", "after"),
    [(0, ""), (1, ", after it was started again once"), (2, ", after it was started again 2 times")],
)
def test_a_child_that_dies_too_often_is_lost_and_the_reason_is_kept(allowed: int, after: str) -> None:
    said: list[str] = []
    child, now = Puppet("client 1"), 0.0
    keeper = Keeper([child], allowed, said.append, now)
    for _ in range(allowed + 1):
        assert keeper.lost is None
        child.killed = "was killed by SIGKILL"
        keeper.look(now)
        now += keeper.until_due(now) or 0.0
        keeper.look(now)
    assert keeper.lost == (child, f"was killed by SIGKILL{after}")
    assert (child.started, len(said)) == (allowed, allowed)
    keeper.look(now + 1000)
    assert (child.started, child.buried) == (allowed, allowed + 1)


# Real processes: peers that die before the run begins

DEADLY = """
import os, signal
from multiprocessing import current_process

from torch import nn


def net(num_classes, shape):
    if current_process().name == "zsplit client 1" and not os.path.exists("spared"):
        {once}
        os.kill(os.getpid(), signal.{signal})
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
"""


def deadly(folder: Path, once: bool, number: str = "SIGKILL") -> list[str]:
    """Return the options of a run whose client 1 is killed as it builds its model: once, or every time."""
    module = f"deadly_{folder.name}"  # another name for each test: what was allowed once is found for ever
    text = DEADLY.format(once='open("spared", "x").close()' if once else "", signal=number)
    (folder / f"{module}.py").write_text(text)
    model = (f"model.name={module}:net", "model.input=[1,8,8]", "model.cut=0", "data.val_fraction=0.0")
    return [*settings("broker.port=0", *QUICK, "run.rounds=1", *model), "--allow", module, "--out", "out"]


@pytest.mark.parametrize("number", ["SIGKILL", "SIGSEGV"])
def test_a_peer_that_is_killed_while_it_prepares_is_started_again_and_the_run_is_finished(
    number: str, here: Here, tmp_path: Path
) -> None:
    code, out, err = here("run", "--no-monitor", *deadly(tmp_path, once=True, number=number))
    sentence = f"client 1 was killed by {number}; it is started again in 0.5 s (1 of 3)"
    assert (code, err) == (0, "")
    assert [line.partition("  ")[2] for line in out.splitlines() if " launcher " in line] == [f"warning: {sentence}"]
    assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d {re.escape(sentence)}\n", log_of(tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_peer_that_is_killed_again_and_again_ends_the_run(here: Here, tmp_path: Path) -> None:
    code, out, err = here("run", "--no-monitor", *deadly(tmp_path, once=False), "--restarts", "2")
    assert code == 1
    assert err == "zsplit: Client 1: it was killed by SIGKILL, after it was started again 2 times.\n"
    assert [line.partition("  ")[2] for line in out.splitlines() if " launcher " in line] == [
        f"warning: client 1 was killed by SIGKILL; it is started again in {pause} s ({number} of 2)"
        for number, pause in enumerate(("0.5", "1"), 1)
    ]


def test_with_no_restarts_the_first_death_ends_the_run(here: Here, tmp_path: Path) -> None:
    code, out, err = here("run", *deadly(tmp_path, once=True), "--restarts", "0")
    assert (code, err) == (1, "zsplit: Client 1: it was killed by SIGKILL.\n")
    assert " launcher " not in out
    assert not (tmp_path / "out").exists()


def test_a_peer_that_had_words_of_its_own_is_not_started_again(here: Here, tmp_path: Path) -> None:
    code, out, err = here("run", *settings("broker.port=0", *QUICK, "model.name=resnet19"), "--out", "out")
    assert code == 2
    assert "There is no model 'resnet19'" in err
    assert " launcher " not in out


def test_one_that_was_started_again_does_not_outlive_a_run_that_is_killed(processes: Processes) -> None:
    options = deadly(processes.folder, once=True)
    (module,) = processes.folder.glob("deadly_*.py")
    held = "    while current_process().name == 'zsplit client 0':\n        signal.pause()\n"
    module.write_text(module.read_text().replace("    return", f"{held}    return"))  # so that the run never begins
    run = processes.start("run", "--no-monitor", *options)
    run.line("client.1  joined")
    assert (processes.folder / "spared").exists()
    run.process.kill()
    assert processes.gone(LEAVING)


def log_of(folder: Path) -> str:
    return (folder / "logs" / "launcher.log").read_text()


def broker_of(processes: Processes) -> int:
    """Return the id of the broker's process."""
    (found,) = (each for each in processes.alive() if b"zsplit_broker" in Path(f"/proc/{each}/cmdline").read_bytes())
    return found


# SIGTERM


def test_sigterm_is_passed_on_to_the_broker_and_its_sentence_is_the_run_s(processes: Processes) -> None:
    run = processes.start("run", "--no-monitor", "--out", "out", *ENDLESS)
    run.line(" round 2/")
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 1
    assert processes.gone(LEAVING)
    summary = json.loads((processes.folder / "out" / "summary.json").read_text())
    assert run.err == [f"zsplit: {summary['sentence']}."]
    assert "SIGTERM" in run.err[0]
    assert not (processes.folder / "out" / "logs" / "launcher.log").exists()


# In the middle of a run

PEERS = ("client 1", "server 0", "the broker")

LONG = settings("broker.port=0", *QUICK, "run.rounds=12")
"""Long enough that somebody can be killed in the middle, and come back before the end."""


def victim(processes: Processes, who: str) -> int:
    if who == "the broker":
        return broker_of(processes)
    return writer_of(processes.folder / "out" / "logs" / f"{who.replace(' ', '-')}.log")


def kill_at(processes: Processes, run: Command, text: str, who: str) -> None:
    run.line(text)
    os.kill(victim(processes, who), signal.SIGKILL)


def weights_of(folder: Path) -> tuple[list[str], bytes]:
    """Return the digest of the version after each round, and the merged model."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["version"] for row in rows], (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], bytes]:
    """What the long run comes to."""
    with Processes(tmp_path_factory.mktemp("undisturbed")) as processes:
        run = processes.run("run", "--no-monitor", "--out", "out", *LONG)
        assert run.process.returncode == 0, run.said
        return weights_of(processes.folder / "out")


@pytest.mark.parametrize("who", PEERS)
def test_a_run_of_which_somebody_is_killed_ends_with_the_same_weights(
    who: str, processes: Processes, undisturbed: tuple[list[str], bytes]
) -> None:
    run = processes.start("run", "--no-monitor", "--out", "out", *LONG)
    kill_at(processes, run, " round 2/", who)
    assert run.wait() == 0, run.said
    assert run.err == []
    assert f"{who} was killed by SIGKILL; it is started again in 0.5 s (1 of 3)\n" in log_of(processes.folder / "out")
    assert weights_of(processes.folder / "out") == undisturbed


def test_a_run_of_which_everybody_is_killed_in_turn_ends_with_the_same_weights(
    processes: Processes, undisturbed: tuple[list[str], bytes]
) -> None:
    run = processes.start("run", "--no-monitor", "--out", "out", *LONG)
    for number, who in enumerate(PEERS):
        kill_at(processes, run, f" round {3 * number + 1}/", who)
    assert run.wait() == 0, run.said
    assert weights_of(processes.folder / "out") == undisturbed


def test_a_broker_that_is_killed_too_often_ends_the_run_and_says_how_to_resume(processes: Processes) -> None:
    run = processes.start("run", "--no-monitor", "--out", "out", *ENDLESS, "--restarts", "1")
    kill_at(processes, run, " round 2/", "the broker")
    run.line("(1 of 1)")
    dead = {line for line in run.out if " round " in line}
    until(lambda: any(" round " in line and line not in dead for line in run.out))
    os.kill(broker_of(processes), signal.SIGKILL)
    assert run.wait() == 1
    assert run.err == [
        "zsplit: the broker was killed by SIGKILL, after it was started again once; "
        "what it stored is kept, and `zsplit resume out` goes on with it."
    ]


@pytest.mark.parametrize("how", [("resume", "out"), ("run", "--out", "out", *LONG)])
def test_a_run_that_was_killed_as_a_whole_goes_on_where_it_was(
    how: tuple[str, ...], processes: Processes, undisturbed: tuple[list[str], bytes]
) -> None:
    first = processes.start("run", "--no-monitor", "--out", "out", *LONG)
    first.line(" round 2/")
    first.process.kill()
    assert processes.gone(LEAVING)
    run = processes.run(how[0], "--no-monitor", *how[1:])
    assert run.process.returncode == 0, run.said
    assert weights_of(processes.folder / "out") == undisturbed


def test_a_drained_run_ends_with_a_whole_round_and_goes_on(
    processes: Processes, undisturbed: tuple[list[str], bytes]
) -> None:
    run = processes.start("run", "--no-monitor", "--out", "out", *LONG)
    run.line(" round 2/")
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 1
    assert "`zsplit resume out`" in run.err[-1]
    again = processes.run("resume", "out", "--no-monitor")
    assert again.process.returncode == 0, again.said
    assert weights_of(processes.folder / "out") == undisturbed


def test_a_client_that_is_killed_while_the_run_drains_is_started_again(processes: Processes) -> None:
    run = processes.start("run", "--no-monitor", "--out", "out", *LONG)
    run.line(" round 1/")
    os.kill(victim(processes, "client 1"), signal.SIGKILL)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 1
    summary = json.loads((processes.folder / "out" / "summary.json").read_text())
    assert summary["stored"] == summary["versions"][-2:]


def test_a_broker_alone_is_resumed_and_peers_elsewhere_find_it(processes: Processes) -> None:
    folder = processes.folder
    command = ("broker", *settings(*QUICK, "run.rounds=12"), "--set", "broker.port=0", "--out", "out")
    first = processes.start(*command)
    address = first.line("The broker listens at ").split()[4].rstrip(";")
    joiners = [
        processes.start(*words.split(), "--broker", address) for words in ("server", "client -i 0", "client -i 1")
    ]
    until(lambda: (folder / "out" / "metrics.jsonl").exists())
    os.kill(first.process.pid, signal.SIGKILL)
    first.wait()
    second = processes.start("broker", "--resume", "out")
    assert second.line("The broker listens at ").split()[4].rstrip(";") == address
    assert [each.wait() for each in (second, *joiners)] == [0, 0, 0, 0]
    assert subprocess.run(["test", "-s", folder / "out" / "model.safetensors"]).returncode == 0
