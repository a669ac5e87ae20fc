"""The run's folder, and figures that add up to what the leases did."""

import errno
import json
import math
import os
from collections import Counter
from pathlib import Path
from random import Random

import msgspec
import pytest
from helpers import Play, anything, config_of, configs, sizes_for, unhurried
from hypothesis import given
from hypothesis import strategies as st

from zsplit.config import load_config
from zsplit.errors import ConfigError, StorageError
from zsplit.plan import Situation
from zsplit.wire.messages import Evaluate, Flow, Merge, Plan, Prepared, Tally, Turn, bucket_of
from zsplit_broker import record
from zsplit_broker.disk import DiskFullError
from zsplit_broker.events import Close, Grant, Open, Planned, Stopped
from zsplit_broker.journal import Journal
from zsplit_broker.record import (
    append_metrics,
    choose_folder,
    create_folder,
    read_plans,
    remove_folder,
    trim_metrics,
    write_plans,
    write_situation,
    write_summary,
)
from zsplit_broker.scheduler import Scheduler
from zsplit_broker.summary import summarise
from zsplit_broker.tally import NOTHING, add, mean, quantile
from zsplit_broker.versions import Versions

FOLDER = Path("runs") / "digits-1"

PLANNED = Planned(0, {0: Plan(cut="relu"), 1: Plan(cut="pool", micro_batches=4, window=2)}, {0: 0.1, 1: 0.2}, "why")

# Where it lies


def test_the_first_free_number_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_of(run__name="trial")
    assert choose_folder(config) == Path("runs/trial-1")
    Path("runs/trial-1").mkdir(parents=True)
    Path("runs/trial-2").write_text("a file is in the way, too")
    Path("runs/trial-4").mkdir()
    assert choose_folder(config) == Path("runs/trial-3")


def test_choosing_a_folder_makes_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    choose_folder(config_of())
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_overrides_the_config_and_the_home_folder_is_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = config_of(run__out="~/mine")
    assert choose_folder(config) == tmp_path / "mine"
    assert choose_folder(config, str(tmp_path / "other")) == tmp_path / "other"


def test_an_empty_folder_that_was_asked_for_is_taken(tmp_path: Path) -> None:
    assert choose_folder(config_of(), str(tmp_path)) == tmp_path


@pytest.mark.parametrize("content", ["in a folder", "a file"])
def test_what_exists_is_never_overwritten(tmp_path: Path, content: str) -> None:
    out = tmp_path / "out"
    if content == "in a folder":
        out.mkdir()
        (out / "thesis.txt").write_text("dear")
    else:
        out.write_text("dear")
    with pytest.raises(ConfigError) as error:
        choose_folder(config_of(), str(out))
    assert str(error.value) == f"{out} exists already and is not overwritten: choose another --out"
    assert error.value.exit_code == 2


def test_the_folder_holds_the_config_as_resolved(tmp_path: Path) -> None:
    config = config_of(run__seed=7, train__optimizer="adam")
    create_folder(tmp_path / "a" / "b", config)
    assert load_config(tmp_path / "a" / "b" / "config.toml") == config


def test_a_folder_that_cannot_be_made_is_said_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError) as error:
        create_folder(tmp_path / "file" / "run", config_of())
    assert str(error.value) == f"cannot write to {tmp_path / 'file' / 'run'}: Not a directory; choose another --out"


def test_metrics_are_a_line_each(tmp_path: Path) -> None:
    append_metrics(tmp_path, b'{"round":1}')
    append_metrics(tmp_path, b'{"round":2}')
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"round":1}\n{"round":2}\n'


def test_a_summary_replaces_the_one_before_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_summary(tmp_path, {"rounds": 1})
    write_summary(tmp_path, {"rounds": 2})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"rounds": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_plans_are_read_back_as_they_were_written_by_a_run_with_as_many_clients(tmp_path: Path) -> None:
    later = Planned(3, PLANNED.plans)
    write_plans(tmp_path, [PLANNED])
    write_plans(tmp_path, [PLANNED, later])
    file = str(tmp_path / "plan.json")
    assert read_plans(config_of(plan__file=file, schedule__clients=2)) == [PLANNED, later]
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    with pytest.raises(ConfigError, match="has none for client 2 in round 0"):
        read_plans(config_of(plan__file=file, schedule__clients=3))


