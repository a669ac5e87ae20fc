"""A run's folder read back, runs side by side, and the lines of results.csv."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest
from conftest import Ending
from helpers import Play, config_of, unhurried
from hypothesis import given
from hypothesis import strategies as st

from zsplit.config import to_toml
from zsplit.errors import ConfigError, StorageError
from zsplit.results import RunFolder, open_run
from zsplit.results.compare import Comparison, compare, value_of, varying
from zsplit.results.figures import Course, Figures, course_of, figures_of, reached
from zsplit.results.gather import ALWAYS, gather
from zsplit.results.picture import COLOURS, PANELS, WIDTH, picture
from zsplit.results.tables import volume
from zsplit.wire.events import RoundEvent, encode_event
from zsplit_broker.bulletin import Bulletin
from zsplit_broker.router import Router
from zsplit_broker.summary import summarise

Here = Callable[..., Ending]

SVG = "{http://www.w3.org/2000/svg}"

EVENTS = [
    RoundEvent(round=1, samples=10, steps=2, train_loss=2.0, val_loss=1.9, val_accuracy=0.4, seconds=2.0, bytes_up=100),
    RoundEvent(round=2, samples=10, steps=2, train_loss=1.5, seconds=1.0, bytes_up=100, bytes_down=50),
    RoundEvent(round=3, samples=10, steps=2, train_loss=1.0, val_loss=0.9, val_accuracy=0.8, seconds=1.0, bytes_up=9),
]


def kept(folder: Path, summary: dict[str, Any] | None = None, **keys: object) -> RunFolder:
    """Leave what a run leaves: three rounds, a summary unless there is none, and a config with these keys."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(to_toml(config_of(**keys)))
    (folder / "metrics.jsonl").write_bytes(b"".join(encode_event(event) + b"\n" for event in EVENTS))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return open_run(folder)


# The folder


def test_a_run_s_folder_gives_back_what_the_run_wrote(digits_run: Path) -> None:
    run = open_run(digits_run)
    assert (run.config().run.name, run.config().schedule.clients, run.finished()) == ("demo", 2, True)
    assert [event.round for event in run.rounds()] == [1, 2]
    assert run.rounds()[-1].val_accuracy == run.summary()["val_accuracy"]
    assert run.weights() == digits_run / "model.safetensors"


def test_rounds_that_were_written_twice_count_once_and_a_torn_one_not_at_all(tmp_path: Path) -> None:
    run = kept(tmp_path / "run")
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(encode_event(EVENTS[0]) + b"\n" + encode_event(EVENTS[1])[:40])
    assert run.rounds() == EVENTS


