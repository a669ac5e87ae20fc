"""The search for the fastest plan: every cut and number of micro-batches that the limits allow, simulated."""

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from math import inf
from operator import contains

from zsplit.errors import PlanError
from zsplit.plan.cost import Timetable
from zsplit.plan.crowd import Crowd, Score, Seat
from zsplit.plan.kinds import ALIKE, Rough, kinds_of
from zsplit.plan.options import Choice, too_large
from zsplit.plan.records import Candidate, Decision, Forecast, Limits, ServerSite, Situation
from zsplit.plan.words import notes_on
from zsplit.wire.messages import Plan

SIMPLER = 0.02
"""A plan with fewer micro-batches is taken where it is slower by no more than this share."""

PASSES = 4
"""How often each kind of client may answer to what the others chose."""

LITTLE = 0.002
"""A pass over all kinds that gains no more than this share is the last."""

PATIENCE = 12
"""Choices of a kind that are simulated in a row and gain nothing before the others are left out."""

EFFORT, EFFORT_EACH = 60_000, 200
"""Micro-batches that are simulated for a crowd in one pass, and those for each of its clients on top; a machine takes
some microseconds for each."""


def decide(situation: Situation, full: bool = False) -> Decision:
    """Return the fastest plan for every client, with its predicted step time.

    Under `parallel` the slowest client's round counts, then the sum of all; under `round_robin` each client's own.
    A plan with fewer micro-batches wins where it is at most 2 % slower. `full` simulates everything, for a complete
    ranking; otherwise what does not look promising is left out. Raises PlanError where the limits leave a client
    nothing.
    """
    return _decided(situation, full, {})


def _decided(situation: Situation, full: bool, current: Mapping[int, Choice]) -> Decision:
    crowds = crowds_of(situation)
    plans: dict[int, Plan] = {}
    predicted: dict[int, float] = {}
    ranking: list[Candidate] = []
    for crowd in crowds:
        known = [current[seat.site.client] for seat in crowd.seats] if current else None
        choices, candidates = Search(crowd, full, known).run()
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
    for crowd in crowds_of(situation):
        forecasts |= crowd.forecasts([_choice(seat, plans) for seat in crowd.seats])
    return {client: forecasts[client] for client in sorted(forecasts)}


def improve(situation: Situation, current: Mapping[int, Plan], gain: float) -> Decision | None:
    """Return a better plan than the current one where it saves at least the share `gain` of the round, else None."""
    choices = {client: Choice(plan.cut, plan.micro_batches, plan.window) for client, plan in current.items()}
    decision = _decided(situation, False, choices)
    now, then = (_round_seconds(situation, plans) for plans in (current, decision.plans))
    return decision if then <= now * (1 - gain) and then < now else None


def _round_seconds(situation: Situation, plans: Mapping[int, Plan]) -> float:
    """Return what a round takes: its slowest client's time, or in turn the sum of all."""
    forecasts = evaluate(situation, plans)
    own = [(site, forecasts[site.client]) for site in situation.clients]
    rounds = [site.steps * each.step_seconds + site.turns * each.turn_seconds for site, each in own]
    return max(rounds) if situation.policy == "parallel" else sum(rounds)


