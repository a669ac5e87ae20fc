"""What a round says about the speeds and links that its plan was made with, and whether they have moved. Pure."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from msgspec.structs import replace

from zsplit.plan import ClientSite, ServerSite, Situation
from zsplit.plan.cost import Timetable, pace
from zsplit.plan.crowd import shared_cores
from zsplit.wire.messages import Flow, LinkSpeed, Plan, Profile, Stretch
from zsplit_broker.books import RoundBook

LEAST_BYTES = 2**18
"""Bytes that have to come one way in a round before they say how fast it is."""

LEAST_SHARE = 1 / 3
"""Share of their time on the way that has to be left without the delay, for the same."""

LEAST_STEPS = 4
"""Steps of a round before their duration says how fast a peer computes: the first one warms up."""

ANY_LINK = LinkSpeed(up=1.0, down=1.0, rtt=0.0)
"""Stands for a link where only what is computed counts."""

Site = TypeVar("Site", ClientSite, ServerSite)


def observed(situation: Situation, plans: Mapping[int, Plan], book: RoundBook) -> Situation:
    """Return the situation with the speeds and links that a round had in the place of those it was expected to have.

    What a round says too little about stays as it was.
    """
    factors = _factors(situation, plans, book)
    return replace(
        situation,
        clients=tuple(
            replace(
                site,
                profile=slowed(site.profile, factors.get(("client", site.client), 1.0)),
                link=_observed_link(site, book),
            )
            for site in situation.clients
        ),
        servers=tuple(
            replace(site, profile=slowed(site.profile, factors.get(("server", site.server), 1.0)))
            for site in situation.servers
        ),
    )


# Speeds


def _factors(situation: Situation, plans: Mapping[int, Plan], book: RoundBook) -> dict[tuple[str, int], float]:
    """Return for each peer how many times as long as expected it computed.

    Peers that share too few cores are left out: what they show as computing, the planner counts as waiting for a core.
    """
    servers = {site.server: Timetable(_silent(site.profile)) for site in situation.servers}
    spent: defaultdict[tuple[str, int], float] = defaultdict(float)
    expected: defaultdict[tuple[str, int], float] = defaultdict(float)
    for site in situation.clients:
        own, back, plan = book.clients.get(site.client), book.backs.get(site.client), plans[site.client]
        if own is None or back is None or own.steps < LEAST_STEPS:
            continue
        times = Timetable(_silent(site.profile)), servers[site.server]
        step = pace(*times, ANY_LINK, site.batch, plan.cut, plan.micro_batches, plan.window)
        full = own.samples / site.batch  # an epoch's last batch is shorter
        spent["client", site.client] += own.busy
        expected["client", site.client] += full * step.client_busy
        spent["server", site.server] += back.busy
        expected["server", site.server] += full * step.server_busy
    crowded = _crowded(situation)
    return {peer: ratio(spent[peer], expected[peer]) for peer in spent if peer not in crowded}


def _crowded(situation: Situation) -> set[tuple[str, int]]:
    """Return the peers whose hosts have fewer cores than those that train at the same time ask for."""
    crowded: set[tuple[str, int]] = set()
    for clients, servers in situation.at_once():
        peers = {("client", site.client): site.machine for site in clients}
        peers |= {("server", site.server): site.machine for site in servers}
        cores, _ = shared_cores(list(peers.values()))
        crowded |= {peer for peer, place in zip(peers, cores, strict=True) if place.pool >= 0}
    return crowded


def slowed(profile: Profile, factor: float) -> Profile:
    """Return the profile with all its seconds times a factor."""
    return replace(
        profile,
        stretches=tuple(_slowed(stretch, factor) for stretch in profile.stretches),
        batch_seconds=profile.batch_seconds * factor,
        encode=tuple(seconds * factor for seconds in profile.encode),
        decode=tuple(seconds * factor for seconds in profile.decode),
        message_seconds=profile.message_seconds * factor,
    )


def _slowed(stretch: Stretch, factor: float) -> Stretch:
    return replace(
        stretch,
        forward=tuple(seconds * factor for seconds in stretch.forward),
        backward=tuple(seconds * factor for seconds in stretch.backward),
        step=stretch.step * factor,
    )


def _silent(profile: Profile) -> Profile:
    """Return the profile without what messages cost: a tally counts as busy what the trainer computes."""
    return replace(profile, message_seconds=0.0, encode=(), decode=())


def ratio(one: float, other: float) -> float:
    """Return one of two amounts as a multiple of the other, 1 where there is nothing to compare."""
    return one / other if one and other else 1.0


# Links


def _observed_link(site: ClientSite, book: RoundBook) -> LinkSpeed:
    own, back = book.clients.get(site.client), book.backs.get(site.client)
    up = rate(back.flow, site.link.rtt) if back else None
    down = rate(own.flow, site.link.rtt) if own else None
    return replace(site.link, up=up or site.link.up, down=down or site.link.down)


def rate(flow: Flow, rtt: float) -> float | None:
    """Return the bytes a second of one way, None where its messages were too few or mostly delay."""
    seconds = flow.seconds - flow.starts * rtt / 2
    if flow.bytes < LEAST_BYTES or seconds <= flow.seconds * LEAST_SHARE:
        return None
    return flow.bytes / seconds


# What moved


def moved(before: Situation, now: Situation, predicted: Mapping[int, float], gain: float) -> dict[int, str]:
    """Return, for each client with something about it that moved by a share of more than `gain`, what that is.

    Times that all stay within that share leave the step of every plan within it, so that no other plan can gain more.
    """
    servers = {new.server: f"server {new.server} {word}" for new, word in _speeds(before.servers, now.servers, gain)}
    own = {new.client: f"it {word}" for new, word in _speeds(before.clients, now.clients, gain)}
    why: dict[int, str] = {}
    for old, new in zip(before.clients, now.clients, strict=True):
        words = list(_ways(old, new, gain, predicted.get(old.client, 0.0)))
        words += [text for text in (own.get(new.client), servers.get(new.server)) if text]
        if words:
            why[new.client] = ", ".join(words)
    return why


def _speeds(before: Iterable[Site], now: Iterable[Site], gain: float) -> Iterator[tuple[Site, str]]:
    """Yield the peers that compute faster or slower than before, and the words for it."""
    for old, new in zip(before, now, strict=True):
        factor = ratio(_seconds(new.profile), _seconds(old.profile))
        if max(factor, 1 / factor) > 1 + gain:
            yield new, f"computes {factor:.2g} times as long"


def _seconds(profile: Profile) -> float:
    return sum(stretch.forward[-1] + stretch.backward[-1] for stretch in profile.stretches)


def _ways(old: ClientSite, new: ClientSite, gain: float, step: float) -> Iterator[str]:
    """Yield the words for a way that became faster or slower, where that can matter in a step of so many seconds."""
    for way, was, now, widest in (
        ("uplink", old.link.up, new.link.up, max(new.profile.up)),
        ("downlink", old.link.down, new.link.down, max(new.profile.down)),
    ):
        slow, fast = sorted((was, now))
        if fast > slow * (1 + gain) and widest * new.batch * (fast - slow) > gain * step * slow * fast:
            yield f"the {way} {'fell' if now < was else 'rose'} to {now * 8e-6:.3g} Mbit/s"
