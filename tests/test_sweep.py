"""Sweeps: which runs they are, what they come to, and that a real one can be stopped and gone on with."""

import csv
import json
import shlex
import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path
from statistics import mean, stdev

import msgspec
import pytest
from conftest import QUICK, Ending, settings
from helpers import unhurried
from hypothesis import given
from hypothesis import strategies as st

from zsplit.config import Config
from zsplit.errors import ConfigError
from zsplit.results.figures import Figures
from zsplit.results.sweep import Axis, Point, Spread, axis, points, rows_of, spread

Here = Callable[..., Ending]

FIGURES = Figures(
    run="x", name="x", state="finished", rounds=1, steps=1, test_accuracy=0.5, test_top5=1.0, test_loss=1.0,
    val_accuracy=None, val_loss=None, seconds=2.0, step_seconds=None, bytes_up=10, bytes_down=20,
    bytes_raw_up=None, bytes_raw_down=None, idle_client=0.5,
    idle_server=None,
)  # fmt: skip


DEMO = Config()


# Which runs


def test_values_are_parted_by_commas_or_where_they_have_some_by_semicolons() -> None:
    assert axis("codec.up=raw,ms:ratio=0.99,bits=2,half") == Axis("codec.up", ("raw", "ms:ratio=0.99,bits=2", "half"))
    assert axis("codec.up=topk:ratio=0.9, scope=sample") == Axis("codec.up", ("topk:ratio=0.9, scope=sample",))
    assert axis("data.partition=iid,dirichlet:alpha=0.5,shards:k=2").values == (
        "iid",
        "dirichlet:alpha=0.5",
        "shards:k=2",
    )
    assert axis("train.lr=0.1, 0.2") == Axis("train.lr", ("0.1", "0.2"))
    assert axis("codec.up=raw;ms:ratio=0.99,bits=2+lz4") == Axis("codec.up", ("raw", "ms:ratio=0.99,bits=2+lz4"))
    assert axis("model.input=[3,32,32];") == Axis("model.input", ("[3,32,32]",))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train.lr", "`train.lr` gives no values to a key: write --over key=a,b,c, such as train.lr=0.01,0.1."),
        ("train.lr=,", "`train.lr=,` gives no values to a key: write --over key=a,b,c, such as train.lr=0.01,0.1."),
        ("run.seed=1,2", "`run.seed` is no key to sweep over: --seeds says how many seeds each combination gets."),
        ("train.lr=1,1", "`train.lr=1,1` names a value twice: name each once."),
    ],
)
def test_an_axis_that_is_none_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        axis(text)
    assert str(error.value) == sentence


def test_a_sweep_is_every_combination_with_every_seed() -> None:
    axes = [axis("train.lr=0.1,0.2"), axis("schedule.policy=parallel,round_robin")]
    grid = points(None, ["run.rounds=3", "run.seed=5"], axes, 2)
    assert [(p.config.train.lr, p.config.schedule.policy, p.seed) for p in grid] == [
        (lr, policy, seed) for lr in (0.1, 0.2) for policy in ("parallel", "round_robin") for seed in (5, 6)
    ]
    assert {p.config.run.rounds for p in grid} == {3}
    assert grid[0].title == "train.lr=0.1, schedule.policy=parallel, seed 5"
    assert grid[0].folder == "train.lr=0.1__schedule.policy=parallel__seed=5"


def test_a_sweep_over_nothing_is_the_seeds() -> None:
    grid = points(None, [], [], 3)
    assert [(p.folder, p.seed) for p in grid] == [("seed=0", 0), ("seed=1", 1), ("seed=2", 2)]


def test_a_key_that_is_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^--over names train\.lr twice: give it all values at once\.$"):
        points(None, [], [axis("train.lr=1"), axis("train.lr=2")], 1)


def test_a_value_that_cannot_be_is_refused_before_anything_runs(here: Here, tmp_path: Path) -> None:
    code, out, err = here("sweep", "--over", "train.lr=0.1,fast", "--out", "sweep")
    assert (code, out) == (2, "")
    assert "train.lr" in err
    assert list(tmp_path.iterdir()) == []


values = st.dictionaries(st.sampled_from(["a.b", "c.d"]), st.text(min_size=1), max_size=2)


@unhurried
@given(st.lists(values, min_size=2, max_size=2, unique_by=lambda each: json.dumps(each, sort_keys=True)))
def test_folders_have_names_that_any_disk_takes_and_no_two_the_same(pair: list[dict[str, str]]) -> None:
    one, other = (Point(dict(sorted(each.items())), DEMO).folder for each in pair)
    assert one != other
    for name in (one, other):
        assert "/" not in name
        assert name.isprintable()
        assert 0 < len(name.encode()) < 500


ROOT = Path(__file__).parents[1]