def test_a_run_that_has_just_begun_has_no_rounds_and_no_summary(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("")
    run = open_run(tmp_path)
    assert (run.rounds(), run.summary(), run.finished()) == ([], {}, False)
    assert figures_of(run).state == "unfinished"


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("summary.json", "{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("summary.json", "[]", "it is no table"),
        ("metrics.jsonl", "{}\n", "line 1 is not an event: Object missing required field `topic`"),
        ("metrics.jsonl", "\udcff", "it is not text in UTF-8"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, text: str, why: str) -> None:
    run = kept(tmp_path / "run")
    (run.path / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(StorageError) as error:
        figures_of(run)
    assert str(error.value) == f"{run.path / name} is damaged ({why}): put it back from a copy, or run again."


# Figures


def test_a_course_adds_up_what_the_rounds_took() -> None:
    assert course_of(EVENTS) == [
        Course(1, 2.0, 100, 0, 0.4),
        Course(2, 3.0, 200, 50, None),
        Course(3, 4.0, 209, 50, 0.8),
    ]
    assert course_of([]) == []


def test_a_target_is_reached_at_the_end_of_the_first_round_that_has_it() -> None:
    course = course_of(EVENTS)
    assert reached(course, 0.4) == course[0]
    assert reached(course, 0.41) == reached(course, 0.8) == course[2]
    assert reached(course, 0.81) is None


def test_the_bytes_of_the_rounds_and_of_the_test_are_those_of_the_summary() -> None:
    play = Play(config_of(run__rounds=3, schedule__clients=2)).begin().go_on()
    bulletin = Bulletin(play.scheduler, Router(play.config, play.scheduler, "r1", (1, 2)), "r1", "out")
    course = course_of([bulletin.round_event(record) for record in play.scheduler.history])
    total: Any = summarise(play.scheduler, "r1", Path("out"))["bytes"]
    tested = play.scheduler.test.traffic.values()
    assert course[-1].bytes_up + sum(up for up, _ in tested) == total["up"]
    assert course[-1].bytes_down + sum(down for _, down in tested) == total["down"]
    assert 0 < course[0].bytes_up < course[1].bytes_up < course[2].bytes_up < total["up"]


def test_a_real_run_s_rounds_add_up_to_less_than_the_run_and_not_much_less(digits_run: Path) -> None:
    run = open_run(digits_run)
    last, figures = course_of(run.rounds())[-1], figures_of(run)
    assert 0.5 * figures.bytes_up < last.bytes_up < figures.bytes_up
    assert 0.5 * figures.bytes_down < last.bytes_down < figures.bytes_down
    assert 0 < last.seconds <= figures.seconds
    assert (figures.state, figures.rounds, figures.steps) == ("finished", 2, run.summary()["steps"])


def test_a_run_without_a_summary_is_as_far_as_its_rounds_tell(tmp_path: Path) -> None:
    figures = figures_of(kept(tmp_path / "run"))
    assert (figures.state, figures.rounds, figures.steps, figures.seconds) == ("unfinished", 3, 6, 4.0)
    assert (figures.val_accuracy, figures.val_loss, figures.bytes_up, figures.bytes_down) == (0.8, 0.9, 209, 50)
    assert figures.test_accuracy is figures.step_seconds is figures.idle_client is None


# zsplit compare


def words(line: str) -> list[str]:
    return line.split()


def rows_of(out: str) -> list[list[str]]:
    return [words(line) for line in out.splitlines() if line.strip()]


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with two runs that differ in one key, one of them stopped before its end."""
    summary = {
        "ok": True, "test_accuracy": 0.9, "test_loss": 0.5, "seconds": 5.0, "step_seconds": {"median": 0.01},
        "bytes_raw": {"up": 20_000_000, "down": 2_000_000},
        "bytes": {"up": 1_000_000, "down": 2_000_000}, "idle": {"client": 0.25, "server": 0.5},
    }  # fmt: skip
    kept(tmp_path / "a", summary, run__name="a", broker__port=0)
    kept(tmp_path / "b", {"ok": False}, run__name="b", train__lr=0.1)
    return tmp_path


def test_compare_shows_figures_and_differences(two: Path, here: Here) -> None:
    code, out, err = here("compare", "a", "b")
    assert (code, err) == (0, "")
    rows = rows_of(out)
    assert rows[1][:6] == ["run", "test", "loss", "val", "rounds", "time"]
    assert rows[3] == words("1 a 90.00 % 0.5000 80.00 % 3 5.0 s 10 ms 1.0 of 20.0 MB 2.0 MB 25 % 50 %")
    assert rows[4] == words("2 b (failed) – – 80.00 % 3 4.0 s – 209 B 50 B – –")
    assert rows[-3] == ["differs", "1", "2"]
    assert rows[-1] == ["train.lr", "0.05", "0.1"]


def test_bytes_that_codecs_spared_are_shown() -> None:
    assert volume(1_500_000, 20_000_000) == "1.5 of 20.0 MB"
    assert volume(999, 20_000_000) == "999 B of 20.0 MB"
    assert volume(999, 999) == volume(999, None) == "999 B"


def test_compare_shows_how_each_run_trained(two: Path, here: Here) -> None:
    kept(two / "c", codec__up="ms:ratio=0.99,bits=2", codec__down="mask", train__labels="server")
    rows = rows_of(here("compare", "a", "c").out)
    titles = rows.index(words("trained policy server model labels codec up codec down codec weights"))
    assert rows[titles + 2] == words("1 a parallel replica share raw raw raw")
    assert rows[titles + 3] == words("2 c parallel replica server ms:ratio=0.99,bits=2 mask raw")
    answer = json.loads(here("compare", "c", "--json").out)["runs"][0]
    assert (answer["how"]["labels"], answer["how"]["codec_up"]) == ("server", "ms:ratio=0.99,bits=2")


def test_compare_shows_what_the_target_took(two: Path, here: Here) -> None:
    _, out, _ = here("compare", "a", "b", "--target-accuracy", "0.5")
    rows = rows_of(out)
    assert rows[-4] == words("to val 50.0 % rounds time up down")
    assert rows[-2] == words("1 a 3 4.0 s 209 B 50 B")
    _, out, _ = here("compare", "a", "b", "--target-accuracy", "0.95")
    assert words(out)[-7:] == words("2 b not reached – – –")


def test_compare_answers_in_json(two: Path, here: Here) -> None:
    code, out, err = here("compare", "a", "b", "--target-accuracy", "0.5", "--json")
    answer = json.loads(out)
    assert (code, err, answer["target_accuracy"]) == (0, "", 0.5)
    first, second = answer["runs"]
    assert (first["keys"], second["keys"]) == ({"train.lr": "0.05"}, {"train.lr": "0.1"})
    assert first["target"] == {"round": 3, "seconds": 4.0, "bytes_up": 209, "bytes_down": 50, "accuracy": 0.8}
    assert first["figures"]["idle_server"] == 0.5
    assert len(first["course"]) == 3


def test_one_run_can_be_looked_at_alone(two: Path, here: Here) -> None:
    code, out, _ = here("compare", "a")
    assert (code, "differs" in out) == (0, False)


def test_runs_that_differ_in_names_and_ports_only_do_not_differ() -> None:
    configs = [config_of(run__name="a", broker__port=0), config_of(run__name="b", run__out="x")]
    assert varying(configs) == varying(configs[:1]) == []


def test_keys_that_differ_are_in_the_order_of_the_config() -> None:
    configs = [config_of(), config_of(codec__up="raw", schedule__clients=2), config_of(train__lr=0.2)]
    assert varying(configs) == ["train.lr", "schedule.clients"]
    assert [value_of(config, "schedule.clients") for config in configs] == ["4", "2", "4"]
    assert (value_of(configs[0], "train.client_lr"), value_of(configs[0], "model.input")) == ("", "[]")


def test_a_run_that_is_named_twice_is_refused(two: Path, here: Here) -> None:
    assert here("compare", "a", "./a") == (2, "", "zsplit: a is named twice: name each run once.\n")


# results.csv


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_compare_gathers_a_line_for_each_run(two: Path, here: Here) -> None:
    code, out, _ = here("compare", "a", "b", "--csv", "all/results.csv")
    assert (code, out.splitlines()[-1]) == (0, "The table is all/results.csv")
    first, second = lines(two / "all/results.csv")
    assert (first["run"], first["model"], first["seed"], first["train.lr"]) == ("a", "digits/cnn", "0", "0.05")
    assert (first["test_accuracy"], first["idle_client"], first["bytes_up"]) == ("0.9", "0.25", "1000000")
    assert (first["bytes_raw_up"], first["codec_up"], first["server_model"]) == ("20000000", "raw", "replica")
    assert (second["state"], second["test_accuracy"]) == ("failed", "")


def test_a_run_that_is_gathered_again_takes_the_place_of_its_line(two: Path, here: Here) -> None:
    here("compare", "a", "--csv", "results.csv")
    (two / "a" / "summary.json").write_text('{"ok": true, "test_accuracy": 0.95}')
    here("compare", "b", "a", "--csv", "results.csv")
    first, second = lines(two / "results.csv")
    assert (first["run"], first["test_accuracy"], first["train.lr"]) == ("a", "0.95", "0.05")
    assert second["run"] == "b"


texts = st.text('abc,"\n ü;', max_size=4)
table_lines = st.lists(st.dictionaries(st.sampled_from("xyz"), texts), max_size=4)


@unhurried
@given(table_lines, table_lines)
def test_what_is_gathered_is_there_whatever_was_gathered_before(
    tmp_path_factory: pytest.TempPathFactory, before: list[dict[str, str]], after: list[dict[str, str]]
) -> None:
    path = tmp_path_factory.mktemp("table") / "results.csv"
    old = [{"run": f"old {number}", **line} for number, line in enumerate(before)]
    new = [{"run": f"new {number}", **line} for number, line in enumerate(after)]
    for batch in (old, new, old):
        gather(path, batch)
    for expected, found in zip(old + new, lines(path), strict=True):
        assert {name: text for name, text in found.items() if text} == {n: t for n, t in expected.items() if t}


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "run\n1,2\n"])
def test_a_file_that_is_something_else_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"is no table of results: name a new file, or one that zsplit wrote\.$"):
        gather(path, [{"run": "a"}])
    assert path.read_text() == text


def test_a_table_that_cannot_be_written_is_said_in_a_sentence(two: Path, here: Here) -> None:
    code, _, err = here("compare", "a", "--csv", "a/config.toml/results.csv")
    assert (code, err) == (
        1,
        "zsplit: a/config.toml/results.csv cannot be read (Not a directory): name another file.\n",
    )


def test_the_page_lists_every_column() -> None:
    page = (Path(__file__).parents[1] / "docs" / "compare.md").read_text(encoding="utf-8")
    _, _, *rows = (line.split("|")[1] for line in page.splitlines() if line.startswith("|"))
    listed = [name.strip() for row in rows for name in row.split(",") if not row.strip().startswith("a key")]
    columns = [*ALWAYS, *(field.name for field in msgspec.structs.fields(Figures))]
    assert sorted(listed) == sorted(columns)


# The picture


def drawn(comparison: Comparison) -> ElementTree.Element:
    return ElementTree.fromstring(picture(comparison))


def test_the_picture_has_a_point_for_every_evaluation_in_every_panel(two: Path, here: Here) -> None:
    code, out, _ = here("compare", "a", "b", "--svg", "it.svg", "--target-accuracy", "0.5")
    assert (code, out.splitlines()[-1]) == (0, "The picture is it.svg")
    root = ElementTree.parse(two / "it.svg").getroot()
    circles = list(root.iter(f"{SVG}circle"))
    assert len(circles) == 2 * 2 * len(PANELS)  # two runs, two of three rounds were evaluated
    assert {circle.get("fill") for circle in circles} == set(COLOURS[:2])
    tips = [circle.findtext(f"{SVG}title") for circle in circles]
    assert tips[1] == "a, round 3: 80.00 % after 4.0 s, 0.00 MB up, 0.00 MB down"
    texts = {text.text for text in root.iter(f"{SVG}text")}
    assert {panel.title for panel in PANELS} <= texts
    assert "a (train.lr=0.05)" in texts
    assert sum(line.get("class") == "target" for line in root.iter(f"{SVG}line")) == len(PANELS)


def test_a_later_round_is_further_right_and_a_better_one_higher(two: Path) -> None:
    circles = list(drawn(compare([open_run(two / "a")])).iter(f"{SVG}circle"))
    for first, second in zip(circles[::2], circles[1::2], strict=True):
        assert float(first.get("cx", "")) < float(second.get("cx", ""))
        assert float(first.get("cy", "")) > float(second.get("cy", ""))


accuracies = st.none() | st.floats(0, 1)


@unhurried
@given(st.lists(st.lists(st.tuples(accuracies, st.floats(0, 1e6), st.integers(0, 2**60)), max_size=4), max_size=3))
def test_a_picture_of_anything_stays_within_its_edges(
    tmp_path_factory: pytest.TempPathFactory, runs: list[list[tuple[float | None, float, int]]]
) -> None:
    folders = [kept(tmp_path_factory.mktemp("runs") / str(number)) for number in range(len(runs))]
    for folder, rounds in zip(folders, runs, strict=True):
        events = [
            RoundEvent(round=n, samples=1, steps=1, train_loss=1.0, val_accuracy=a, seconds=s, bytes_up=b)
            for n, (a, s, b) in enumerate(rounds, 1)
        ]
        (folder.path / "metrics.jsonl").write_bytes(b"".join(encode_event(event) + b"\n" for event in events))
    root = drawn(compare(folders))
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    assert width == WIDTH
    for circle in root.iter(f"{SVG}circle"):
        assert 0 < float(circle.get("cx", "")) < width
        assert 0 < float(circle.get("cy", "")) < height


def test_a_picture_that_cannot_be_written_is_said_in_a_sentence(two: Path, here: Here) -> None:
    code, _, err = here("compare", "a", "--svg", "no/it.svg")
    assert (code, err) == (
        1,
        "zsplit: no/it.svg cannot be written (No such file or directory): choose another --svg.\n",
    )


def test_compare_reads_real_runs(digits_run: Path, here: Here, tmp_path: Path) -> None:
    shutil.copytree(digits_run, tmp_path / "again")
    code, out, err = here("compare", str(digits_run), "again", "--target-accuracy", "0.1", "--csv", "r.csv")
    assert (code, err, "not reached" in out, "differs" in out) == (0, "", False, False)
    assert len(lines(tmp_path / "r.csv")) == 2
