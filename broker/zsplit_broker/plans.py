"""What the clients are told to use: as it is configured, as it was planned, or as an earlier run planned it."""

from collections.abc import Mapping

from zsplit.config import Config, cut_of
from zsplit.plan import Situation
from zsplit.wire.messages import Plan, Prepared
from zsplit_broker import drift, planning
from zsplit_broker.books import RoundBook
from zsplit_broker.events import Decide, Joined, Planned
from zsplit_broker.survey import Survey, plans_itself
from zsplit_broker.work import Peer


class Plans:
    """The plans of a run. `peers` is the scheduler's, which goes on changing.

    `made` are all that were ever made, with the round from which they hold; `current` those of this round, by client,
    and `predicted` their step seconds. `deciding` is the question that is not answered yet, `situation` what the latest
    question was about.
    """

    def __init__(self, config: Config, peers: Mapping[Peer, Joined]) -> None:
        self.config = config
        self.made: list[Planned] = []
        self.current: dict[int, Plan] = {}
        self.predicted: dict[int, float] = {}
        self.deciding: Decide | None = None
        self.situation: Situation | None = None
        self._peers = peers

    def of(self, client: int, round_: int | None = None) -> Plan:
        """Return what a client is told to use: now, or for what belongs to a round that is over."""
        made = None if round_ is None else self._for(round_)
        return (made.plans if made else self.current).get(client) or self.configured(client)

    def in_use(self) -> dict[int, Plan]:
        """Return each client's plan; none where the planner has not chosen yet."""
        if not self.current and plans_itself(self.config):
            return {}
        beyond = {index for role, index in self._peers if role == "client"}
        return {client: self.of(client) for client in sorted({*range(self.config.schedule.clients), *beyond})}

    @property
    def cut(self) -> str:
        """Where the model is cut, for a person: every place that a client has, `auto` before there is a plan.

        Nothing before the first server, where the model's own place is meant.
        """
        places = dict.fromkeys(plan.cut for plan in self.in_use().values())
        return ", ".join(places) if places else "auto"

    def configured(self, client: int) -> Plan:
        """Return what the config says; the cut by the name that the client knows it by, or else the first server."""
        told = self._prepared(client)
        cut = told.cut if told else str(cut_of(self.config, client))
        tail = told.tail if told else ""
        micros = self.config.train.micro_batches
        micros = micros if isinstance(micros, int) else 1
        codec = self.config.codec
        window = self.config.plan.window or micros
        return Plan(cut=cut, micro_batches=micros, window=window, up=codec.up, down=codec.down, tail=tail)

    def _prepared(self, client: int) -> Prepared | None:
        """Return what the client said when it joined, or else the first server; None before both."""
        peers = sorted(peer for peer in self._peers if peer == ("client", client) or peer[0] == "server")
        return self._peers[peers[0]].prepared if peers else None

    def ask(self, survey: Survey, round_: int, steps: Mapping[int, int]) -> Decide:
        """Ask for the first plan. `steps` is the number of steps of each client in a round."""
        told = self._prepared(0)
        limits = planning.limits_of(self.config, self.configured(0), told.earliest if told else "")
        self.situation = planning.situation_of(self.config, self._peers, survey, limits, steps)
        fixed = {} if plans_itself(self.config) else {client: self.configured(client) for client in steps}
        self.deciding = Decide(round_, self.situation, fixed)
        return self.deciding

    def reconsider(self, round_: int, book: RoundBook) -> Decide | None:
        """Ask for other plans from a round on where the one before went otherwise than these were made for."""
        if self.situation is None or not plans_itself(self.config):
            return None
        gain = self.config.plan.gain
        seen = drift.observed(self.situation, self.current, book)
        why = drift.moved(self.situation, seen, self.predicted, gain)
        if not why:
            return None
        self.situation = seen
        self.deciding = Decide(round_, seen, self.current, gain, why)
        return self.deciding

    def take(self, event: Planned, round_: int) -> None:
        """Take plans in, in the middle of a round or before the first."""
        if event.plans:
            self.made = [*self.before(event.round), event]
        self.deciding = None
        self.use(round_)

    def before(self, round_: int) -> list[Planned]:
        """Return the plans for earlier rounds. After going back there may be later ones, from the time before."""
        return [event for event in self.made if event.round < round_]

    def use(self, round_: int) -> None:
        """Use the latest plans that are for this round or an earlier one."""
        made = self._for(round_)
        if made is not None:
            self.current, self.predicted = made.plans, made.predicted

    def _for(self, round_: int) -> Planned | None:
        """Return the plans that hold in a round, or None before the first."""
        return next((event for event in reversed(self.made) if event.round <= round_), None)
