"""A finished run that is asked: the state machine, and a prediction across a cut by real processes."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Ending, Processes, free_port, settings
from helpers import config_of
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from test_after import write_digit

from zsplit.after.split import check_job
from zsplit.config import load_config
from zsplit.errors import ConfigError, RunFailedError
from zsplit.wire.messages import Finish, Lease, Orders, Plan, Predict, Prepared, Pull, Ref
from zsplit.wire.transfer import MANIFEST
from zsplit_broker.depot import Depot
from zsplit_broker.disk import Writer
from zsplit_broker.events import Entry, Event, Joined, Lost, Ready, Started, Stopped
from zsplit_broker.serve import load_served
from zsplit_broker.serving import Serving
from zsplit_broker.versions import Versions
from zsplit_broker.work import refs_of

Here = Callable[..., Ending]


def joined(role: str, index: int) -> Joined:
    return Joined(role, index, Prepared(cut="pool"))  # type: ignore[arg-type]


class ServingMachine(RuleBasedStateMachine):
    """Peers come and go in any order: `check` holds after every event."""

    def __init__(self) -> None:
        super().__init__()
        self.serving = Serving(config_of(), "d" * 32)
        self.tell(Started(1))

    def tell(self, event: Event) -> None:
        self.serving.handle(Entry(0.0, event))
        self.serving.check()

    @rule(role=st.sampled_from(["client", "server"]), index=st.integers(0, 2))
    def join(self, role: str, index: int) -> None:
        self.tell(joined(role, index))

    @rule(role=st.sampled_from(["client", "server"]), index=st.integers(0, 2))
    def leave(self, role: str, index: int) -> None:
        self.tell(Lost(role, index, "it left"))  # type: ignore[arg-type]

    @rule(number=st.integers(1, 6))
    def ready(self, number: int) -> None:
        self.tell(Ready(Lease(1, number)))

    @invariant()
    def nobody_holds_what_is_not_ready(self) -> None:
        for index in range(3):
            held = self.serving.jobs(("client", index))
            assert all(self.serving.work[job.lease].ready for job in held)


TestServing = ServingMachine.TestCase


def test_a_client_gets_a_job_when_there_is_a_server_and_another_when_that_one_leaves() -> None:
    serving = Serving(config_of(), "d" * 32)
    for event in (Started(1), joined("client", 0)):
        assert serving.handle(Entry(0.0, event)) == []
    serving.handle(Entry(0.0, joined("server", 0)))
    (job,) = serving.jobs(("server", 0))
    assert isinstance(job, Predict)
    assert (job.client, job.plan.cut, refs_of(job)) == (0, "pool", [Ref(digest="d" * 32, holder="broker")])
    serving.handle(Entry(0.0, joined("server", 1)))
    serving.handle(Entry(0.0, Lost("server", 0, "it left")))
    (other,) = serving.jobs(("server", 1))
    assert other.lease > job.lease


def test_serving_ends_well_when_it_is_stopped() -> None:
    serving = Serving(config_of(), "d" * 32)
    serving.handle(Entry(0.0, Stopped("stopped by SIGINT")))
    assert serving.outcome is not None
    assert (serving.outcome.ok, serving.outcome.sentence) == (True, "Serving has ended: stopped by SIGINT")


def test_a_version_is_read_by_manifest_and_bytes_and_not_beyond_its_end(digits_run: Path) -> None:
    _, file = load_served(digits_run, ())
    versions = Versions(Path(shutil.copytree(file.parent, digits_run.parent / "versions")))

    def pull(offset: int, length: int) -> bytes:
        return depot.read(Pull("r", "s", Lease(1, 1), "broker", file.stem, offset, length, "weights"))

    writer = Writer(lambda: None)
    depot = Depot("r", versions, writer, lambda pull: False)

    manifest = versions.manifest(file.stem)
    assert pull(MANIFEST, 0) == manifest.encode()
    assert pull(8, 16) == versions.read(file.stem, 8, 16)
    assert pull(manifest.nbytes - 1, 16) == b""
    writer.close()


def test_what_holds_no_finished_run_is_not_served(digits_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no finished run: give the folder of one, such as runs/digits-1\.$"):
        load_served(tmp_path, ())
    shutil.copytree(digits_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "versions")
    with pytest.raises(ConfigError, match=r"is gone, and with it the version that .*/run ended with: put it back"):
        load_served(tmp_path / "run", ())


# Real processes


@pytest.fixture(scope="module")
def served(digits_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A broker that serves the run, and a server: the broker's address."""
    with Processes(tmp_path_factory.mktemp("served")) as processes:
        port = free_port()
        before = listing(digits_run)
        broker = processes.start("broker", "--serve", str(digits_run), *settings(f"broker.port={port}"))
        broker.line("The broker listens at ")
        server = processes.start("server", "--broker", f"127.0.0.1:{port}", "--device", "cpu")
        server.line("joined the run")
        yield f"127.0.0.1:{port}", digits_run
        broker.signal(signal.SIGINT)
        assert (broker.wait(), server.wait()) == (0, 0)
        assert broker.err[-1] == server.err[-1] == "Serving has ended: stopped by SIGINT"
        assert listing(digits_run) == before


