"""The same peers on other links, more or fewer of them, or free to choose what the config had fixed."""

from collections.abc import Sequence

from msgspec.structs import replace

from zsplit.plan.links import MEGABIT
from zsplit.plan.records import ClientSite, Situation
from zsplit.wire.messages import LinkSpeed


def relinked(situation: Situation, uplink: float | None, downlink: float | None, rtt: float | None) -> Situation:
    """Return the situation with other links for all clients: rates in Mbit/s, the round trip in ms; None: as it is."""
    clients = [replace(site, link=_link(site.link, uplink, downlink, rtt)) for site in situation.clients]
    return replace(situation, clients=tuple(clients))


def _link(link: LinkSpeed, uplink: float | None, downlink: float | None, rtt: float | None) -> LinkSpeed:
    both = uplink is not None and downlink is not None
    return LinkSpeed(
        up=link.up if uplink is None else uplink * MEGABIT,
        down=link.down if downlink is None else downlink * MEGABIT,
        rtt=link.rtt if rtt is None else rtt / 1000,
        spread=0.0 if both else link.spread,
    )


def crowded(situation: Situation, clients: int) -> Situation:
    """Return the situation with so many clients: the first ones, or all and then copies of them in turn."""
    known: Sequence[ClientSite] = situation.clients
    sites = [known[index] if index < len(known) else _copy(known, index) for index in range(clients)]
    return replace(situation, clients=tuple(sites))


def _copy(known: Sequence[ClientSite], index: int) -> ClientSite:
    number = max(site.client for site in known) + 1 + index - len(known)
    return replace(known[index % len(known)], client=number)


def freed(situation: Situation) -> Situation:
    """Return the situation with cut and number of micro-batches free; what limits them stays."""
    return replace(situation, limits=replace(situation.limits, cut="", micro_batches=0))
