"""The link of each client: what the config says of it, and the trace of a link that changes."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from zsplit.errors import ConfigError

if TYPE_CHECKING:
    from zsplit.config import Config

COLUMNS = "seconds,uplink_mbps,downlink_mbps"


class Row(NamedTuple):
    """What a link carries from `seconds` on, in Mbit/s each way; 0: as it is."""

    seconds: float
    uplink_mbps: float
    downlink_mbps: float


class ClientShape(NamedTuple):
    """How one client's link is to be: rates in Mbit/s (0: as it is), or the path of a trace in their place."""

    uplink_mbps: float
    downlink_mbps: float
    rtt_ms: float
    trace: str

    def rows(self) -> tuple[Row, ...]:
        """Return the rates over time. Raises ConfigError for a trace that cannot be read."""
        return read_trace(self.trace) if self.trace else (Row(0.0, self.uplink_mbps, self.downlink_mbps),)


def link_of(config: "Config", client: int) -> ClientShape:
    """Return what [link] says of a client, and in place of it what the `[[link.client]]` tables say: the last wins.

    Rates set for a client end a trace that it would replay otherwise, and the other way round.
    """
    link = config.link
    shape = ClientShape(link.uplink_mbps, link.downlink_mbps, link.rtt_ms, link.trace)
    for table in link.client:
        if any(first <= client <= last for first, last in ranges(table.clients)):
            said = {name: value for name in ClientShape._fields if (value := getattr(table, name)) is not None}
            if said.get("trace"):
                shape = shape._replace(uplink_mbps=0.0, downlink_mbps=0.0)
            elif "uplink_mbps" in said or "downlink_mbps" in said:
                shape = shape._replace(trace="")
            shape = shape._replace(**said)
    return shape


def ranges(clients: str) -> list[tuple[int, float]]:
    """Return the first and the last client of each part of a list such as `0,4-6` or `*`."""
    if clients == "*":
        return [(0, math.inf)]
    ends = [part.partition("-") for part in clients.split(",")]
    return [(int(first), int(last or first)) for first, _, last in ends]


def read_trace(path: str) -> tuple[Row, ...]:
    """Return the rows of a trace, a CSV with or without a header. Raises ConfigError with the line and the way out."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise ConfigError(
            f"link.trace {path} cannot be read ({why}): give each client a CSV file of {COLUMNS} at that path."
        ) from error
    rows: list[Row] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or (not rows and line.replace(" ", "") == COLUMNS):
            continue
        row = _row(line)
        if row is None:
            raise ConfigError(
                f"Line {number} of link.trace {path} is {line.strip()!r}: write {COLUMNS}, three numbers of 0 or more."
            )
        if rows and row.seconds <= rows[-1].seconds:
            raise ConfigError(
                f"Line {number} of link.trace {path} is not later than the one before "
                f"({row.seconds:g} s after {rows[-1].seconds:g} s): sort the lines by their time, each time once."
            )
        rows.append(row)
    if not rows:
        raise ConfigError(f"link.trace {path} has no line of {COLUMNS}: write one, or leave link.trace out.")
    return tuple(rows)


def _row(line: str) -> Row | None:
    try:
        row = Row(*(float(part) for part in line.split(",")))
    except (TypeError, ValueError):
        return None
    return row if all(math.isfinite(value) and value >= 0 for value in row) else None