def listing(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def ask(here: Here, served: tuple[str, Path], *options: str) -> Ending:
    address, run = served
    return here("predict", str(run), *options, "--split", "--broker", address, "--device", "cpu")


def test_a_prediction_across_the_cut_is_that_of_the_uncut_model(
    served: tuple[str, Path], here: Here, tmp_path: Path
) -> None:
    images = [f"{index}.png" for index in range(12)]
    for index, name in enumerate(images):
        write_digit(tmp_path / name, index)
    split = ask(here, served, *images, "--json")
    whole = here("predict", str(served[1]), *images, "--device", "cpu", "--json")
    assert (split.code, whole.code) == (0, 0)
    for one, other in zip(json.loads(split.out), json.loads(whole.out), strict=True):
        assert [guess["index"] for guess in one["classes"]] == [guess["index"] for guess in other["classes"]]
        assert [guess["probability"] for guess in one["classes"]] == pytest.approx(
            [guess["probability"] for guess in other["classes"]], abs=1e-6
        )


def test_what_has_its_tail_at_the_client_is_asked_there(
    digits_run: Path, here: Here, processes: Processes, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(digits_run, tmp_path / "run"))
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace('labels = "share"', 'labels = "keep"'))
    write_digit(tmp_path / "it.png", 0)
    address = f"127.0.0.1:{free_port()}"
    broker = processes.start("broker", "--serve", "run", *settings(f"broker.port={address.rpartition(':')[2]}"))
    broker.line("The broker listens at ")
    server = processes.start("server", "--broker", address, "--device", "cpu")
    whole = here("predict", "run", "it.png", "--device", "cpu", "--json")
    code, out, err = ask(here, (address, run), "it.png", "--json")
    assert code == 0, err
    split = [guess["probability"] for guess in json.loads(out)[0]["classes"]]
    assert split == pytest.approx([each["probability"] for each in json.loads(whole.out)[0]["classes"]], abs=1e-6)
    broker.signal(signal.SIGINT)
    assert (broker.wait(), server.wait()) == (0, 0)


def test_it_can_be_asked_again_and_again(served: tuple[str, Path], here: Here, tmp_path: Path) -> None:
    write_digit(tmp_path / "it.png", 0)
    first, second = (ask(here, served, "it.png").out for _ in range(2))
    assert first == second != ""


def test_another_version_than_the_run_s_is_not_asked(served: tuple[str, Path], here: Here, tmp_path: Path) -> None:
    write_digit(tmp_path / "it.png", 0)
    shutil.copytree(served[1], tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    newest = load_served(served[1], ())[1]
    (other,) = (path for path in (tmp_path / "run" / "versions").iterdir() if path.name != newest.name)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary | {"stored": [other.stem]}))
    code, _, err = ask(here, (served[0], Path("run")), "it.png")
    assert code == 2
    assert f"the run's is {other.stem[:12]}: name the folder of the run that it serves." in err


def test_a_client_that_would_train_is_sent_away(served: tuple[str, Path], here: Here) -> None:
    code, _, err = here("client", "--broker", served[0])
    assert code == 2
    assert err.splitlines()[-1] == (
        f"zsplit: The broker at {served[0]} serves a finished run, it trains none: ask it with "
        "`zsplit predict --split`."
    )


def test_without_a_server_nothing_is_waited_for_for_ever(
    digits_run: Path, here: Here, processes: Processes, tmp_path: Path
) -> None:
    write_digit(tmp_path / "it.png", 0)
    with broker_of(processes, "--serve", str(digits_run)) as address:
        code, _, err = ask(here, (address, digits_run), "it.png", "--connect-seconds", "0.5")
    assert (code, err) == (
        1,
        f"zsplit: No server joined the broker at {address} within 0.5 s: start one with `zsplit server`.\n",
    )


def test_a_broker_that_trains_is_not_asked(digits_run: Path, here: Here, processes: Processes, tmp_path: Path) -> None:
    write_digit(tmp_path / "it.png", 0)
    with broker_of(processes) as address:
        code, _, err = ask(here, (address, digits_run), "it.png")
    assert (code, err) == (
        2,
        f"zsplit: The broker at {address} trains: `zsplit broker --serve RUN` starts one that can be asked.\n",
    )


@contextmanager
def broker_of(processes: Processes, *arguments: str) -> Iterator[str]:
    """Run a broker meanwhile; give its address."""
    broker = processes.start("broker", *arguments, *settings("broker.port=0"), "--json")
    yield str(json.loads(broker.line('"address"'))["address"])
    broker.signal(signal.SIGINT)
    broker.wait()


def test_a_server_that_leaves_and_a_broker_that_ends_are_said_in_a_sentence() -> None:
    plan, base = Plan(cut="pool"), Ref(digest="d" * 32, holder="broker")
    job = Predict(lease=Lease(1, 1), client=0, server=0, base=base, plan=plan)
    check_job(Orders(revision=1, jobs=(job,)), job)
    with pytest.raises(RunFailedError, match=r"^The server left before it had answered everything: ask again\.$"):
        check_job(Orders(revision=2), job)
    with pytest.raises(RunFailedError, match=r"^Serving has ended: stopped by SIGINT\.$"):
        check_job(Orders(revision=3, finish=Finish(ok=True, sentence="Serving has ended: stopped by SIGINT")), job)


def test_serving_takes_no_config_of_its_own(here: Here, tmp_path: Path) -> None:
    code, _, err = here("broker", "x.toml", "--serve", "run")
    assert (code, err) == (
        2,
        "zsplit: --serve takes all from the run's folder: leave CONFIG, --plan, --out, --resume out.\n",
    )


def test_keys_can_be_set_for_serving(digits_run: Path) -> None:
    config, file = load_served(digits_run, ("broker.port=7000", "run.timeline=true"))
    assert (config.broker.port, config.run.timeline) == (7000, False)
    assert file.stem == json.loads((digits_run / "summary.json").read_text())["stored"][-1]
    assert config.train == load_config(digits_run / "config.toml").train
