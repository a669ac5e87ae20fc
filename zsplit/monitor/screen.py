"""The board as a screen of text, for any size of terminal. Pure: the same board gives the same picture."""

from collections.abc import Callable, Iterable, Sequence
from textwrap import wrap
from typing import NamedTuple

from rich.console import Group
from rich.text import Text

from zsplit.monitor import figures
from zsplit.monitor.board import Board
from zsplit.monitor.curve import draw
from zsplit.monitor.peers import QUIET, STYLES, client_table, server_table
from zsplit.monitor.table import Column, beside, cut, ends, flow, rule, table
from zsplit.wire.events import LogEvent, RoundEvent, RunEvent

DIGEST = 8
"""Characters of a version's digest that are shown."""

BESIDE = 72
"""Cells from which on the rounds stand beside the loss curve."""

ROUNDS = 38
"""Cells that the rounds take at least."""

CURVE = 20
"""Lines that the loss curve takes at most, its heading included."""

LOG = 10
"""Log lines that are shown at most."""


class Block(NamedTuple):
    """A part of the screen: it says nothing in fewer than `least` lines and has no use for more than `most`."""

    least: int
    most: int
    draw: Callable[[int], list[Text]]


def render(board: Board, width: int, height: int, now: float, endpoint: str) -> Group:
    """Return the picture: at most `height` lines of at most `width` cells.

    `now` is on the clock that the board's events came by; `endpoint` is named while nothing was heard.
    """
    head = _header(board, width, now, endpoint)
    clients, servers = len(board.clients), len(board.servers)
    blocks = [
        Block(max(1, height // 4), len(head), lambda lines: head[:lines]),
        Block(
            2 + min(3, clients),
            2 + clients if clients else 0,
            lambda lines: client_table(board, width, lines - 2, now),
        ),
        Block(
            2 + min(1, servers),
            2 + servers if servers or board.broker else 0,
            lambda lines: server_table(board, width, lines - 2, now),
        ),
        Block(5, CURVE if board.curve.count or board.rounds else 0, lambda lines: _training(board, width, lines)),
        Block(2, 1 + min(LOG, len(board.log)) if board.log else 0, lambda lines: _log(board, width, lines - 1)),
    ]
    sizes = allot(height, blocks, order=(0, 1, 3, 2, 4))
    drawn = [block.draw(size) for block, size in zip(blocks, sizes, strict=True) if size]
    return Group(*(line for lines in drawn for line in lines))


def allot(height: int, blocks: Sequence[Block], order: Sequence[int]) -> list[int]:
    """Return the lines of each block: the least of each in `order`, then one more in turn while there are any.

    A block that finds no room for its least gets nothing.
    """
    sizes = [0] * len(blocks)
    for i in order:
        least = min(blocks[i].least, blocks[i].most)
        sizes[i] = least if least <= height - sum(sizes) else 0
    while growing := [i for i in order if 0 < sizes[i] < blocks[i].most][: height - sum(sizes)]:
        for i in growing:
            sizes[i] += 1
    return sizes


def _header(board: Board, width: int, now: float, endpoint: str) -> list[Text]:
    """Return the run as a whole: name, state, progress, its last sentence, and what is trained with whom."""
    run = board.run
    if run is None:
        return flow([Text("zsplit", "bold"), Text(f"waiting for a run at {endpoint}", "dim")], width)
    state = Text(f"● {run.state}", STYLES.get(run.state, "yellow"))
    state.append(f"  round {board.round()}/{run.rounds}  {figures.seconds(board.elapsed(now))}", "default not bold")
    sentence = [Text(line, "red" if run.state == "failed" else "") for line in wrap(run.sentence, width)]
    return [
        ends(Text(run.name if width < BESIDE else f"zsplit  {run.name}", "bold"), state, width),
        _progress(board.progress(), width),
        *(cut(line, width) for line in sentence),
        *flow(_warnings(board, now), width),
        *flow(_facts(run), width),
    ]


def _facts(run: RunEvent) -> list[Text]:
    facts = [
        run.test_accuracy is not None and f"test {figures.percent(run.test_accuracy)}",
        run.policy,
        f"{run.model} @ {run.cut}" if run.cut else run.model,
        run.data,
        f"{run.joined}/{figures.some(run.clients, 'client')}",
        figures.some(run.servers, "server"),
        run.version and f"version {run.version[:DIGEST]}",
        run.out,
    ]
    return [Text(fact) for fact in facts if fact]


def _warnings(board: Board, now: float) -> list[Text]:
    silent = 0.0 if board.ended or board.heard is None else now - board.heard
    found = [
        silent > QUIET and f"nothing from the broker for {figures.seconds(silent)}",
        board.missed and f"{figures.some(board.missed, 'event')} missed",
        board.unreadable and f"{figures.some(board.unreadable, 'message')} unreadable",
    ]
    return [Text(warning, "yellow") for warning in found if warning]


def _progress(share: float, width: int) -> Text:
    label = f" {figures.percent(share, 0):>5}"
    room = max(0, width - len(label))
    done = round(share * room)
    return cut(Text.assemble(("━" * done, "green"), ("─" * (room - done), "dim"), label), width)


def _training(board: Board, width: int, size: int) -> list[Text]:
    """Return the loss curve and, where there is room, the rounds beside it."""
    steps = figures.some(board.curve.count, "step")
    if width < BESIDE or not board.rounds:
        return _curve(board, [*_latest(board, steps), steps], width, size)
    rounds = _rounds(board, max(ROUNDS, width // 3), size)
    return beside(_curve(board, [steps], width - rounds[0].cell_len - 2, size), rounds, gap=2)


def _latest(board: Board, steps: str) -> list[str]:
    accuracy = board.rounds[max(board.rounds)].val_accuracy if board.rounds else None
    return [] if accuracy is None else [f"{steps} · val {figures.percent(accuracy)}"]


def _curve(board: Board, notes: Sequence[str], width: int, size: int) -> list[Text]:
    """Return the loss curve under its heading: `size` lines of exactly `width` cells."""
    drawn = [Text(line, "cyan") for line in draw(board.curve.points(), width, size - 1)]
    for line in drawn:
        line.stylize("default dim", 0, line.plain.find("│") + 1)
        line.align("left", width)
    return [rule("Training loss", notes, width), *drawn]


def _rounds(board: Board, width: int, size: int) -> list[Text]:
    """Return the latest rounds under a heading, at most `size` lines of about `width` cells."""
    rounds = [board.rounds[number] for number in sorted(board.rounds)][-max(1, size - 2) :]
    columns = [
        Column("round", [Text(f"{r.round}") for r in rounds]),
        Column("loss", [Text(figures.loss(r.train_loss)) for r in rounds], least=7),
        Column("val loss", [Text(figures.loss(r.val_loss)) for r in rounds], rank=1),
        Column("val", [Text(figures.percent(r.val_accuracy)) for r in rounds], least=7),
        Column("top-5", [Text(figures.percent(r.val_top5)) for r in rounds], rank=2, least=7),
        Column("time", [Text(figures.seconds(r.seconds)) for r in rounds], least=7),
    ]
    lines = table(columns, width)
    return [rule("Rounds", _best(board.rounds.values()), lines[0].cell_len), *lines][:size]


def _best(rounds: Iterable[RoundEvent]) -> list[str]:
    best = max((r.val_accuracy for r in rounds if r.val_accuracy is not None), default=None)
    return [] if best is None else [f"best val {figures.percent(best)}"]


def _log(board: Board, width: int, rows: int) -> list[Text]:
    return [rule("Events", [], width), *(_entry(event, width) for event in list(board.log)[-rows:])]


def _entry(event: LogEvent, width: int) -> Text:
    style = {"warning": "yellow", "error": "bold red"}.get(event.level, "")
    who = (f"{figures.clock(event.time)}  {event.who:<9}  ", "dim")
    return cut(Text.assemble(who, (event.text, style)), width)
