"""The run's folder, and figures that add up to what the leases did."""

import json
import math
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from helpers import Play, anything, config_of, configs, sizes_for, unhurried
from hypothesis import given
from hypothesis import strategies as st

from zsplit.config import load_config
from zsplit.errors import ConfigError, StorageError
from zsplit.wire.messages import Evaluate, Prepared, Tally, Turn, bucket_of
from zsplit_broker.events import Grant, Stopped
from zsplit_broker.journal import Journal
from zsplit_broker.record import append_metrics, choose_folder, create_folder, remove_folder, summarise, write_summary
from zsplit_broker.tally import NOTHING, add, mean, quantile
from zsplit_broker.versions import Versions

FOLDER = Path("runs") / "digits-1"

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
    assert summary["idle"]["client"] == 0.5
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
    for name in ("loss_sum", "seconds", "idle"):
        assert getattr(total, name) == sum(getattr(tally, name) for tally in tallies)
    buckets: Counter[int] = Counter()
    for tally in tallies:
        buckets.update(tally.step_seconds)
    assert total.step_seconds == dict(buckets)
    kinds = {kind for tally in tallies for kind in tally.traffic}
    for way in (0, 1):
        found = {kind: both[way] for kind, both in total.traffic.items()}
        assert found == {kind: sum(t.traffic.get(kind, (0, 0))[way] for t in tallies) for kind in kinds}


def test_nothing_adds_nothing() -> None:
    tally = Tally(steps=1, samples=2, loss_sum=0.5, step_seconds={3: 1}, traffic={"labels": (1, 0)})
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