def test_a_config_without_a_plans_file_has_no_plans() -> None:
    assert read_plans(config_of(model__cut="auto")) == []


def test_a_plan_that_is_not_there_or_is_none_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory"):
        read_plans(config_of(plan__file=str(tmp_path / "plan.json")))
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ConfigError, match="is no plan of this version"):
        read_plans(config_of(plan__file=str(tmp_path / "plan.json")))


@pytest.mark.parametrize("wrong", ['"window": 0', '"window": -1', '"micro_batches": 0'])
def test_a_plan_under_which_no_micro_batch_could_leave_is_refused(tmp_path: Path, wrong: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text('[{"round": 0, "plans": {"0": {"cut": "relu", ' + wrong + "}}}]")
    with pytest.raises(ConfigError, match=r"is no plan of this version \(Expected `int` >= 1 "):
        read_plans(config_of(plan__file=str(file), schedule__clients=1))


def test_what_a_plan_was_made_from_is_kept_whole(tmp_path: Path) -> None:
    play = Play(config_of(model__cut="auto", schedule__clients=2)).begin()
    while play.scheduler.plans.situation is None:
        play.go_on(events=1)
    write_situation(tmp_path, play.scheduler.plans.situation)
    text = (tmp_path / "profile.json").read_bytes()
    assert msgspec.json.decode(text, type=Situation) == play.scheduler.plans.situation


def test_a_folder_that_has_gone_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="what was stored is intact"):
        write_summary(tmp_path / "gone", {})
    with pytest.raises(StorageError, match="what was stored is intact"):
        append_metrics(tmp_path / "gone", b"{}")


@pytest.mark.parametrize("theirs", [[], ["thesis.txt"], ["versions/mine"]])
def test_a_folder_that_was_made_in_vain_goes_again_but_nothing_of_anybody_elses(
    tmp_path: Path, theirs: list[str]
) -> None:
    folder = tmp_path / "run"
    create_folder(folder, config_of())
    Journal.open(folder, {"run": "r1"}).close()
    Versions(folder / "versions").close()
    write_summary(folder, {})
    write_situation(folder, Situation("parallel", (), ()))
    write_plans(folder, [PLANNED])
    for name in theirs:
        (folder / name).write_text("dear")
    remove_folder(folder)
    assert [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()] == theirs
    assert folder.exists() == bool(theirs)
    remove_folder(folder)


# The summary


@st.composite
def finished(draw: st.DrawFn) -> Play:
    """Return a run that went well."""
    config = draw(configs())
    play = Play(config, draw(sizes_for(config)), draw(st.integers(1, 2)))
    random: Random = draw(st.randoms(use_true_random=False))
    return play.begin().go_on(random.choice)


@unhurried
@given(finished())
def test_the_summary_adds_up_to_what_was_granted(play: Play) -> None:
    summary = summarise(play.scheduler, "r1", FOLDER)
    turns = [said.job for said in play.said if isinstance(said, Grant) and isinstance(said.job, Turn)]
    evaluations = [said.job for said in play.said if isinstance(said, Grant) and isinstance(said.job, Evaluate)]
    assert summary["rounds"] == play.config.run.rounds
    assert summary["steps"] == sum(turn.count for turn in turns)
    assert summary["samples"] == sum(play.samples(turn) for turn in turns)
    assert summary["train_loss"] == 0.5
    steps = sum(turn.count for turn in turns) + len(evaluations)
    assert summary["bytes"] == {
        "up": 100 * steps,
        "down": 10 * steps,
        "kinds": {"gradients": {"up": 0, "down": 10 * steps}, "smashed": {"up": 100 * steps, "down": 0}},
    }
    assert summary["step_seconds"] == {"median": 1.0, "p95": 1.0}
    assert summary["bubble"]["client"] == 0.5
    json.dumps(summary, allow_nan=False)


