"""The tables of clients and servers."""

from collections.abc import Sequence

from rich.text import Text

from zsplit.monitor import figures
from zsplit.monitor.board import Board
from zsplit.monitor.table import Column, rule, table
from zsplit.wire.events import ClientEvent, ServerEvent

QUIET = 5.0
"""Seconds without a sign of life after which a peer, or the broker, is shown as in trouble."""

IDLE = 0.5
"""Share of idle time from which on it is pointed out."""

STYLES = {
    "measuring": "magenta",
    "training": "green",
    "evaluating": "cyan",
    "storing": "cyan",
    "merging": "cyan",
    "finished": "bold green",
    "lost": "bold red",
    "failed": "bold red",
}
"""How states of peers and runs are coloured; the others are not."""

_BUSY = frozenset({"measuring", "training", "evaluating", "merging"})
_BAR = 8
_EIGHTHS = " ▏▎▍▌▋▊▉"


def client_table(board: Board, width: int, rows: int, now: float) -> list[Text]:
    """Return the heading, the titles and at most `rows` clients.

    By index where all have room, else those in trouble first; the heading says how many are hidden.
    """
    shown = worst_first(board, now)[:rows]
    if len(shown) == len(board.clients):
        shown.sort(key=lambda client: client.index)
    notes = _client_notes(board, len(board.clients) - len(shown))
    return [rule("Clients", notes, width), *table(_client_columns(board, shown, now), width)]


def worst_first(board: Board, now: float) -> list[ClientEvent]:
    """Return the clients: those in trouble first, then those at work, each by index."""

    def key(client: ClientEvent) -> tuple[int, int]:
        calm = 1 if client.state in _BUSY else 2
        return (0 if in_trouble(board, client, now) else calm, client.index)

    return sorted(board.clients.values(), key=key)


def in_trouble(board: Board, peer: ClientEvent | ServerEvent, now: float) -> bool:
    """Return whether a peer is lost, or silent for longer than `QUIET` before its work is done."""
    over = board.ended or peer.state == "done"
    return peer.state == "lost" or (not over and board.age(peer, now) > QUIET)


def _client_notes(board: Board, hidden: int) -> list[str]:
    rate = sum(client.samples_per_second for client in board.clients.values())
    total = f"{figures.count(rate)} samples/s"
    return [f"{hidden:,} more, hidden · {total}", f"{hidden:,} hidden"] if hidden else [total]


def _client_columns(board: Board, clients: Sequence[ClientEvent], now: float) -> list[Column]:
    steps = [f"{c.step}/{c.steps}" if c.steps else figures.NONE for c in clients]
    servers = ["" if c.server is None else f"{c.server}" for c in clients]
    return [
        Column("#", [Text(f"{c.index}") for c in clients], least=3),
        Column("state", [_state(c.state) for c in clients], least=12, left=True),
        Column("round", [Text(f"{c.round}") for c in clients], rank=7),
        Column("step", [Text(step) for step in steps], rank=1, least=7),
        Column("loss", [Text(figures.loss(c.loss)) for c in clients], rank=1, least=6),
        Column("samples/s", [Text(figures.count(c.samples_per_second)) for c in clients], rank=3),
        Column("up", [Text(figures.scaled(c.bytes_up, "B")) for c in clients], rank=5, least=7),
        Column("down", [Text(figures.scaled(c.bytes_down, "B")) for c in clients], rank=5, least=7),
        *_idle(clients, rank=4),
        _seen(board, clients, now, rank=2),
        Column("server", [Text(server) for server in servers], rank=6 if len(board.servers) > 1 else 8),
        *_places(clients),
    ]


def server_table(board: Board, width: int, rows: int, now: float) -> list[Text]:
    """Return the heading with the broker's figures, the titles and at most `rows` servers, by index."""
    shown = [board.servers[index] for index in sorted(board.servers)][:rows]
    hidden = len(board.servers) - len(shown)
    more = [f"{hidden} hidden"] if hidden else []
    notes = [" · ".join([*more, *choice]) for choice in _broker(board)]
    return [rule("Servers", notes, width), *table(_server_columns(board, shown, now), width)]


def _broker(board: Board) -> list[list[str]]:
    """Return the broker's figures, then ever shorter choices of them."""
    if board.broker is None:
        return [[]]
    messages = f"{figures.count(board.broker.messages_per_second)} msg/s"
    rate = f"{figures.scaled(board.broker.bytes_per_second, 'B')}/s"
    dropped = f"{board.broker.dropped:,} dropped"
    total = f"{figures.scaled(board.broker.bytes, 'B')} relayed"
    return [["broker", messages, rate, total, dropped], ["broker", messages, rate, dropped], [messages, rate], []]


def _server_columns(board: Board, servers: Sequence[ServerEvent], now: float) -> list[Column]:
    return [
        Column("#", [Text(f"{s.index}") for s in servers], least=3),
        Column("state", [_state(s.state) for s in servers], least=12, left=True),
        Column("clients", [Text(figures.ranges(s.clients)) for s in servers], rank=5, least=8, left=True),
        Column("samples/s", [Text(figures.count(s.samples_per_second)) for s in servers], rank=2),
        *_idle(servers, rank=3),
        _seen(board, servers, now, rank=1),
        *_places(servers),
    ]


def _state(state: str) -> Text:
    return Text(f"● {state}", STYLES.get(state, "dim"))


def _idle(peers: Sequence[ClientEvent | ServerEvent], rank: int) -> list[Column]:
    shares = [Text(figures.percent(p.idle_share, 0), "yellow" if p.idle_share > IDLE else "") for p in peers]
    bars = [Text(_bar(p.idle_share), "yellow" if p.idle_share > IDLE else "dim") for p in peers]
    return [Column("idle", shares, rank, least=5), Column("", bars, rank=9, least=_BAR, left=True, close=True)]


def _bar(share: float) -> str:
    """Return a share of 1 as a bar of at most `_BAR` cells, in eighths of a cell."""
    whole, part = divmod(round(min(1.0, max(0.0, share)) * _BAR * 8), 8)
    return "█" * whole + (_EIGHTHS[part] if part else "")


def _seen(board: Board, peers: Sequence[ClientEvent | ServerEvent], now: float, rank: int) -> Column:
    cells = [
        Text(figures.seconds(board.age(peer, now)), "bold red" if in_trouble(board, peer, now) else "")
        for peer in peers
    ]
    return Column("seen", cells, rank, least=6)


def _places(peers: Sequence[ClientEvent | ServerEvent]) -> list[Column]:
    return [
        Column("device", [Text(peer.device, "dim") for peer in peers], rank=10, left=True),
        Column("host", [Text(peer.host, "dim") for peer in peers], rank=11, left=True),
    ]