class Search:
    """Coordinate descent over kinds of clients: each takes its best choice given what the others have.

    A kind's choices are simulated in the order of a rough estimate, as long as that gains anything and not too much
    has been simulated; with `full` all of them are. It may begin with `current`, the choices of the plan so far.
    """

    def __init__(self, crowd: Crowd, full: bool = False, current: Sequence[Choice] | None = None) -> None:
        self.crowd = crowd
        self.full = full
        self.current = current
        self.kinds = kinds_of(crowd.seats)
        self.rough = Rough(crowd, self.kinds)
        self._allowed = (EFFORT + EFFORT_EACH * len(crowd.seats)) // len(self.kinds)

    def run(self) -> tuple[list[Choice], list[Candidate]]:
        """Return the choice of each seat, and the candidates of each kind, the chosen one first."""
        picks = self._start()
        best = self._score(picks)
        for _ in range(PASSES):
            before = best
            for kind in range(len(picks)):
                picks, best = self._improved(picks, kind, best)
            if best == before or (not self.full and before.within(best, LITTLE)):
                break
        for kind in range(len(picks)):
            picks = self._simplest(picks, kind, best)
        return self._seated(picks), [each for kind in range(len(picks)) for each in self._ranking(picks, kind)]

    def _start(self) -> list[Choice]:
        """Return what is best to begin with: what looks best, alone or together, and the current choices."""
        starts = [self.rough.together(), self.rough.alone()]
        if self.current is not None:
            current = [self.current[kind[0]] for kind in self.kinds]
            starts += [current] * all(map(contains, self.rough.options, current))
        return min(starts, key=self._score)

    def _seated(self, picks: Sequence[Choice]) -> list[Choice]:
        """Return each seat's choice where each kind has picked one."""
        choices = {seat: pick for kind, pick in zip(self.kinds, picks, strict=True) for seat in kind}
        return [choices[seat] for seat in range(len(choices))]

    def _score(self, picks: Sequence[Choice]) -> Score:
        score = self.crowd.score(self._seated(picks))
        assert score is not None
        return score

    def _hopeful(self, picks: Sequence[Choice], kind: int, best: Score) -> list[Choice]:
        """Return a kind's choices that may be as good as the best, the most promising first."""
        return self.rough.order(picks, kind, inf if self.full else best.slowest * (1 + ALIKE))

    def _improved(self, picks: Sequence[Choice], kind: int, best: Score) -> tuple[list[Choice], Score]:
        """Return the picks with a kind's best, and their score; `best` is that of the picks."""
        found = list(picks)
        until, vain = self.crowd.effort + self._allowed, 0
        for option in self._hopeful(picks, kind, best):
            if not self.full and (vain == PATIENCE or self.crowd.effort >= until):
                break
            tried, before = _with(picks, kind, option), self.crowd.effort
            score = self.crowd.score(self._seated(tried), best.slowest)
            vain = vain + (self.crowd.effort > before) if score is None or score.within(best, 0.0) else 0
            if score is not None and score < best:
                found, best = tried, score
        return found, best

    def _simplest(self, picks: Sequence[Choice], kind: int, best: Score) -> list[Choice]:
        """Give a kind the fewest micro-batches with which all is still about as fast as the best."""
        order = self._hopeful(picks, kind, best)
        until = self.crowd.effort + self._allowed
        for micro_batches in sorted({option.micro_batches for option in order}):
            close: list[tuple[Score, list[Choice]]] = []
            for option in (option for option in order if option.micro_batches == micro_batches):
                if micro_batches == picks[kind].micro_batches and not self.full:
                    return list(picks)
                if not self.full and self.crowd.effort >= until:
                    break
                tried = _with(picks, kind, option)
                score = self.crowd.score(self._seated(tried), best.slowest * (1 + SIMPLER))
                if score is not None and score.within(best, SIMPLER):
                    close.append((score, tried))
            if close:
                return min(close)[1]
        return list(picks)

    def _ranking(self, picks: Sequence[Choice], kind: int) -> Iterator[Candidate]:
        """Yield the candidates of a kind: the chosen one, the others, best first, and what was excluded."""
        seats = [self.crowd.seats[index] for index in self.kinds[kind]]
        clients = tuple(seat.site.client for seat in seats)
        ranked = []
        for option in self.rough.options[kind]:
            tried = self._seated(_with(picks, kind, option))
            if self.full or self.crowd.knows(tried):
                ranked.append((option != picks[kind], self.crowd.score(tried), option.micro_batches, option))
        for *_, option in sorted(ranked, key=lambda each: each[:3]):
            forecasts = self.crowd.forecasts(self._seated(_with(picks, kind, option)))
            own = {client: forecasts[client] for client in clients}
            yield Candidate(clients, option.cut, option.micro_batches, own)
        for cut, micro_batches, reason in seats[0].options.excluded:
            yield Candidate(clients, cut, micro_batches, excluded=reason)


def _with(picks: Sequence[Choice], kind: int, pick: Choice) -> list[Choice]:
    """Return the picks with another one for a kind."""
    return [pick if each == kind else other for each, other in enumerate(picks)]


def crowds_of(situation: Situation) -> list[Crowd]:
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
    reason = too_large(site, seat.timetable, seat.server, plan.micro_batches)
    if reason:
        raise PlanError(
            f"The plan of client {site.client} has M = {plan.micro_batches}, but {reason} when it measured itself: "
            "plan again, or with more micro-batches"
        )
    return Choice(plan.cut, plan.micro_batches, plan.window)


def _plan(choice: Choice, limits: Limits) -> Plan:
    return Plan(choice.cut, choice.micro_batches, choice.window, limits.up, limits.down)
