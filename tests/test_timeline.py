"""Timelines: what is written comes back, whole or torn, and is drawn as it was."""

import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import Ending
from helpers import unhurried
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from zsplit.errors import ConfigError, StorageError
from zsplit.monitor.timeline import Wanted, show
from zsplit.monitor.timeline.drawing import draw, moment, ticks
from zsplit.monitor.timeline.figures import Busy, figures_of
from zsplit.monitor.timeline.kinds import KNOWN, kinds_of
from zsplit.monitor.timeline.picture import LEFT, MOST, RIGHT, SEAM, WIDTH, picture
from zsplit.monitor.timeline.read import Bar, Row, Timeline, read_timeline
from zsplit.monitor.timeline.stretch import Extent, choose
from zsplit.wire.messages import Span
from zsplit_broker import timeline as written
from zsplit_broker.disk import Writer
from zsplit_broker.timeline import SLACK, TIMELINE
from zsplit_broker.work import Peer

SVG = "{http://www.w3.org/2000/svg}"

CLIENT: Peer = ("client", 0)
SERVER: Peer = ("server", 0)

# Microseconds, so that none is lost to rounding.
moments = st.integers(0, 10**8).map(lambda micros: micros / 1e6)
spans = st.builds(
    Span,
    st.sampled_from(["compute", "up", "down"]),
    st.sampled_from([*KNOWN, "prüfen", "zip"]),
    moments,
    st.integers(0, 10**6).map(lambda micros: micros / 1e6),
    st.integers(-1, 9),
    st.integers(-1, 3),
    st.integers(-1, 3),
)
peers = st.tuples(st.sampled_from(["client", "server"]), st.integers(0, 2))
telemetries = st.lists(st.tuples(peers, st.lists(spans, max_size=20)), min_size=1, max_size=6)


def at_once(_: str, task: Callable[[], None]) -> None:
    """Stand where the writer's thread is in a run."""
    task()


def write(folder: Path, *telemetry: tuple[Peer, Sequence[Span]], rounds: Sequence[float] = ()) -> Path:
    """Write the timeline of a run whose rounds begin at these times."""
    timeline = written.Timeline(folder, at_once)
    for number, begin in enumerate(rounds, 1):
        timeline.begin_round(number, begin)
    for peer, some in telemetry:
        assert timeline.add(peer, some) == ""
    timeline.finish()
    return folder


