"""The search for the fastest plan: every cut and number of micro-batches that the limits allow, simulated."""

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from math import inf, isclose

from zsplit.errors import PlanError
from zsplit.plan.cost import Timetable
from zsplit.plan.crowd import Crowd, Score, Seat
from zsplit.plan.options import Choice
from zsplit.plan.records import Candidate, Decision, Forecast, Limits, ServerSite, Situation
from zsplit.plan.words import notes_on
from zsplit.wire.messages import Plan

SIMPLER = 0.02
"""A plan with fewer micro-batches is taken where it is slower by no more than this share."""

ALIKE = 0.1
"""Clients whose speeds and links differ by no more than this share are given the same plan."""

KINDS = 4
"""How many kinds of clients are told apart in a crowd; where there are more, what counts as alike is widened."""

ALIKE_SECONDS = 1e-3
"""Round trips that differ by no more than this are alike."""

PASSES = 4
"""How often each kind of client may answer to what the others chose."""


def decide(situation: Situation, full: bool = False) -> Decision:
    """Return the fastest plan for every client, with its predicted step time.

    Under `parallel` the slowest client's round counts, then the sum of all; under `round_robin` each client's own.
    A plan with fewer micro-batches wins where it is at most 2 % slower. `full` simulates also what cannot win, for a
    complete ranking; the plans are the same. Raises PlanError where the limits leave a client nothing.
    """
    crowds = _crowds(situation)
    plans: dict[int, Plan] = {}
    predicted: dict[int, float] = {}
    ranking: list[Candidate] = []
    for crowd in crowds:
        choices, candidates = _Search(crowd, full).run()
        forecasts = crowd.forecasts(choices)
        for seat, choice in zip(crowd.seats, choices, strict=True):
            plans[seat.site.client] = _plan(choice, situation.limits)
            predicted[seat.site.client] = forecasts[seat.site.client].step_seconds
        ranking += candidates
    return Decision(
        dict(sorted(plans.items())), dict(sorted(predicted.items())), tuple(ranking), tuple(notes_on(situation))
    )


def evaluate(situation: Situation, plans: Mapping[int, Plan]) -> dict[int, Forecast]:
    """Return what the given plans lead to. Raises PlanError for a client without a plan, and for a cut that is none."""
    forecasts: dict[int, Forecast] = {}
    for crowd in _crowds(situation):
        forecasts |= crowd.forecasts([_choice(seat, plans) for seat in crowd.seats])
    return {client: forecasts[client] for client in sorted(forecasts)}


def improve(situation: Situation, current: Mapping[int, Plan], gain: float) -> Decision | None:
    """Return a better plan than the current one where it saves at least the share `gain` of the round, else None."""
    decision = decide(situation)
    now, then = (_round_seconds(situation, plans) for plans in (current, decision.plans))
    return decision if then <= now * (1 - gain) and then < now else None


def _round_seconds(situation: Situation, plans: Mapping[int, Plan]) -> float:
    """Return what a round takes: its slowest client's time, or in turn the sum of all."""
    forecasts = evaluate(situation, plans)
    rounds = [site.steps * forecasts[site.client].step_seconds for site in situation.clients]
    return max(rounds) if situation.policy == "parallel" else sum(rounds)


class _Search:
    """Coordinate descent over kinds of clients: each takes its best choice given what the others have."""

    def __init__(self, crowd: Crowd, full: bool) -> None:
        self.crowd = crowd
        self.full = full
        self.kinds = _kinds(crowd.seats)

    def run(self) -> tuple[list[Choice], list[Candidate]]:
        """Return the choice of each seat, and the candidates of each kind, the chosen one first."""
        choices = self._start()
        for _ in range(PASSES):
            before = choices
            for kind in self.kinds:
                choices = _with(choices, kind, self._scored(choices, kind)[0][1])
            if choices == before:
                break
        best = self.crowd.score(choices)
        assert best is not None
        for kind in self.kinds:
            choices = self._simplest(choices, kind, best)
        return choices, [candidate for kind in self.kinds for candidate in self._ranking(choices, kind)]

    def _start(self) -> list[Choice]:
        """Return each kind's best where it has the server's share for itself."""
        choices = [seat.options.choices[0] for seat in self.crowd.seats]
        for kind in self.kinds:
            seat = self.crowd.seats[kind[0]]
            fastest = min(seat.options.choices, key=lambda choice: seat.alone(choice, len(self.crowd.seats)))
            choices = _with(choices, kind, fastest)
        return choices

    def _scored(
        self, choices: Sequence[Choice], kind: Sequence[int], enough: float = 0.0
    ) -> list[tuple[Score, Choice]]:
        """Return a kind's choices with their scores, best first, the others keeping theirs.

        What is slower than the best and than `enough`, by more than `_simplest` allows, may be missing.
        """
        options = self.crowd.seats[kind[0]].options.choices
        tried = [(_with(choices, kind, option), option) for option in options]
        scored: list[tuple[Score, Choice]] = []
        limit = inf
        for each, option in sorted(tried, key=lambda pair: self.crowd.estimate(pair[0])):
            score = self.crowd.score(each, limit)
            if score is not None:
                scored.append((score, option))
                limit = limit if self.full else min(limit, max(score.slowest, enough) * (1 + 2 * SIMPLER))
        return sorted(scored, key=lambda pair: (pair[0], pair[1].micro_batches, options.index(pair[1])))

    def _simplest(self, choices: Sequence[Choice], kind: Sequence[int], best: Score) -> list[Choice]:
        """Give a kind the fewest micro-batches with which all is still about as fast as the best."""
        close = [pair for pair in self._scored(choices, kind, best.slowest) if pair[0].within(best, SIMPLER)]
        _, simplest = min(close, key=lambda pair: pair[1].micro_batches)
        return _with(choices, kind, simplest)

    def _ranking(self, choices: Sequence[Choice], kind: Sequence[int]) -> Iterator[Candidate]:
        """Yield the candidates of a kind: the chosen one, the others, best first, and what was excluded."""
        seats = [self.crowd.seats[index] for index in kind]
        clients = tuple(seat.site.client for seat in seats)
        options = [option for _, option in self._scored(choices, kind)]
        for option in sorted(options, key=lambda option: option != choices[kind[0]]):
            forecasts = self.crowd.forecasts(_with(choices, kind, option))
            own = {client: forecasts[client] for client in clients}
            yield Candidate(clients, option.cut, option.micro_batches, own)
        for cut, micro_batches, reason in seats[0].options.excluded:
            yield Candidate(clients, cut, micro_batches, excluded=reason)


