"""Adding up what jobs did, and the figures that follow from the sums."""

from collections.abc import Iterable, Mapping

from zsplit.wire.messages import Flow, Tally, bucket_seconds

NOTHING = Tally()


def add(tallies: Iterable[Tally]) -> Tally:
    """Return the sum of the tallies, field by field and bucket by bucket."""
    total: dict[str, float] = dict.fromkeys(("loss_sum", "seconds", "idle", "busy"), 0.0)
    counts: dict[str, int] = dict.fromkeys(("steps", "samples", "top1", "top5"), 0)
    durations: dict[int, int] = {}
    traffic: dict[str, tuple[int, int]] = {}
    raw: dict[str, tuple[int, int]] = {}
    flow = Flow()
    for tally in tallies:
        for name in total:
            total[name] += getattr(tally, name)
        for name in counts:
            counts[name] += getattr(tally, name)
        for bucket, count in tally.step_seconds.items():
            durations[bucket] = durations.get(bucket, 0) + count
        traffic, raw = add_traffic(traffic, tally.traffic), add_traffic(raw, tally.traffic_raw)
        flow = add_flow(flow, tally.flow)
    return Tally(
        steps=counts["steps"],
        samples=counts["samples"],
        loss_sum=total["loss_sum"],
        top1=counts["top1"],
        top5=counts["top5"],
        seconds=total["seconds"],
        idle=total["idle"],
        busy=total["busy"],
        flow=flow,
        step_seconds=durations,
        traffic=traffic,
        traffic_raw=raw,
    )


def add_flow(a: Flow, b: Flow) -> Flow:
    """Return two flows of one way as one."""
    return Flow(a.bytes + b.bytes, a.seconds + b.seconds, a.starts + b.starts)


def add_traffic(a: Mapping[str, tuple[int, int]], b: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Return bytes by kind, up and down, added."""
    total = dict(a)
    for kind, (up, down) in b.items():
        before = total.get(kind, (0, 0))
        total[kind] = (before[0] + up, before[1] + down)
    return total


def mean(total: float, count: int) -> float | None:
    """Return the mean, or None of nothing."""
    return total / count if count else None


def quantile(durations: Mapping[int, int], q: float) -> float | None:
    """Return the q-quantile of step durations in seconds, to the width of a bucket; None of nothing."""
    left = q * sum(durations.values())
    for bucket in sorted(durations):
        left -= durations[bucket]
        if left <= 0:
            return bucket_seconds(bucket)
    return None
