"""What the planner says: what to know about the numbers it was given, and why the best plan is best."""

from collections.abc import Iterator, Sequence

from zsplit.plan.crowd import shared_cores
from zsplit.plan.links import MEGABIT, assumed
from zsplit.plan.records import Candidate, ClientSite, Decision, Forecast, Machine, ServerSite, Situation
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
        yield from _on_memory(f"Client {client.client}", client.profile, client.batch)
        yield from _on_link(client)
    for server in situation.servers:
        largest = max((site.batch for site in situation.clients if site.server == server.server), default=0)
        yield from _on_memory(f"Server {server.server}", server.profile, largest)
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


def _on_memory(who: str, profile: Profile, batch: int) -> Iterator[str]:
    missing, largest = profile.cuts[len(profile.stretches) :], max(profile.sizes, default=0)
    if missing:
        yield f"{who} ran out of memory on the way to {missing[0]!r}, so no cut from there on is planned"
    elif largest < batch:
        yield f"{who} had no memory for slices of more than {largest} samples, so larger ones are not planned"


def _on_link(site: ClientSite) -> Iterator[str]:
    link, reason = assumed(site.link)
    if reason:
        up, down = (f"{rate / MEGABIT:.3g}" for rate in (link.up, link.down))
        yield f"Client {site.client}'s link {reason}: planned with {up} Mbit/s up and {down} Mbit/s down"


def _on_cores(situation: Situation) -> Iterator[str]:
    """Yield a sentence for each host on which clients and servers that compute at the same time have too few cores."""
    tight: dict[Machine, tuple[set[int], set[int]]] = {}
    for clients, servers in situation.at_once():
        sites: list[ClientSite | ServerSite] = [*clients, *servers]
        cores, pools = shared_cores([site.machine for site in sites])
        for pool, size in enumerate(pools):
            here = [site for site, place in zip(sites, cores, strict=True) if place.pool == pool]
            host = Machine(here[0].machine.host, size, 1, here[0].machine.device)
            crowded, theirs = tight.setdefault(host, (set(), set()))
            crowded |= {site.client for site in here if isinstance(site, ClientSite)}
            theirs |= {site.server for site in here if isinstance(site, ServerSite)}
    for host, (crowded, theirs) in tight.items():
        if crowded and theirs:
            what = f"{host.cores} core{'s' * (host.cores > 1)}" if host.device == "cpu" else "a GPU"
            whom = "all at once" if situation.policy == "parallel" else "a client and its server at once"
            yield (
                f"{spelled(list(crowded)).capitalize()} and server {', '.join(map(str, sorted(theirs)))} share {what} "
                f"of one host, which are too few for {whom}: micro-batches gain less"
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
        *_handed_over(own),
    ]
    return " ".join(sentences)


def _handed_over(own: Forecast) -> list[str]:
    """Say what else a round takes where that is as long as a step."""
    if own.turn_seconds < own.step_seconds:
        return []
    return [
        f"In each turn the front is on the link for another {milliseconds(own.turn_seconds)}, which was counted: "
        "a cut with a faster step and a larger front may be slower."
    ]


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