PAGES = {path.name: path for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]}


def sweeps_on(page: Path) -> list[list[str]]:
    """Return the arguments of each `zsplit sweep` command on a page."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = (line.strip() for line in text.splitlines())
    return [shlex.split(line)[2:] for line in lines if line.startswith("zsplit sweep ")]


def test_the_sweeps_on_the_pages_are_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    commands = [command for page in PAGES.values() for command in sweeps_on(page)]
    assert len(commands) >= 3
    for command in commands:
        config = Path(command[0]) if not command[0].startswith("--") else None
        given = {
            name: [command[i + 1] for i, word in enumerate(command) if word == name] for name in ("--set", "--over")
        }
        axes = [axis(text) for text in given["--over"]]
        assert len(points(config, given["--set"], axes, 1)) == prod(len(one.values) for one in axes)


# What they come to


def test_the_spread_is_mean_and_sample_deviation_of_what_is_known() -> None:
    assert spread([1.0, None, 2.0, 6.0]) == Spread(mean([1, 2, 6]), stdev([1, 2, 6]))
    assert spread([3.0]) == Spread(3.0, None)
    assert spread([None]) is spread([]) is None


def test_rows_are_combinations_over_their_seeds() -> None:
    grid = points(None, [], [axis("train.lr=0.1,0.2")], 3)
    accuracies = [0.5, 0.7, None, 0.1, 0.2, 0.3]
    found = [None if a is None else msgspec.structs.replace(FIGURES, test_accuracy=a) for a in accuracies]
    first, second = rows_of(list(zip(grid, found, strict=True)))
    assert (first.values, first.runs, first.failed) == ({"train.lr": "0.1"}, 3, 1)
    assert first.test_accuracy == Spread(mean([0.5, 0.7]), stdev([0.5, 0.7]))
    assert (second.runs, second.failed, second.bytes_up) == (3, 0, Spread(10.0, 0.0))


# Real ones

LITTLE = settings("broker.port=0", *QUICK, "run.rounds=1")


def test_a_sweep_runs_what_is_missing_and_survives_what_fails(here: Here, tmp_path: Path) -> None:
    sweep = ("sweep", *LITTLE, "--over", "train.lr=0.05,1e30", "--out", "out")
    code, out, err = here(*sweep)
    good, bad = err.splitlines()[0], err.splitlines()[1]
    assert code == 1
    assert good.startswith("[1/2] train.lr=0.05, seed 0: test accuracy ")
    assert bad.startswith("[2/2] train.lr=1e30, seed 0: ")
    assert "The loss became" in bad
    assert err.splitlines()[-1] == ("zsplit: 1 of 2 runs failed, the first with train.lr=1e30, seed 0: start it again.")
    rows = [line.split() for line in out.splitlines() if line.strip()]
    assert rows[0][:4] == ["train.lr", "runs", "test", "loss"]
    assert rows[2][:2] == ["0.05", "1"]
    assert rows[3][:4] == ["1e30", "1", "(1", "failed)"]
    with (tmp_path / "out/results.csv").open() as file:
        (line,) = csv.DictReader(file)
    assert (line["run"], line["train.lr"], line["seed"]) == ("out/train.lr=0.05__seed=0", "0.05", "0")

    code, out, err = here(*sweep, "--json")  # again: the good one is kept, the bad one is tried again
    assert err.splitlines()[0] == f"{good} (was there already)"
    assert code == 1
    assert [row["failed"] for row in json.loads(out)] == [0, 1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "results.csv",
        "train.lr=0.05__seed=0",
        "train.lr=1e30__seed=0",
        "train.lr=1e30__seed=0.unfinished-1",
    ]


def test_a_folder_with_runs_of_another_config_is_refused(here: Here, digits_run: Path, tmp_path: Path) -> None:
    shutil.copytree(digits_run, tmp_path / "out" / "seed=0")
    assert here("sweep", *settings(*QUICK), "--set", "train.lr=0.9", "--out", "out") == (
        2,
        "",
        "zsplit: out/seed=0 holds a run with another train.lr: choose another --out.\n",
    )


def test_a_finished_run_is_not_run_again(here: Here, digits_run: Path, tmp_path: Path) -> None:
    shutil.copytree(digits_run, tmp_path / "out" / "seed=0")
    before = (tmp_path / "out/seed=0/summary.json").stat().st_mtime_ns
    code, out, err = here("sweep", *settings(*QUICK), "--out", "out", "--json")
    assert (code, err.count("was there already")) == (0, 1)
    assert (tmp_path / "out/seed=0/summary.json").stat().st_mtime_ns == before
    assert (
        json.loads(out)[0]["test_accuracy"]["mean"]
        == json.loads((digits_run / "summary.json").read_text())["test_accuracy"]
    )
