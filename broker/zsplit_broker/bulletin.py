"""What the broker publishes, made from what it knows: events numbered by topic, the last of each kept."""

from collections.abc import Iterator

import msgspec

from zsplit.wire.events import (
    AnyEvent,
    BrokerEvent,
    ClientEvent,
    LogEvent,
    RoundEvent,
    RunEvent,
    ServerEvent,
    encode_event,
    topic,
)
from zsplit.wire.messages import Evaluate, Held, Job, Measure, Merge, Predict, Turn
from zsplit_broker.books import RoundRecord
from zsplit_broker.events import Damaged, Draining, Event, Joined, Lost, Missed, Planned, Started, Stopped
from zsplit_broker.router import Router
from zsplit_broker.scheduler import Scheduler
from zsplit_broker.session import Session
from zsplit_broker.tally import add, mean, quantile
from zsplit_broker.work import client_of


class Bulletin:
    """Numbers events, keeps the last of each topic for those who subscribe later, and counts rates."""

    def __init__(self, scheduler: Scheduler, router: Router, run: str, out: str) -> None:
        self.scheduler = scheduler
        self.router = router
        self.run = run
        self.out = out
        self._seq: dict[str, int] = {}
        self._last: dict[str, bytes] = {}
        self._rate = (0.0, 0, 0)
        self._needs = ""

    def stamp(self, event: AnyEvent, time: float) -> tuple[bytes, bytes]:
        """Number an event; return the message `(topic, body)`. `time` is in unix seconds."""
        name = topic(event)
        seq = self._seq[name] = self._seq.get(name, 0) + 1
        body = self._last[name] = encode_event(msgspec.structs.replace(event, seq=seq, time=time))
        return name.encode(), body

    def replay(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Yield the last message of each topic that a subscription to `prefix` covers."""
        for name, body in self._last.items():
            if name.encode().startswith(prefix):
                yield name.encode(), body

    def state(self, now: float) -> Iterator[AnyEvent]:
        """Yield the run and its peers as they stand; losses collected since the last call go along."""
        yield self.run_event()
        yield from self._standstill()
        for session in list(self.router.sessions.values()):
            yield self._client(session, now) if session.role == "client" else self._server(session, now)

    def _standstill(self) -> Iterator[LogEvent]:
        """Yield why no round can begin, once each time: who was lost was said, that too few are left was not."""
        needs = self.scheduler.waits_for() if self.scheduler.phase == "validating" else ""
        if needs and not self.scheduler.awaited() and needs != self._needs:
            yield LogEvent(level="error", who="broker", text=needs)
        self._needs = needs

    def run_event(self) -> RunEvent:
        """Return the run as it stands."""
        scheduler, config = self.scheduler, self.scheduler.config
        roles = [role for role, _ in scheduler.peers]
        return RunEvent(
            name=config.run.name,
            run=self.run,
            state=self._state(),
            sentence=scheduler.outcome.sentence if scheduler.outcome else scheduler.waits_for(),
            policy=config.schedule.policy,
            model=config.model.name,
            data=config.data.name,
            cut=scheduler.plans.cut,
            round=len(scheduler.history),
            current=self._current(),
            rounds=config.run.rounds,
            clients=config.schedule.clients,
            joined=roles.count("client"),
            servers=roles.count("server"),
            version=scheduler.stored[-1] if scheduler.stored else "",
            out=self.out,
            seconds=scheduler.seconds,
            test_accuracy=mean(scheduler.test.top1, scheduler.test.samples),
        )

    def _current(self) -> int:
        """Return the round that is worked on, from 1: in training, or else the first that is not over, or the last."""
        scheduler, rounds = self.scheduler, self.scheduler.config.run.rounds
        match scheduler.phase:
            case "training" | "merging":
                return scheduler.round + 1
            case "testing":
                return scheduler.round
            case "serving":
                return rounds
            case _:
                return max(scheduler.round, min(len(scheduler.history) + 1, rounds))

    def _state(self) -> str:
        outcome = self.scheduler.outcome
        if outcome is not None:
            return "finished" if outcome.ok else "failed"
        names = {
            "initialising": "storing",
            "merging": "training",
            "validating": "evaluating",
            "testing": "evaluating",
        }
        return names.get(self.scheduler.phase, self.scheduler.phase)

    def round_event(self, record: RoundRecord) -> RoundEvent:
        """Return a finished round's figures."""
        train, validation = record.train, record.validation
        traffic = add([train, record.server, validation]).traffic.values()
        return RoundEvent(
            round=record.round + 1,
            samples=train.samples,
            steps=train.steps,
            train_loss=mean(train.loss_sum, train.samples),
            val_loss=mean(validation.loss_sum, validation.samples),
            val_accuracy=mean(validation.top1, validation.samples),
            val_top5=mean(validation.top5, validation.samples),
            version=record.version,
            seconds=record.seconds,
            step_seconds=quantile(train.step_seconds, 0.5),
            bytes_up=sum(up for up, _ in traffic),
            bytes_down=sum(down for _, down in traffic),
        )

    def logs(self, event: Event) -> Iterator[LogEvent]:
        """Yield what a person wants to hear of an event."""
        match event:
            case Joined(role=role, index=index, prepared=prepared):
                text = f"joined: {prepared.train} samples" if role == "client" else f"joined: {prepared.device}"
                yield LogEvent(level="info", who=f"{role}.{index}", text=text)
                yield from self._differences(event)
            case Started(epoch=epoch) if epoch > 1:
                text = f"the run is taken up again, {len(self.scheduler.history)} rounds of it are done"
                yield LogEvent(level="info", who="broker", text=text)
            case Lost(role=role, index=index, sentence=sentence, fatal=fatal):
                after = "" if fatal or self.scheduler.phase == "waiting" else self._after_loss(role)
                yield LogEvent(level="error", who=f"{role}.{index}", text=sentence + after)
            case Missed(client=client, sentence=sentence):
                text = f"{sentence}: {self._without(client)}"
                yield LogEvent(level="warning", who=f"client.{client}", text=text)
            case Damaged(digest=digest, sentence=sentence):
                text = f"version {digest[:12]} cannot be used ({sentence}): the one before it is"
                yield LogEvent(level="error", who="broker", text=text)
            case Draining(sentence=sentence):
                text = f"{sentence}: the run ends when the version of this round is stored"
                yield LogEvent(level="warning", who="broker", text=text)
            case Planned(round=round_, sentence=sentence) if sentence:
                before = f"as planned before, from round {round_ + 1} on: " if self.scheduler.config.plan.file else ""
                yield LogEvent(level="info", who="broker", text=before + sentence)
            case Stopped(sentence=sentence):
                yield LogEvent(level="error", who="broker", text=sentence)
            case _:
                pass

    def _without(self, client: int) -> str:
        """Say how it goes on without a client that was waited for."""
        if client in self.scheduler.moved - self.scheduler.missed:
            return "its turn comes later"
        if ("client", client) in self.scheduler.peers:
            return "the round goes on without it"
        return "the run goes on without it until it is back"

    def _after_loss(self, role: str) -> str:
        """Say what happens now that a peer is gone."""
        if role == "client":
            return f"; it is waited for, {self.scheduler.config.schedule.rejoin_timeout:g} s (schedule.rejoin_timeout)"
        return "" if self.scheduler.servers() else "; the run waits for a server"

    def departure(self, event: Event) -> Iterator[AnyEvent]:
        """Yield the last word on a peer that was lost."""
        match event:
            case Lost(role="client", index=index):
                yield ClientEvent(index=index, state="lost")
            case Lost(role="server", index=index):
                yield ServerEvent(index=index, state="lost")
            case _:
                pass

    def _differences(self, joined: Joined) -> Iterator[LogEvent]:
        """Warn where peers differ in what bit-identical results depend on."""
        mine = joined.prepared
        for (role, index), other in self.scheduler.peers.items():
            theirs = other.prepared
            if role == joined.role and index != joined.index and mine.threads != theirs.threads:
                text = f"computes with {mine.threads} threads, {role} {index} with {theirs.threads}"
            elif (mine.torch, mine.capability) != (theirs.torch, theirs.capability):
                text = (
                    f"has torch {mine.torch} on {mine.capability}, {role} {index} has torch {theirs.torch} "
                    f"on {theirs.capability}"
                )
            else:
                continue
            text += ": results depend in their last bits on who computes"
            yield LogEvent(level="warning", who=f"{joined.role}.{joined.index}", text=text)
            return

    def rates_due(self, now: float) -> bool:
        """Whether the relay's rates were last asked for a second ago."""
        return now - self._rate[0] >= 1

    def rates(self, now: float, messages: int, size: int) -> BrokerEvent:
        """Return the relay's rates since the last call."""
        before, had, bytes_had = self._rate
        self._rate = (now, messages, size)
        elapsed = max(now - before, 1e-6)
        return BrokerEvent(
            messages_per_second=(messages - had) / elapsed,
            bytes_per_second=(size - bytes_had) / elapsed,
            messages=messages,
            bytes=size,
            dropped=self.router.dropped,
            seconds=now,
        )

    def _round_of(self, job: Job | None) -> int:
        """Return the round of a client's job, from 1; the test is of the last one."""
        match job:
            case Turn(round=round_) | Evaluate(round=round_, part="validation"):
                return round_ + 1
            case Evaluate(round=round_):
                return round_
            case _:
                return len(self.scheduler.history)

    def _client(self, session: Session, now: float) -> ClientEvent:
        held = next((h for h in (session.beat.held if session.beat else ()) if h.state != "done"), None)
        job = self._job(held)
        if held and isinstance(job, Turn):
            session.steps = held.step, job.first + job.count
        losses, session.losses = tuple(session.losses), []
        telemetry, prepared = session.telemetry, session.prepared
        return ClientEvent(
            index=session.index,
            state=self._peer_state(session, job),
            round=self._round_of(job),
            step=session.steps[0],
            steps=session.steps[1],
            loss=losses[-1] if losses else None,
            losses=losses,
            samples_per_second=telemetry.samples_per_second if telemetry else 0.0,
            bytes_up=session.up,
            bytes_down=session.down,
            idle_share=telemetry.idle_share if telemetry else 0.0,
            age=max(0.0, now - session.seen),
            server=job.server if job else None,
            host=session.host,
            device=prepared.device if prepared else "",
        )

    def _peer_state(self, session: Session, job: object) -> str:
        if self.scheduler.phase == "finished":
            return "done"
        return _verb(job) if session.prepared else "loading"

    def _server(self, session: Session, now: float) -> ServerEvent:
        jobs = sorted(self.scheduler.jobs(session.peer), key=lambda job: not isinstance(job, Turn))
        telemetry, prepared = session.telemetry, session.prepared
        return ServerEvent(
            index=session.index,
            state=self._peer_state(session, jobs[0] if jobs else None),
            clients=tuple(sorted({client for job in jobs if (client := client_of(job)) is not None})),
            samples_per_second=telemetry.samples_per_second if telemetry else 0.0,
            idle_share=telemetry.idle_share if telemetry else 0.0,
            age=max(0.0, now - session.seen),
            host=session.host,
            device=prepared.device if prepared else "",
        )

    def _job(self, held: Held | None) -> Turn | Evaluate | Measure | None:
        work = self.scheduler.work.get(held.lease) if held else None
        return work.job if work and isinstance(work.job, Turn | Evaluate | Measure) else None


def _verb(job: object) -> str:
    match job:
        case Turn():
            return "training"
        case Evaluate():
            return "evaluating"
        case Merge():
            return "merging"
        case Measure():
            return "measuring"
        case Predict():
            return "predicting"
        case None:
            return "waiting"
        case _:
            return "initialising"