@unhurried
@given(finished())
def test_accuracies_are_means_over_samples_not_over_clients(play: Play) -> None:
    summary = summarise(play.scheduler, "r1", FOLDER)
    tested = [shard.test for shard in play.shards]
    assert summary["test_accuracy"] == (sum(n // 2 for n in tested) / sum(tested) if any(tested) else None)
    assert summary["test_top5"] == (1.0 if any(tested) else None)
    assert summary["test_loss"] == (0.5 if any(tested) else None)
    validated = [shard.validation for shard in play.shards]
    every = play.config.run.eval_every
    due = any(validated) and 0 < every <= play.config.run.rounds
    assert summary["val_accuracy"] == (sum(n // 2 for n in validated) / sum(validated) if due else None)
    assert summary["val_top5"] == (1.0 if due else None)


def test_the_summary_has_what_it_promises() -> None:
    play = Play(config_of(run__rounds=2, run__name="trial", schedule__clients=2)).begin().go_on()
    summary = summarise(play.scheduler, "r1", FOLDER)
    promised = (
        "policy clients rounds steps samples train_loss val_accuracy test_accuracy seconds step_seconds bytes idle "
        "model versions"
    )
    assert set(promised.split()) <= summary.keys()
    assert (summary["name"], summary["run"], summary["ok"]) == ("trial", "r1", True)
    assert (summary["policy"], summary["model"], summary["clients"]) == ("parallel", "digits/cnn", 2)
    assert summary["model_file"] == str(FOLDER / "model.safetensors")
    assert summary["versions"] == [record.version for record in play.scheduler.history]
    assert summary["versions"][-1] == summary["stored"][-1]
    assert summary["seconds"] == len(play.log) - 1 - len(play.peers)  # a second each, from when all are there
    assert 0 <= summary["idle"]["server"] <= 1


def test_the_summary_has_each_clients_plan_and_the_median_of_their_predictions() -> None:
    config = config_of(model__cut="auto", plan__file="plan.json", schedule__clients=2, run__rounds=1)
    play = Play(config)
    play.tell(PLANNED)
    play.begin().go_on()
    summary = summarise(play.scheduler, "r1", FOLDER)
    assert summary["plan"] == {
        "0": {"cut": "relu", "micro_batches": 1, "window": 1, "up": "raw", "down": "raw", "tail": ""},
        "1": {"cut": "pool", "micro_batches": 4, "window": 2, "up": "raw", "down": "raw", "tail": ""},
    }
    assert summary["predicted_step_seconds"] == pytest.approx(0.15)
    assert summary["cut"] == "relu, pool"


def test_without_a_measurement_nothing_is_predicted_and_the_plan_is_the_configured_one() -> None:
    play = Play(config_of(schedule__clients=2, run__rounds=1, train__micro_batches=2)).begin().go_on()
    summary = summarise(play.scheduler, "r1", FOLDER)
    assert summary["predicted_step_seconds"] is None
    assert [plan["micro_batches"] for plan in summary["plan"].values()] == [2, 2]


@unhurried
@given(finished())
def test_idle_is_what_of_the_training_was_not_computed_and_a_bubble_what_of_the_turns(play: Play) -> None:
    config, summary = play.config, summarise(play.scheduler, "r1", FOLDER)
    wall = sum(record.training for record in play.scheduler.history)
    opened = [said.job for said in play.said if isinstance(said, Open) and isinstance(said.job, Turn | Merge)]
    turns = [job for job in opened if isinstance(job, Turn)]
    clients, servers = range(config.schedule.clients), [index for role, index in play.peers if role == "server"]
    assert summary["idle"]["clients"] == {
        str(c): pytest.approx(1 - 0.25 * sum(turn.client == c for turn in turns) / wall) for c in clients
    }
    assert summary["idle"]["servers"] == {
        str(k): pytest.approx(1 - 0.25 * sum(job.server == k for job in opened) / wall) for k in servers
    }
    for role in ("client", "server"):
        each = summary["idle"][role + "s"].values()
        assert summary["idle"][role] == pytest.approx(sum(each) / len(each))
    assert set(summary["bubble"]["clients"].values()) <= {0.5, None}
    open_ = open_seconds(play)
    assert summary["bubble"]["servers"] == {
        str(k): pytest.approx(1 - 0.25 * sum(turn.server == k for turn in turns) / open_[k]) if open_[k] else None
        for k in servers
    }


def open_seconds(play: Play) -> Counter[int]:
    """Return the seconds in which at least one turn was open at each server, from what the scheduler said."""
    again = Scheduler(play.config)
    open_: Counter[int] = Counter()
    seconds: Counter[int] = Counter()
    now = 0.0
    for entry in play.log:
        seconds.update({server: entry.at - now for server, turns in open_.items() if turns})
        now = entry.at
        for said in again.handle(entry):
            if isinstance(said, Open | Close) and isinstance(said.job, Turn):
                open_[said.job.server] += 1 if isinstance(said, Open) else -1
    return seconds


def test_losses_and_accuracies_in_the_summary_are_those_of_the_latest_round_that_has_any() -> None:
    play = Play(config_of(run__rounds=3, schedule__clients=1)).begin().go_on()
    for round_, top1 in enumerate([1, 3, 0]):
        validation = Tally(samples=4, top1=top1, loss_sum=2.0) if top1 else NOTHING
        train = Tally(samples=10, steps=1, loss_sum=10.0 - round_)
        play.scheduler.history[round_] = play.scheduler.history[round_]._replace(validation=validation, train=train)
    summary = summarise(play.scheduler, "r1", FOLDER)
    assert (summary["val_accuracy"], summary["val_loss"], summary["train_loss"]) == (0.75, 0.5, 0.8)


def test_a_run_that_failed_has_a_summary_of_the_rounds_that_are_done() -> None:
    play = Play(config_of(run__rounds=3, schedule__clients=1)).begin()
    while len(play.scheduler.history) < 1:
        play.go_on(events=1)
    play.tell(Stopped("Stopped by Ctrl-C"))
    summary = summarise(play.scheduler, "r1", FOLDER)
    assert (summary["ok"], summary["rounds"], summary["model_file"]) == (False, 1, "")
    assert str(summary["sentence"]).startswith("Stopped by Ctrl-C. The last version, ")
    assert summary["test_accuracy"] is None


def test_a_run_that_never_began_has_a_summary_too() -> None:
    play = Play(config_of())
    play.tell(Stopped("Stopped by Ctrl-C"))
    summary = summarise(play.scheduler, "r1", FOLDER)
    assert (summary["rounds"], summary["steps"], summary["versions"]) == (0, 0, [])
    assert summary["train_loss"] is summary["step_seconds"]["median"] is summary["idle"]["client"] is None
    json.dumps(summary, allow_nan=False)


# Adding up


@unhurried
@given(st.lists(anything(Tally), max_size=4))
def test_tallies_add_up_field_by_field(tallies: list[Tally]) -> None:
    total = add(tallies)
    for name in ("steps", "samples", "top1", "top5"):
        assert getattr(total, name) == sum(getattr(tally, name) for tally in tallies)
    for name in ("loss_sum", "seconds", "idle", "busy"):
        assert getattr(total, name) == sum(getattr(tally, name) for tally in tallies)
    assert total.flow == tuple(sum(parts) for parts in zip(*(tally.flow for tally in [NOTHING, *tallies]), strict=True))
    buckets: Counter[int] = Counter()
    for tally in tallies:
        buckets.update(tally.step_seconds)
    assert total.step_seconds == dict(buckets)
    for name in ("traffic", "traffic_raw"):
        counts = [getattr(tally, name) for tally in tallies]
        kinds = {kind for count in counts for kind in count}
        for way in (0, 1):
            found = {kind: both[way] for kind, both in getattr(total, name).items()}
            assert found == {kind: sum(count.get(kind, (0, 0))[way] for count in counts) for kind in kinds}


def test_nothing_adds_nothing() -> None:
    came = Flow(100, 0.5, 2)
    tally = Tally(steps=1, samples=2, loss_sum=0.5, flow=came, step_seconds={3: 1}, traffic={"labels": (1, 0)})
    assert add([]) == NOTHING
    assert add([NOTHING, tally, NOTHING]) == tally


def test_the_mean_of_nothing_is_nothing() -> None:
    assert mean(0.0, 0) is None
    assert mean(3.0, 2) == 1.5


@unhurried
@given(st.lists(st.floats(1e-6, 1e4), min_size=1, max_size=50), st.floats(0.01, 1))
def test_a_quantile_is_right_to_half_a_bucket(durations: list[float], q: float) -> None:
    exact = sorted(durations)[math.ceil(q * len(durations)) - 1]
    found = quantile(Counter(map(bucket_of, durations)), q)
    assert found == pytest.approx(exact, rel=0.005)


def test_the_quantile_of_nothing_is_nothing() -> None:
    assert quantile({}, 0.5) is None


def test_clients_without_validation_or_test_data_are_counted_out() -> None:
    shards = [Prepared(train=4, validation=0, test=3), Prepared(train=4, validation=2, test=0)]
    play = Play(config_of(schedule__clients=2, run__rounds=1), shards).begin().go_on()
    summary = summarise(play.scheduler, "r1", FOLDER)
    assert (summary["val_accuracy"], summary["test_accuracy"]) == (0.5, 1 / 3)


def test_what_raw_would_have_been_stands_beside_what_was_sent() -> None:
    play = Play(config_of(schedule__clients=2, run__rounds=1, codec__up="half", codec__down="half")).begin().go_on()
    summary = summarise(play.scheduler, "r1", FOLDER)
    sent, raw = summary["bytes"], summary["bytes_raw"]
    assert isinstance(sent, dict)
    assert isinstance(raw, dict)
    assert raw["kinds"].keys() == sent["kinds"].keys()
    assert raw["up"] == 4 * sent["up"] > 0
    assert raw["kinds"]["gradients"] == {"up": 0, "down": 4 * sent["kinds"]["gradients"]["down"]}


@pytest.mark.parametrize(("through", "names"), [(True, ("codec", "raw")), (False, ("raw", "codec"))])
def test_a_lossy_run_has_both_test_results_and_the_one_that_the_config_names(
    through: bool, names: tuple[str, str]
) -> None:
    play = Play(config_of(schedule__clients=2, run__rounds=1, codec__up="half", codec__eval=through)).begin()
    play.go_on(lambda due: due[0])
    tests = play.scheduler.books.tests
    tests["half"] = msgspec.structs.replace(tests["half"], top1=1)
    summary = summarise(play.scheduler, "r1", FOLDER)
    assert (summary["test_accuracy_codec"], summary["test_accuracy_raw"]) == (0.1, 0.4)
    assert summary["test_accuracy"] == summary[f"test_accuracy_{names[0]}"] != summary[f"test_accuracy_{names[1]}"]


def test_a_lossless_run_has_one_test_result_under_all_names() -> None:
    for up, through in (("raw", True), ("lz4", True), ("lz4", False)):
        play = Play(config_of(schedule__clients=2, run__rounds=1, codec__up=up, codec__eval=through)).begin().go_on()
        summary = summarise(play.scheduler, "r1", FOLDER)
        assert summary["test_accuracy"] == summary["test_accuracy_raw"] == summary["test_accuracy_codec"] == 0.4


# Figures of the rounds


def rows(folder: Path) -> list[int]:
    return [json.loads(line)["round"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("tail", "rounds", "kept"),
    [
        (b"", 3, 3),
        (b"", 2, 2),
        (b'{"round": 4, "lo', 4, 3),
        (b'{"round": 3}\n', 9, 3),
        (b"nonsense\n", 3, 3),
        (b"", 0, 0),
    ],
)
def test_figures_of_rounds_that_are_done_again_and_torn_lines_are_cut(
    tail: bytes, rounds: int, kept: int, tmp_path: Path
) -> None:
    for number in (1, 2, 3):
        append_metrics(tmp_path, b'{"round": %d}' % number)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    assert trim_metrics(tmp_path, rounds) == kept
    assert rows(tmp_path) == list(range(1, kept + 1))
    append_metrics(tmp_path, b'{"round": %d}' % (kept + 1))
    assert rows(tmp_path) == list(range(1, kept + 2))


def test_without_figures_there_is_nothing_to_cut(tmp_path: Path) -> None:
    assert trim_metrics(tmp_path, 3) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_line_of_figures_that_does_not_fit_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append_metrics(tmp_path, b'{"round": 1}')

    def half(descriptor: int, data: bytes, offset: int) -> None:
        os.pwrite(descriptor, data[:5], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(record, "write_all", half)
        with pytest.raises(DiskFullError):
            append_metrics(tmp_path, b'{"round": 2}')
    assert rows(tmp_path) == [1]
