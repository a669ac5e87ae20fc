"""Which cuts and numbers of micro-batches a client may have: what limits, memory and profiles leave."""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from math import ceil
from typing import NamedTuple

from zsplit.errors import PlanError
from zsplit.plan.cost import MIB, Timetable, slices
from zsplit.plan.records import ClientSite, Limits

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
"""What is tried where the number of micro-batches is free; under BatchNorm also the most that it allows."""

NORM_SAMPLES = 16
"""Samples that a slice keeps at least where the model has BatchNorm: the statistics of fewer are too rough."""


class Choice(NamedTuple):
    """A cut, a number of micro-batches and how many of them may be in flight."""

    cut: str
    micro_batches: int
    window: int


class Options(NamedTuple):
    """What is left for a client, and for what is not the cut, the micro-batches (0: any) and the reason."""

    choices: tuple[Choice, ...]
    excluded: tuple[tuple[str, int, str], ...]


def options(site: ClientSite, client: Timetable, server: Timetable, limits: Limits) -> Options:
    """Return what a client may choose from, in the model's order.

    Raises PlanError with the limit that leaves nothing, and what to relax.
    """
    choices: list[Choice] = []
    excluded: list[tuple[str, int, str]] = []
    for cut in cuts_within(site.profile.cuts, limits):
        reason = _unmeasured(site, client, server, cut)
        if reason:
            excluded.append((cut, 0, reason))
            continue
        for micro_batches in _micro_batches(site, limits):
            window = _window(site, client, limits, cut, micro_batches)
            reason = too_large(site, client, server, micro_batches)
            if window and not reason:
                choices.append(Choice(cut, micro_batches, window))
            else:
                excluded.append((cut, micro_batches, reason or _too_much(site, client, limits, cut, micro_batches)))
    if not choices:
        raise PlanError(_nothing_left(site, client, server, limits, [cut for cut, _, _ in excluded]))
    return Options(tuple(choices), tuple(excluded))


def cuts_within(cuts: Sequence[str], limits: Limits) -> Sequence[str]:
    """Return the cuts that `cut` and `min_cut` leave. Raises PlanError where one is unknown or they contradict."""
    first = place(cuts, limits.min_cut, "plan.min_cut") if limits.min_cut else 0
    if not limits.cut:
        return cuts[first:]
    if limits.cut in ("input", "output") and limits.cut not in cuts:
        raise PlanError(
            f"model.cut = {limits.cut!r} is an end of the model, which leaves nothing to plan: name a place inside it, "
            "or set model.cut to auto"
        )
    fixed = place(cuts, limits.cut, "model.cut")
    if fixed < first:
        raise PlanError(
            f"model.cut = {cuts[fixed]!r} comes before plan.min_cut = {cuts[first]!r}, where the model may not be cut: "
            "move one of them, or set model.cut to auto"
        )
    return cuts[fixed : fixed + 1]


def place(cuts: Sequence[str], name: str, key: str) -> int:
    """Return where a cut is, by name or index; a module's name stands for its last operation.

    Raises PlanError where there is none, naming the nearest.
    """
    if name in cuts:
        return cuts.index(name)
    if name.isdecimal() and int(name) < len(cuts):
        return int(name)
    inside = [index for index, cut in enumerate(cuts) if cut.startswith(f"{name}.")]
    if inside:
        return inside[-1]
    near = get_close_matches(name, cuts, n=3, cutoff=0.0)
    raise PlanError(f"{key} = {name!r} is no cut of the model: the nearest are {', '.join(map(repr, near))}")


def _micro_batches(site: ClientSite, limits: Limits) -> Iterator[int]:
    if limits.micro_batches:
        yield limits.micro_batches
        return
    if not site.profile.batch_norm:
        yield from (count for count in MICRO_BATCHES if count <= site.batch)
        return
    most = min(max(1, site.batch // NORM_SAMPLES), max(MICRO_BATCHES))
    yield from sorted({most, *(count for count in MICRO_BATCHES if count <= most)})


def _unmeasured(site: ClientSite, client: Timetable, server: Timetable, cut: str) -> str:
    """Return what keeps the two from being measured at a cut, or nothing."""
    if cut not in server.index:
        return f"server {site.server}'s model has no such cut"
    if not client.has_front(cut):
        return f"client {site.client} ran out of memory there"
    return "" if server.has_back(cut) else f"server {site.server} ran out of memory behind it"


def _window(site: ClientSite, client: Timetable, limits: Limits, cut: str, micro_batches: int) -> int:
    """Return how many micro-batches may be in flight: as many as allowed, fewer where memory asks for it, or 0."""
    sizes = slices(site.batch, micro_batches)
    most = min(limits.window or len(sizes), len(sizes))
    if not limits.client_memory_mb:
        return most
    room = limits.client_memory_mb * MIB
    return next((n for n in range(most, 0, -1) if client.front_memory(cut, sum(sizes[:n]), limits.slots) <= room), 0)


def _least_memory(site: ClientSite, client: Timetable, limits: Limits, cut: str, micro_batches: int) -> float:
    """Return MiB that the front takes with one micro-batch in flight."""
    return client.front_memory(cut, slices(site.batch, micro_batches)[0], limits.slots) / MIB


def too_large(site: ClientSite, client: Timetable, server: Timetable, micro_batches: int) -> str:
    """Return whose memory was not enough for slices of this size, or nothing.

    A peer measures a whole mini-batch unless there is no room for it.
    """
    largest = slices(site.batch, micro_batches)[0]
    for who, timetable in ((f"client {site.client}", client), (f"server {site.server}", server)):
        if largest > max(timetable.profile.sizes):
            return f"{who} ran out of memory with slices of {largest} samples"
    return ""


def _too_much(site: ClientSite, client: Timetable, limits: Limits, cut: str, micro_batches: int) -> str:
    need = _least_memory(site, client, limits, cut, micro_batches)
    return f"takes {need:.1f} MiB at client {site.client}"


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


def _smaller_slices(limits: Limits) -> str:
    return "raise train.micro_batches, or" if limits.micro_batches else "use a smaller model, or"


def _nothing_left(
    site: ClientSite, client: Timetable, server: Timetable, limits: Limits, excluded: Sequence[str]
) -> str:
    """Return the sentence for a client that has no choice left."""
    who = f"client {site.client}"
    if not excluded:
        return f"The model has no place where it can be cut for {who}: use another model"
    measured = [cut for cut in excluded if not _unmeasured(site, client, server, cut)]
    most = max(_micro_batches(site, limits))
    if measured and too_large(site, client, server, most):
        return f"{_sentence(too_large(site, client, server, most))}: {_smaller_slices(limits)} lower train.batch_size"
    if measured:
        need, cut = min((_least_memory(site, client, limits, cut, most), cut) for cut in measured)
        return (
            f"plan.client_memory_mb = {limits.client_memory_mb:g} is too little for {who}: the smallest front, up to "
            f"{cut!r}, takes {need:.1f} MiB; set at least {ceil(need)}, or lower train.batch_size"
        )
    reasons = [_unmeasured(site, client, server, cut) for cut in excluded]
    memory = next((reason for reason in reasons if "memory" in reason), "")
    if not memory:
        return f"{_sentence(who)} and server {site.server} have no cut in common: give both the same model"
    relax = "an earlier model.cut or plan.min_cut" if limits.cut or limits.min_cut else "a smaller model"
    culprit = memory.partition(" ran ")[0]
    return (
        f"{_sentence(culprit)} ran out of memory at every cut that is allowed: lower train.batch_size, or use {relax}"
    )
