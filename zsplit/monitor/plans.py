"""Profiles and plans as tables: what each stretch costs, what was considered, where the time goes."""

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from zsplit.monitor.figures import scaled
from zsplit.plan import Candidate, ClientSite, Decision, Forecast, Machine, ServerSite, explain
from zsplit.plan.links import MEGABIT
from zsplit.plan.words import milliseconds, spelled
from zsplit.wire.messages import LinkSpeed, Profile

SHOWN = 12
"""Candidates that are shown, best first, unless all are asked for."""

RESOURCES = ("client", "uplink", "server", "downlink")


def ranking(decision: Decision, everything: bool = False) -> Iterator[RenderableType]:
    """Yield a table of candidates for all clients that have the same plan, then why each is best, and the notes."""
    for clients in decision.alike():
        candidates = decision.candidates(clients)
        yield _candidates(spelled(clients).capitalize(), candidates, everything)
        if everything:
            yield from (Text(_excluded(each)) for each in candidates if each.excluded)
    yield ""
    yield from (Text(f"{sentence}\n") for sentence in explain(decision))
    yield from (Text(f"{note}.\n") for note in decision.notes)


def _candidates(title: str, candidates: Sequence[Candidate], everything: bool) -> Table:
    """Return a table of candidates, each with what it is to the slowest of its clients."""
    considered = [each for each in candidates if not each.excluded]
    excluded = [each for each in candidates if each.excluded]
    shown = considered if everything else considered[:SHOWN]
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("cut", "M", "step", *RESOURCES, "turn"):
        table.add_column(column, justify="left" if column == "cut" else "right", overflow="fold")
    for each in shown:
        step = milliseconds(each.slowest.step_seconds)
        turn = milliseconds(each.slowest.turn_seconds)
        table.add_row(each.cut, str(each.micro_batches), step, *_shares(each.slowest), turn)
    left = [f"{len(considered) - len(shown)} more"] * (len(shown) < len(considered))
    left += [f"{len(excluded)} excluded"] * bool(excluded and not everything)
    table.caption = f"{', '.join(left)}: --all shows them" if left else None
    return table


def _excluded(candidate: Candidate) -> str:
    micros = f" with M = {candidate.micro_batches}" if candidate.micro_batches else ""
    return f"excluded: {candidate.cut!r}{micros} ({candidate.excluded})"


def _shares(forecast: Forecast) -> Iterator[Text]:
    """Yield how busy each resource is, the busiest one in bold."""
    busy = (forecast.client_busy, forecast.uplink_busy, forecast.server_busy, forecast.downlink_busy)
    for resource, seconds in zip(RESOURCES, busy, strict=True):
        yield Text(f"{100 * seconds / forecast.step_seconds:.0f} %", "bold" if resource == forecast.bottleneck else "")


def profile(site: ClientSite | ServerSite) -> Iterator[RenderableType]:
    """Yield what a peer measured: itself, its link, and tables of the stretches of the model."""
    measured = site.profile
    who = f"Client {site.client}" if isinstance(site, ClientSite) else f"Server {site.server}"
    yield Text("\n".join([f"{who}: {_machine(site.machine)}", *_facts(site)]))
    yield _times(measured)
    yield _sizes(measured)


def _machine(machine: Machine) -> str:
    threads = f"{machine.threads} thread{'s' * (machine.threads != 1)}"
    cores = f"{machine.cores} core{'s' * (machine.cores != 1)}"
    return f"{machine.host or 'a host of its own'}, {cores}, computes on {machine.device} with {threads}"


def _facts(site: ClientSite | ServerSite) -> Iterator[str]:
    measured = site.profile
    if isinstance(site, ClientSite):
        yield _link(site.link)
        loading = milliseconds(measured.batch_seconds)
        yield f"{site.steps} steps a round, {site.batch} samples a mini-batch, which takes {loading} to load"
    message = milliseconds(measured.message_seconds)
    norm = ", the model has BatchNorm" if measured.batch_norm else ""
    yield f"each micro-batch takes {message} beside computing{norm}"
    if measured.note:
        yield measured.note


def _link(link: LinkSpeed) -> str:
    up, down = (f"{_short(rate / MEGABIT)} Mbit/s" for rate in (link.up, link.down))
    trip = milliseconds(link.rtt)
    return f"link {up} up, {down} down, round trip {trip}, rates vary by {100 * link.spread:.0f} %"


def _times(measured: Profile) -> Table:
    """Return the seconds of each stretch: as narrow as figures in full can be, since a terminal may have 80 cells."""
    title = "ms forward and (below) backward, by samples of a slice"
    table = _table(title, (*map(str, measured.sizes), "step"))
    for name, stretch in zip(_names(measured), measured.stretches, strict=False):
        pairs = zip(stretch.forward, stretch.backward, strict=True)
        table.add_row(name, *(f"{_ms(forward)}\n{_ms(backward)}" for forward, backward in pairs), _ms(stretch.step))
    return table


def _sizes(measured: Profile) -> Table:
    """Return the bytes of each stretch."""
    table = _table("weights in all, the rest for each sample", ("weights", "saved", "up", "down"))
    table.caption = "saved for the backward pass, up and down at the cut"
    crossing = [*zip(measured.up, measured.down, strict=True), ()]
    for name, stretch, ways in zip(_names(measured), measured.stretches, crossing, strict=False):
        table.add_row(name, *map(_bytes, (stretch.weights, stretch.saved, *ways)))
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    """Return a table of stretches, still without rows."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("up to", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _names(measured: Profile) -> tuple[str, ...]:
    return *measured.cuts, "loss"


def _ms(seconds: float) -> str:
    """Return milliseconds in 5 cells: `0.036`, `12.3`, `1,234`; what is below a microsecond is noise."""
    return f"{1000 * seconds:.3f}" if seconds < 9.995e-4 else _short(1000 * seconds)


def _short(value: float) -> str:
    """Return a figure with three digits, or all before the point."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def _bytes(count: float) -> str:
    return scaled(count, "B")