def _with(choices: Sequence[Choice], kind: Sequence[int], choice: Choice) -> list[Choice]:
    """Return the choices with one for all clients of a kind."""
    return [choice if seat in kind else each for seat, each in enumerate(choices)]


def _kinds(seats: Sequence[Seat]) -> list[list[int]]:
    """Return which seats are so alike that they are given the same plan."""
    share = ALIKE
    kinds = _grouped(seats, share)
    while len(kinds) > KINDS and share < 1:
        share *= 2
        kinds = _grouped(seats, share)
    return kinds


def _grouped(seats: Sequence[Seat], share: float) -> list[list[int]]:
    kinds: list[list[int]] = []
    for index, seat in enumerate(seats):
        kind = next((kind for kind in kinds if _alike(seats[kind[0]], seat, share)), None)
        if kind is None:
            kinds.append([index])
        else:
            kind.append(index)
    return kinds


def _alike(one: Seat, other: Seat, share: float) -> bool:
    links = one.assumption.link, other.assumption.link
    return (
        _same(one) == _same(other)
        and all(isclose(a, b, rel_tol=share) for a, b in zip(one.speeds(), other.speeds(), strict=True))
        and isclose(links[0].rtt, links[1].rtt, rel_tol=share, abs_tol=ALIKE_SECONDS)
    )


def _same(seat: Seat) -> tuple[object, ...]:
    """Return what is the same for clients that are alike."""
    site = seat.site
    machine = site.machine.cores, site.machine.threads, site.machine.device
    return site.server, machine, site.steps, site.batch, seat.options.choices


def _crowds(situation: Situation) -> list[Crowd]:
    """Return the clients that are simulated together: those at one server or host at once, or each on its own."""
    servers = {site.server: site for site in situation.servers}
    timetables = {number: Timetable(site.profile) for number, site in servers.items()}
    for site in situation.clients:
        if site.server not in servers:
            raise PlanError(
                f"Client {site.client} is to be planned on server {site.server}, which was not measured: "
                "measure it, or plan with another"
            )
    seats = [Seat(site, timetables[site.server], situation.limits) for site in situation.clients]
    groups = [[seat] for seat in seats] if situation.policy == "round_robin" else _entangled(seats, servers)
    return [Crowd(group, [servers[n] for n in sorted({seat.site.server for seat in group})]) for group in groups]


def _entangled(seats: Sequence[Seat], servers: Mapping[int, ServerSite]) -> list[list[Seat]]:
    """Return the seats in groups that share neither a server nor a host."""
    groups: list[tuple[set[object], list[Seat]]] = []
    for seat in seats:
        hosts = {seat.site.machine.host, servers[seat.site.server].machine.host} - {""}
        touches: set[object] = {seat.site.server, *hosts}
        members = [seat]
        for group in [group for group in groups if group[0] & touches]:
            groups.remove(group)
            touches |= group[0]
            members = group[1] + members
        groups.append((touches, members))
    return [members for _, members in groups]


def _choice(seat: Seat, plans: Mapping[int, Plan]) -> Choice:
    """Return a given plan as a choice. Raises PlanError where there is none, or its cut was not measured."""
    site, plan = seat.site, plans.get(seat.site.client)
    if plan is None:
        raise PlanError(f"The plan has nothing for client {site.client}: plan again, or use one for all clients")
    for who, timetable in ((f"client {site.client}", seat.timetable), (f"server {site.server}", seat.server)):
        if plan.cut not in timetable.index:
            near = get_close_matches(plan.cut, timetable.index, n=3, cutoff=0.0)
            raise PlanError(
                f"The plan of client {site.client} cuts at {plan.cut!r}, which the model of {who} does not have: "
                f"the nearest are {', '.join(map(repr, near))}"
            )
    if not (seat.timetable.has_front(plan.cut) and seat.server.has_back(plan.cut)):
        raise PlanError(
            f"The plan of client {site.client} cuts at {plan.cut!r}, for which the memory of client {site.client} or "
            f"server {site.server} was not enough when it measured itself: plan again"
        )
    return Choice(plan.cut, plan.micro_batches, plan.window)


def _plan(choice: Choice, limits: Limits) -> Plan:
    return Plan(choice.cut, choice.micro_batches, choice.window, limits.up, limits.down)