def step(number: int, begin: float, client: int = -1) -> list[Span]:
    """Return a step of a tenth of a second: a forward, a wait, a backward and the optimizer's step."""
    parts = [("forward", 0.0, 0.02), ("wait", 0.02, 0.05), ("backward", 0.07, 0.02), ("step", 0.09, 0.01)]
    return [Span("compute", name, begin + at, seconds, number, 0, client) for name, at, seconds in parts]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A run of two rounds of four steps, with a client and a server that computes while the client waits."""
    begins = [1.0, 1.1, 1.2, 1.3, 2.0, 2.1, 2.2, 2.3]
    mine = [span for number, begin in enumerate(begins) for span in step(number % 4, begin)]
    sent = [Span("up", "send", begin + 0.02, 0.02, n % 4, 0) for n, begin in enumerate(begins)]
    theirs = [Span("compute", "forward", begin + 0.04, 0.025, n % 4, 0, 0) for n, begin in enumerate(begins)]
    return write(tmp_path, (SERVER, theirs), (CLIENT, mine), (CLIENT, sent), rounds=[0.9, 1.9])


def drawn(folder: Path, wanted: Wanted, width: int = 70) -> list[str]:
    timeline = read_timeline(folder)
    extent = choose(timeline, wanted)
    return [line.plain.rstrip() for line in draw(timeline, extent, figures_of(timeline, extent), width)]


# What is written


@unhurried
@given(telemetries)
def test_what_peers_did_comes_back_from_the_file(
    tmp_path_factory: pytest.TempPathFactory, telemetry: list[tuple[Peer, list[Span]]]
) -> None:
    told = Counter(
        (f"{role} {index}", written.LANES[span.lane], span.name, round(span.seconds, 6), *span[4:])
        for (role, index), some in telemetry
        for span in some
    )
    folder = write(tmp_path_factory.mktemp("run"), *telemetry)
    if told:
        rows = read_timeline(folder).rows
        assert told == Counter(
            (row.peer, row.lane, bar.name, round(bar.seconds, 6), bar.step, bar.micro, bar.client)
            for row, bars in rows.items()
            for bar in bars
        )


@unhurried
@given(st.lists(spans, min_size=1, max_size=written.ROWS))
def test_no_two_spans_of_a_row_overlap_and_none_is_moved_far(
    tmp_path_factory: pytest.TempPathFactory, some: list[Span]
) -> None:
    rows = read_timeline(write(tmp_path_factory.mktemp("run"), (CLIENT, some))).rows
    for bars in rows.values():
        assert all(before.end <= after.begin + 1e-8 for before, after in pairwise(bars))
    begins = sorted(bar.begin for bars in rows.values() for bar in bars)
    for told, found in zip(sorted(span.begin for span in some), begins, strict=True):
        assert told - 1e-8 <= found <= told + SLACK + 1e-8


def test_spans_that_overlap_without_end_share_the_last_row_and_stay_in_order(tmp_path: Path) -> None:
    sends = [Span("up", "send", 1.0, 1.0, 0, micro) for micro in range(written.ROWS + 2)]
    rows = read_timeline(write(tmp_path, (CLIENT, sends))).rows
    assert [len(bars) for bars in rows.values()] == [1] * (written.ROWS - 1) + [3]
    assert [(bar.begin, bar.end) for bar in list(rows.values())[-1]] == [(1.0, 2.0), (2.0, 3.0), (3.0, 4.0)]


def test_a_span_belongs_to_the_last_round_that_had_begun(tmp_path: Path) -> None:
    some = [Span("compute", "load", begin, 0.1) for begin in (0.5, 1.0, 1.9, 2.0, 7.0)]
    timeline = read_timeline(write(tmp_path, (CLIENT, some), rounds=[1.0, 2.0]))
    assert [bar.round for bar in timeline.rows[Row("client 0", "compute", "compute")]] == [-1, 1, 1, 2, 2]


def test_a_round_begins_once(tmp_path: Path) -> None:
    timeline = written.Timeline(tmp_path, at_once)
    for number, now in ((1, 1.0), (2, 2.0), (2, 2.5), (1, 3.0)):
        timeline.begin_round(number, now)
    timeline.add(CLIENT, [Span("compute", "load", begin, 0.1) for begin in (1.5, 2.2, 3.5)])
    timeline.finish()
    assert [bar.round for bar in read_timeline(tmp_path).rows[Row("client 0", "compute", "compute")]] == [1, 2, 2]


def test_the_file_is_what_perfetto_reads(made: Path) -> None:
    events = json.loads((made / TIMELINE).read_text())
    named = {(e["name"], e["pid"]): e["args"] for e in events if e["ph"] == "M" and e["name"].startswith("process")}
    assert named["process_name", 1] == {"name": "server 0"}
    assert named["process_name", 2] == {"name": "client 0"}
    assert named["process_sort_index", 2]["sort_index"] < named["process_sort_index", 1]["sort_index"]
    threads = {e["tid"]: (e["pid"], e["args"]["name"]) for e in events if e["name"] == "thread_name"}
    assert sorted(threads.values()) == [(1, "compute"), (2, "compute"), (2, "send")]
    complete = [e for e in events if e["ph"] == "X"]
    assert all(threads[e["tid"]][0] == e["pid"] and e["dur"] > 0 for e in complete)
    assert complete[0]["args"] == {"round": 1, "client": 0, "step": 0, "micro": 0}
    assert (complete[0]["ts"], complete[0]["dur"], complete[0]["cat"]) == (1_040_000, 25_000, "compute")


def test_an_arrow_joins_where_a_micro_batch_left_with_where_it_arrived(tmp_path: Path) -> None:
    there = [Span("up", "send", 1.0, 0.2, 3, 1)], [Span("down", "receive", 1.0, 0.3, 3, 1, 0)]
    back = [Span("down", "receive", 2.0, 0.3, 3, 1)], [Span("up", "send", 2.0, 0.2, 3, 1, 0)]
    write(tmp_path, *((peer, some) for way in (there, back) for peer, some in zip((CLIENT, SERVER), way, strict=True)))
    events = json.loads((tmp_path / TIMELINE).read_text())
    ends = {(e["ph"], e["id"]): (e["pid"], e["ts"]) for e in events if e["ph"] in "sf"}
    assert ends == {
        ("s", "0.0.3.1.0"): (1, 1e6),
        ("f", "0.0.3.1.0"): (2, 1e6),
        ("f", "0.0.3.1.1"): (1, 2e6),
        ("s", "0.0.3.1.1"): (2, 2e6),
    }


def test_a_run_without_a_span_leaves_an_array_all_the_same(tmp_path: Path) -> None:
    assert json.loads((write(tmp_path) / TIMELINE).read_text()) == []


def test_a_full_timeline_is_said_once_and_takes_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "MAX_SPANS", 5)
    timeline = written.Timeline(tmp_path, at_once)
    said = [timeline.add(CLIENT, step(number, 0.1 * number)) for number in range(4)]
    timeline.finish()
    assert said == ["", "timeline.json is full (5 spans): the rest of the run is not in it", "", ""]
    assert sum(map(len, read_timeline(tmp_path).rows.values())) == 5


def test_it_is_written_by_the_thread_that_waits_for_the_disk(tmp_path: Path) -> None:
    writer = Writer(lambda: None)
    timeline = written.Timeline(tmp_path, writer.submit)
    timeline.add(CLIENT, step(0, 1.0))
    timeline.finish()
    writer.close()
    assert [outcome.error for outcome in writer.finished()] == [None, None]
    assert len(json.loads((tmp_path / TIMELINE).read_text())) == 2 + 2 + 4


def test_a_full_disk_is_said_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / TIMELINE).symlink_to("/dev/full")
    with pytest.raises(StorageError) as error:
        write(tmp_path, (CLIENT, step(0, 1.0)))
    assert str(error.value) == (f"the disk of {tmp_path} is full: free 1 MB; what was stored is intact")


# What is read


@unhurried
@given(st.integers(0, 10**4))
def test_whatever_a_killed_broker_left_is_read_up_to_its_last_whole_line(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    folder = write(tmp_path_factory.mktemp("run"), (CLIENT, [s for n in range(9) for s in step(n, n)]))
    data = (folder / TIMELINE).read_bytes()
    left = data[: 2 + cut % (len(data) - 1)]
    (folder / TIMELINE).write_bytes(left)
    lines = [line.removesuffix(b",") for line in left.split(b"\n")]
    whole = sum(line.startswith(b'{"ph":"X"') and line.endswith(b'"}') for line in lines)
    if whole:
        assert sum(map(len, read_timeline(folder).rows.values())) == whole
    else:
        with pytest.raises(StorageError, match="has no span in it yet"):
            read_timeline(folder)


def test_the_file_itself_can_be_named(made: Path) -> None:
    assert read_timeline(made / TIMELINE) == read_timeline(made)


def test_clients_come_before_servers_and_what_computes_before_what_is_sent(made: Path) -> None:
    rows = list(read_timeline(made).rows)
    assert rows == [("client 0", "compute", "compute"), ("client 0", "out", "send"), ("server 0", "compute", "compute")]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "FOLDER has no timeline.json: run it with --set run.timeline=true, or wait until it has begun"),
        (b"", "FILE is no timeline that zsplit wrote: give the folder of a run"),
        (b'{"traceEvents": []}', "FILE is no timeline that zsplit wrote: give the folder of a run"),
        (b"[\n]\n", "FILE has no span in it yet: wait until the run trains, or look at another run"),
        (b"[", "FILE has no span in it yet: wait until the run trains, or look at another run"),
        (b"[\nnothing,\n]\n", "line 2 of FILE is damaged, and not the last: cut the file there (`head -n 1`)"),
        (
            b'[\n{"ph":"M","name":"a","pid":1},\n{"ph":"X","name":"\xff"},\n]\n',
            "line 3 of FILE is damaged, and not the last: cut the file there (`head -n 2`)",
        ),
    ],
)
def test_what_is_no_timeline_is_said_in_a_sentence(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / TIMELINE).write_bytes(content)
    with pytest.raises((ConfigError, StorageError)) as error:
        read_timeline(tmp_path)
    assert str(error.value) == sentence.replace("FILE", str(tmp_path / TIMELINE)).replace("FOLDER", str(tmp_path))


def test_a_run_that_does_not_exist_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read_timeline(tmp_path / "no")
    assert str(error.value) == f"{tmp_path / 'no'} does not exist: give the folder of a run, such as runs/digits-1"


# Which stretch


def extent_of(folder: Path, **wanted: float) -> tuple[float, float]:
    begin, end = choose(read_timeline(folder), Wanted(**wanted))  # type: ignore[arg-type]
    return round(begin, 6), round(end, 6)


def test_the_last_three_steps_are_shown_where_nothing_else_is_asked_for(made: Path) -> None:
    assert extent_of(made) == (2.1, 2.4)


def test_a_step_is_that_of_the_last_round_unless_the_round_is_named(made: Path) -> None:
    assert extent_of(made, step=1) == (2.1, 2.2)
    assert extent_of(made, step=1, round=1) == (1.1, 1.2)


def test_a_round_is_all_that_happened_in_it(made: Path) -> None:
    assert extent_of(made, round=1) == (1.0, 1.4)


def test_a_stretch_ends_where_the_timeline_ends(made: Path) -> None:
    assert extent_of(made, begin=2.25) == (2.25, 2.4)
    assert extent_of(made, end=1.25) == (1.0, 1.25)
    assert extent_of(made, begin=-5, end=float("inf")) == (1.0, 2.4)


def test_a_timeline_without_a_step_is_shown_whole(tmp_path: Path) -> None:
    write(tmp_path, (SERVER, [Span("compute", "aggregate", 1.0, 0.5), Span("compute", "aggregate", 3.0, 0.5)]))
    assert extent_of(tmp_path) == (1.0, 3.5)


def test_a_single_moment_can_be_drawn(tmp_path: Path) -> None:
    write(tmp_path, (SERVER, [Span("compute", "aggregate", 1.0, 0.0)]))
    assert drawn(tmp_path, Wanted())


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        (Wanted(begin=3.0), "nothing lies between 3 s and 2.4 s: the timeline goes from 1.000 s to 2.400 s"),
        (Wanted(begin=2.0, end=1.5), "nothing lies between 2 s and 1.5 s: the timeline goes from 1.000 s to 2.400 s"),
        (Wanted(end=float("nan")), "nothing lies between 1 s and nan s: the timeline goes from 1.000 s to 2.400 s"),
        (Wanted(step=4), "no client trained step 4: the timeline has steps 0 to 3"),
        (Wanted(step=9, round=1), "no client trained step 9 in round 1: the timeline has steps 0 to 3"),
        (Wanted(step=0, round=3), "no client trained step 0 in round 3: the timeline has rounds 1 to 2"),
        (Wanted(round=3), "no span lies in round 3: the timeline has rounds 1 to 2"),
        (Wanted(begin=1.0, step=2), "a stretch is given by --from and --to, or by --round and --step, not by both"),
    ],
)
def test_a_stretch_that_is_not_there_is_said_in_a_sentence(made: Path, wanted: Wanted, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        choose(read_timeline(made), wanted)
    assert str(error.value) == sentence


# Figures


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9))), st.integers(0, 40), st.integers(1, 20))
def test_the_busy_share_counts_every_moment_once(some: list[tuple[int, int]], begin: int, length: int) -> None:
    bars = [Bar("forward", first, first + count) for first, count in some]
    busy = {moment for first, count in some for moment in range(first, first + count)}
    share = Busy([*bars, Bar("wait", 0, 60)]).share(Extent(begin, begin + length))
    assert share == pytest.approx(len(busy & set(range(begin, begin + length))) / length)


def test_figures_tell_busy_shares_and_bubbles(made: Path) -> None:
    figures = figures_of(timeline := read_timeline(made), choose(timeline, Wanted()))
    client, server = figures.peers
    assert (client.peer, client.steps, server.peer, server.steps) == ("client 0", 3, "server 0", 3)
    assert (client.busy, client.bubble) == (pytest.approx(0.5), pytest.approx(0.5))
    assert (server.busy, server.bubble) == (pytest.approx(0.25), pytest.approx(0.75))
    assert client.lanes["out"].busy == pytest.approx(0.2)
    assert client.lanes["compute"].seconds == pytest.approx(
        {"forward": 0.06, "wait": 0.15, "backward": 0.06, "step": 0.03}
    )


def test_a_server_has_a_bubble_only_in_the_steps_it_took_part_in(tmp_path: Path) -> None:
    clients = [(("client", i), step(0, 1.0)) for i in (0, 1)]
    servers = [(("server", i), [Span("compute", "forward", 1.02 + i / 100, 0.05, 0, 0, i)]) for i in (0, 1)]
    write(tmp_path, *clients, *servers, (("server", 2), [Span("compute", "evaluate", 1.0, 0.1, 0, 0, 0)]))  # type: ignore[arg-type]
    figures = figures_of(timeline := read_timeline(tmp_path), choose(timeline, Wanted()))
    assert [(peer.peer, peer.steps) for peer in figures.peers[2:]] == [
        ("server 0", 1),
        ("server 1", 1),
        ("server 2", 0),
    ]
    assert [peer.bubble for peer in figures.peers[2:]] == [pytest.approx(0.5), pytest.approx(0.5), None]


# The drawing

PICTURE = """\
client 0 compute FFFFF------------BBBBBBOOFFFFF------------BBBBBBOO   50 %
         out          SSSSS                    SSSSS                  20 %
