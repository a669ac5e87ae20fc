"""What the planner says: what to know about the numbers it was given, and why the best plan is best."""

from collections.abc import Iterator, Sequence

from zsplit.plan.crowd import shared_cores
from zsplit.plan.links import MEGABIT, assumed
from zsplit.plan.records import Candidate, ClientSite, Decision, Forecast, Situation
from zsplit.wire.messages import Profile

BUSY = {
    "client": "the client computes for {busy} of them",
    "uplink": "the uplink is busy for {busy} of them",
    "server": "the server computes for {busy} of them",
    "downlink": "the downlink is busy for {busy} of them",
    "cores": "the cores that client and server share limit it",
}


def notes_on(situation: Situation) -> Iterator[str]:
    """Yield a sentence for each thing that a plan had to get around."""
    for client in situation.clients:
        yield from _on_memory(f"Client {client.client}", client.profile)
        yield from _on_link(client)
    for server in situation.servers:
        yield from _on_memory(f"Server {server.server}", server.profile)
    yield from _on_cores(situation)


def explain(decision: Decision) -> list[str]:
    """Return why the plan is what it is: one or two sentences for all clients that have the same."""
    kinds = decision.alike()
    return [_because(decision, kind, len(kinds) > 1) for kind in kinds]


def spelled(clients: Sequence[int]) -> str:
    """Return clients as words.

    >>> spelled([0, 1, 2, 5])
    'clients 0 to 2, 5'
    """
    runs: list[list[int]] = []
    for client in sorted(clients):
        if runs and client == runs[-1][1] + 1:
            runs[-1][1] = client
        else:
            runs.append([client, client])
    parts = [f"{first}" if first == last else f"{first} to {last}" for first, last in runs]
    return f"client{'s' * (len(clients) > 1)} {', '.join(parts)}"


def milliseconds(seconds: float) -> str:
    """Return a duration in ms with three digits or so."""
    return f"{1000 * seconds:,.0f} ms" if seconds >= 0.1 else f"{1000 * seconds:.3g} ms"


def _on_memory(who: str, profile: Profile) -> Iterator[str]:
    missing = profile.cuts[len(profile.stretches) :]
    if missing:
        yield f"{who} ran out of memory on the way to {missing[0]!r}, so no cut from there on is planned"
    elif profile.note:
        largest = max(profile.sizes, default=0)
        yield f"{who}: {profile.note.rstrip('.')}; slices have {largest} samples at most"


def _on_link(site: ClientSite) -> Iterator[str]:
    link, reason = assumed(site.link)
    if reason:
        up, down = (f"{rate / MEGABIT:.3g}" for rate in (link.up, link.down))
        yield f"Client {site.client}'s link {reason}: planned with {up} Mbit/s up and {down} Mbit/s down"


def _on_cores(situation: Situation) -> Iterator[str]:
    clients, servers = situation.clients, situation.servers
    cores, pools = shared_cores([*(site.machine for site in clients), *(site.machine for site in servers)])
    for pool, size in enumerate(pools):
        crowded = [site.client for site, own in zip(clients, cores, strict=False) if own.pool == pool]
        theirs = [site.server for site, own in zip(servers, cores[len(clients) :], strict=True) if own.pool == pool]
        if crowded and theirs:
            on_cpu = any(site.machine.device == "cpu" for site in clients if site.client in crowded)
            what = f"{size} core{'s' * (size > 1)}" if on_cpu else "a GPU"
            yield (
                f"{spelled(crowded).capitalize()} and server {', '.join(map(str, theirs))} share {what} of one host, "
                "which are too few for all at once: micro-batches gain less"
            )


def _because(decision: Decision, clients: Sequence[int], named: bool) -> str:
    tried = [each for each in decision.candidates(clients) if each.forecasts]
    chosen, own = tried[0], tried[0].slowest
    others = [each for each in tried[1:] if each.slowest.step_seconds >= own.step_seconds]
    same = [each for each in others if each.cut == chosen.cut]
    rest = [each for each in others if each.cut != chosen.cut]
    sentences = [
        f"{spelled(clients).capitalize()}: a" if named else "A",
        f"cut after {chosen.cut!r} with M = {chosen.micro_batches} takes {milliseconds(own.step_seconds)} a step, and "
        f"{_busy(own)}.",
        *(_instead(f"M = {each.micro_batches} there", each, own) for each in _telling(same, chosen)),
        *(_instead(f"The next best cut, {each.cut!r} with M = {each.micro_batches},", each, own) for each in rest[:1]),
    ]
    return " ".join(sentences)


def _telling(same: Sequence[Candidate], chosen: Candidate) -> list[Candidate]:
    """Return the one at the same cut that tells most: a whole mini-batch at once, else the next best."""
    whole = [each for each in same if each.micro_batches == 1]
    return list(whole if chosen.micro_batches > 1 and whole else same)[:1]


def _instead(what: str, other: Candidate, own: Forecast) -> str:
    forecast = other.slowest
    ratio = forecast.step_seconds / own.step_seconds
    times = f", {ratio:.2f} times as long" if ratio >= 1.005 else ""
    return f"{what} would take {milliseconds(forecast.step_seconds)}{times}, where {_busy(forecast)}."


def _busy(forecast: Forecast) -> str:
    busy = {
        "client": forecast.client_busy,
        "uplink": forecast.uplink_busy,
        "server": forecast.server_busy,
        "downlink": forecast.downlink_busy,
    }.get(forecast.bottleneck, 0.0)
    return BUSY[forecast.bottleneck].format(busy=milliseconds(busy))
