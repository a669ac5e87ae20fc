"""What to make of a link that was measured: an unstable one is taken at its slower end."""

from typing import NamedTuple

from zsplit.wire.messages import LinkSpeed

MEGABIT = 125_000
"""Bytes."""

UNSTABLE_SPREAD = 0.5
"""Repeated measurements that lie further apart than this share of their median do not tell the rate."""

SLOWEST = 12_500.0
"""Bytes a second that are assumed where nothing was measured to pass: 0.1 Mbit/s."""

FASTEST = 1e11
"""Bytes a second that no link passes."""


class Assumption(NamedTuple):
    """The link that is planned with, and why it is not the measured one (empty: it is)."""

    link: LinkSpeed
    reason: str = ""


def assumed(link: LinkSpeed) -> Assumption:
    """Return what to plan with for a measured link."""
    reasons = []
    if min(link.up, link.down) < SLOWEST:
        reasons.append("measures as zero")
    if max(link.up, link.down) > FASTEST:
        reasons.append("measures as faster than any link is")
    slower = 1.0
    if link.spread > UNSTABLE_SPREAD:
        reasons.append(f"is unstable (its rate varies by {100 * link.spread:.0f} %)")
        slower += link.spread
    up, down = (min(max(rate / slower, SLOWEST), FASTEST) for rate in (link.up, link.down))
    return Assumption(LinkSpeed(up, down, link.rtt, link.spread), " and ".join(reasons))
