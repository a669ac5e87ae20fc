"""How a broker is looked after by `zsplit run`, with a program in its place that does what a test says."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from conftest import until

from zsplit.errors import ZsplitError
from zsplit.restarts import FIRST
from zsplit.supervise import Broker, Household

STAND_IN = """
import json, os, signal, sys
from pathlib import Path

folder = Path(sys.argv[2])
with (folder / "asked").open("a") as asked:
    asked.write(json.dumps([os.getpid(), *sys.argv[1:]]) + "\\n")


def end(number, _):
    sentence = f"ended by {signal.Signals(number).name}"
    (folder / "summary.json").write_text(json.dumps({"ok": False, "sentence": sentence}))
    sys.exit(sentence)


for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, end)
if (folder / "refuse").exists():
    print("zsplit-broker: the journal is damaged", file=sys.stderr)
    sys.exit(2)
if (folder / "wait").exists():
    (folder / "waits").touch()
    (folder / "wait").open().read()  # a pipe that the test opens
port = (folder / "port").read_text()
print(json.dumps({"address": f"127.0.0.1:{port}", "events": "tcp://127.0.0.1:2", "out": str(folder)}), flush=True)
sys.stdin.read()
"""


class Watched:
    """A broker that is looked after, by a clock that stands still; `said` is what the person is told."""

    def __init__(self, folder: Path, restarts: int = 3) -> None:
        self.folder = folder
        self.now = 0.0
        self.said: list[str] = []
        self.broker = Broker(["--out", str(folder)])
        self.broker.start()
        self.broker.listen()
        self.household = Household(self.broker, [], restarts, self.said.append, lambda: self.now)

    def asked(self) -> list[list[str]]:
        """Return what each broker was started with."""
        return [json.loads(line)[1:] for line in (self.folder / "asked").read_text().splitlines()]

    def kill(self) -> None:
        """Kill the newest broker, and wait until that is noticed."""
        os.kill(json.loads((self.folder / "asked").read_text().splitlines()[-1])[0], signal.SIGKILL)
        self.household.pause()

    def revive(self) -> None:
        """Let it be started again, whatever comes of that."""
        assert self.household.still_on()
        self.now += FIRST
        assert self.household.still_on()
        assert self.broker.sentinel is not None


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Watched]]:
    """Start a broker that is a stand-in: `python -m` finds what lies in the current folder first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zsplit_broker.py").write_text(STAND_IN)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "port").write_text("1")
    made: list[Watched] = []

    def start(restarts: int = 3) -> Watched:
        made.append(Watched(tmp_path / "out", restarts))
        return made[-1]

    yield start
    for each in made:
        each.broker.close()


def test_a_broker_that_was_killed_goes_on_in_its_folder_and_the_run_is_on_meanwhile(
    watched: Callable[..., Watched],
) -> None:
    run = watched()
    assert run.household.still_on()
    for _ in range(2):
        run.kill()
        assert run.household.still_on()
        assert run.broker.sentinel is None
        run.now += 0.4
        assert run.household.still_on()
        assert run.broker.sentinel is None  # not due yet
        run.now += 10
        assert run.household.still_on()
        run.household.pause()  # until it says where it listens
        assert run.household.still_on()
    options = ["--json", "--attached"]
    out = str(run.folder)
    assert run.asked() == [["--out", out, *options], *[["--resume", out, *options]] * 2]
    assert run.said == [
        f"the broker was killed by SIGKILL; it is started again in {pause} s ({number} of 3)"
        for number, pause in enumerate(("0.5", "1"), 1)
    ]
    run.household.stop()
    assert run.household.words() == "ended by SIGINT"
    assert run.broker.concluded


def test_one_that_is_killed_too_often_is_given_up(watched: Callable[..., Watched]) -> None:
    run = watched(restarts=0)
    run.kill()
    assert not run.household.still_on()
    assert run.household.failure() is None
    assert run.household.words() == "the broker was killed by SIGKILL"
    assert (run.said, len(run.asked())) == ([], 1)


def test_one_that_listens_elsewhere_now_ends_the_run(watched: Callable[..., Watched]) -> None:
    run = watched()
    (run.folder / "port").write_text("3")
    run.kill()
    run.revive()
    run.household.pause()
    assert not run.household.still_on()
    assert str(run.household.failure()) == (
        "The broker was started again at 127.0.0.1:3, not at 127.0.0.1:1, where the others look for it"
    )


def test_one_that_has_words_when_it_is_started_again_ends_the_run_with_them(watched: Callable[..., Watched]) -> None:
    run = watched()
    (run.folder / "refuse").touch()
    run.kill()
    run.revive()
    run.household.pause()
    assert not run.household.still_on()
    assert run.household.failure() is None
    assert run.household.words() == "the journal is damaged"


def test_one_that_is_killed_after_it_wrote_how_the_run_ended_is_not_missed(watched: Callable[..., Watched]) -> None:
    run = watched()
    (run.folder / "summary.json").write_text('{"ok": true}')
    assert run.broker.concluded
    run.kill()
    assert not run.household.still_on()
    assert run.said == []


def test_a_summary_from_before_it_began_says_nothing(watched: Callable[..., Watched], tmp_path: Path) -> None:
    (tmp_path / "out" / "summary.json").write_text('{"ok": false}')
    run = watched()
    assert not run.broker.concluded
    run.kill()
    assert run.household.still_on()


def test_a_drained_one_ends_with_its_own_sentence(watched: Callable[..., Watched]) -> None:
    run = watched()
    run.household.drain()
    run.household.pause()
    assert not run.household.still_on()
    assert run.household.words() == "ended by SIGTERM"


def test_a_drained_run_whose_broker_is_dead_or_dies_is_over(watched: Callable[..., Watched]) -> None:
    dead = watched()
    dead.kill()
    assert dead.household.still_on()
    dead.household.drain()
    dead.now += 10
    assert not dead.household.still_on()
    assert len(dead.asked()) == 1


def test_one_that_is_being_started_is_drained_as_soon_as_it_listens(watched: Callable[..., Watched]) -> None:
    run = watched()
    os.mkfifo(run.folder / "wait")
    run.kill()
    run.revive()
    until((run.folder / "waits").exists)
    run.household.drain()
    assert run.household.still_on()
    (run.folder / "wait").write_text("")
    run.household.pause()
    assert run.household.still_on()  # it listens, and is told
    run.household.pause()
    assert not run.household.still_on()
    assert run.household.words() == "ended by SIGTERM"


def test_one_that_is_being_started_is_stopped_at_once(watched: Callable[..., Watched]) -> None:
    run = watched()
    os.mkfifo(run.folder / "wait")
    run.kill()
    run.revive()
    until((run.folder / "waits").exists)
    run.household.stop()
    assert run.broker.ended
    assert not run.broker.concluded


@pytest.mark.parametrize(
    ("text", "sentence", "code"),
    [
        ("import sys\nprint('zsplit-broker: no room', file=sys.stderr)\nsys.exit(2)", "no room", 2),
        ("import os\nos.kill(os.getpid(), 9)", "the broker was killed by SIGKILL", 1),
        ("", "The broker did not start.", 1),
    ],
)
def test_one_that_never_listens_is_refused_with_its_words_or_its_death(
    text: str, sentence: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zsplit_broker.py").write_text(text)
    with closing(Broker([])) as broker:
        broker.start()
        with pytest.raises(ZsplitError) as caught:
            broker.listen()
    assert (str(caught.value), caught.value.exit_code) == (sentence, code)