server 0 compute           FFFFFFf                  FFFFFFf           25 %
                 ┴───────────┴────────────┴───────────┴────────────
                 1.000 s     1.050 s      1.100 s     1.150 s

F forward · B backward · O step · S send · - wait
small letters: idle for more than half of the cell

peer        busy    bubble    of steps
client 0    50 %      50 %           2
server 0    25 %      75 %           2"""


def test_a_stretch_is_drawn_as_letters(made: Path) -> None:
    assert "\n".join(drawn(made, Wanted(begin=1.0, end=1.2), 74)) == PICTURE


def test_letters_are_unique_and_a_name_that_is_not_known_gets_one() -> None:
    kinds = kinds_of([*KNOWN, "zip", "forge", "zap", "---"])
    letters = [kind.letter for name, kind in kinds.items() if name not in ("wait", "fetch", "---")]
    assert len({letter.lower() for letter in letters}) == len(letters)
    assert (kinds["zap"].letter, kinds["zip"].letter, kinds["forge"].letter) == ("Z", "I", "G")
    assert kinds["---"].letter == "?"


@given(st.floats(0, 1e6), st.floats(1e-6, 1e6), st.integers(1, 30))
def test_ticks_are_round_and_lie_in_the_stretch(begin: float, length: float, most: int) -> None:
    extent = Extent(begin, begin + length)
    found = ticks(extent, most)
    assert len(found) <= most + 1
    assert all(begin - 1e-6 * length <= time <= begin + length * (1 + 1e-6) for time in found)


def test_ticks_that_differ_have_labels_that_differ() -> None:
    for extent in (Extent(0, 500), Extent(3, 4), Extent(12.34, 12.35)):
        labels = [moment(time, extent) for time in ticks(extent, 10)]
        assert len(set(labels)) == len(labels) >= 5


@pytest.mark.parametrize("width", [10, 40, 80, 200])
def test_rows_fill_the_width_where_there_is_room(made: Path, width: int) -> None:
    rows = drawn(made, Wanted(), width)[:3]
    assert {len(row) for row in rows} == {max(width, 17 + 20 + 7)}


# The picture


def shapes(folder: Path, **wanted: float) -> tuple[ElementTree.Element, Timeline]:
    timeline = read_timeline(folder)
    extent = choose(timeline, Wanted(**wanted))  # type: ignore[arg-type]
    text = picture(timeline, extent, figures_of(timeline, extent), "a <title> & more")
    return ElementTree.fromstring(text), timeline


@unhurried
@given(telemetries)
def test_a_picture_has_a_rect_with_a_tooltip_for_every_span_inside_its_edges(
    tmp_path_factory: pytest.TempPathFactory, telemetry: list[tuple[Peer, list[Span]]]
) -> None:
    telemetry = [*telemetry, (CLIENT, [Span("up", 'a<b>&"\x00\x1b[31m', 1.0, 0.5, 1, 2)])]
    root, timeline = shapes(write(tmp_path_factory.mktemp("run"), *telemetry), begin=0)
    rects = [rect for rect in root.iter(f"{SVG}rect") if rect.get("class") == "span"]
    assert len(rects) == sum(map(len, timeline.rows.values()))
    assert all(rect.find(f"{SVG}title") is not None for rect in rects)
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    assert width == WIDTH
    for rect in root.iter(f"{SVG}rect"):
        x, y, w, h = (float(rect.get(name, "")) for name in ("x", "y", "width", "height"))
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height


def test_a_picture_puts_spans_where_they_were(made: Path) -> None:
    root, _ = shapes(made, step=3)
    rects = {
        rect.findtext(f"{SVG}title", "").split(":")[0]: rect
        for rect in root.iter(f"{SVG}rect")
        if rect.get("class") == "span"
    }
    assert list(rects) == [
        "forward, round 2, step 3, micro-batch 0",
        "wait, round 2, step 3, micro-batch 0",
        "backward, round 2, step 3, micro-batch 0",
        "step, round 2, step 3, micro-batch 0",
        "send, round 2, step 3, micro-batch 0",
        "forward, round 2, step 3, micro-batch 0, client 0",
    ]
    forward, wait, backward = (
        tuple(float(rect.get(name, "")) for name in ("x", "width", "height")) for rect in list(rects.values())[:3]
    )
    pixels = (WIDTH - LEFT - RIGHT) / 0.1  # in a second: the step takes a tenth
    assert [forward[0], wait[0], backward[0]] == pytest.approx([LEFT, LEFT + 0.02 * pixels, LEFT + 0.07 * pixels])
    assert [forward[1], wait[1], backward[1]] == pytest.approx([0.02 * pixels, 0.05 * pixels, 0.02 * pixels], abs=SEAM)
    assert wait[2] < backward[2] / 2


def test_a_row_that_has_nothing_in_the_stretch_is_left_out_of_the_picture(made: Path) -> None:
    texts = [text.text for text in shapes(made, begin=1.0, end=1.01)[0].iter(f"{SVG}text")]
    assert "send" not in texts
    assert texts.count("compute") == 2


def test_a_picture_of_too_much_is_said_in_a_sentence(tmp_path: Path) -> None:
    some = [Span("compute", "forward", i / 1000, 0.001) for i in range(MOST + 1)]
    with pytest.raises(ConfigError) as error:
        shapes(write(tmp_path, (CLIENT, some)), begin=0)
    assert str(error.value) == (
        "the stretch has 20,001 spans and a picture shows 20,000 at most: take a shorter one with --from and --to"
    )


# The command

Here = Callable[..., Ending]


def test_the_command_draws_the_last_steps(here: Here, made: Path) -> None:
    code, out, err = here("timeline", ".")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == ".: 2.100 s to 2.400 s"
    assert "client 0 compute FFF" in out
    assert "\x1b" not in out


def test_the_command_answers_in_json(here: Here, made: Path) -> None:
    answer = json.loads(here("timeline", ".", "--json", "--step", "1", "--round", "1").out)
    assert (answer["begin"], answer["end"]) == (pytest.approx(1.1), pytest.approx(1.2))
    assert [peer["peer"] for peer in answer["peers"]] == ["client 0", "server 0"]


def test_the_command_draws_a_picture(here: Here, made: Path) -> None:
    assert here("timeline", ".", "--svg", "x.svg") == (0, "The picture is x.svg\n", "")
    assert ElementTree.parse(made / "x.svg").getroot().tag == f"{SVG}svg"


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (["no"], 2, "no does not exist: give the folder of a run, such as runs/digits-1."),
        (
            [".", "--svg", "no/x.svg"],
            1,
            "no/x.svg cannot be written (No such file or directory): choose another --svg.",
        ),
        ([".", "--round", "9"], 2, "no span lies in round 9: the timeline has rounds 1 to 2."),
    ],
)
def test_an_error_is_one_sentence(here: Here, made: Path, options: list[str], code: int, sentence: str) -> None:
    assert here("timeline", *options) == (code, "", f"zsplit: {sentence}\n")


def test_a_terminal_sees_colours_and_its_own_width(made: Path) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=60, color_system="truecolor")
    show(made, Wanted(), None, False, screen)
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[" in text
    assert "30;48;2;76;120;168mF" in text


def test_an_output_that_has_no_such_characters_gets_others(made: Path) -> None:
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    show(made, Wanted(), None, False, Console(file=output))
    output.seek(0)
    assert "forward ? B backward" in output.read()
