"""The relay's lanes: whatever they remember, tensors pass, go and count as if each message were looked up anew."""

from collections import Counter, defaultdict
from random import Random

import msgspec
from helpers import NO_SUCH_LEASE, Play, configs, sizes_for
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from zsplit.config import Config
from zsplit.wire.frames import encode
from zsplit.wire.messages import (
    PROTOCOL,
    Attach,
    Attached,
    Detached,
    Evaluate,
    Hello,
    Kind,
    Lease,
    Measure,
    Prepared,
    Role,
    Step,
    TensorMeta,
    Tensors,
    Turn,
    What,
)
from zsplit_broker.events import Close, Joined
from zsplit_broker.relay import Relay, Route
from zsplit_broker.session import Session
from zsplit_broker.traffic import Exchange
from zsplit_broker.work import Peer, client_of

RUN = "run 0001"

KINDS: dict[type, Kind] = {Turn: "train", Evaluate: "eval", Measure: "probe"}

CHANGES = ["", "run", "kind", "leg", "tensors", "session", "connection", "sender"]
"""What may differ from a message that passed; a `sender` has its own session and connection."""

CONNECTIONS = 10

connections = st.integers(0, CONNECTIONS - 1).map(b"id %d".__mod__)
some = st.integers(0, 20)
legs = st.integers(0, 3)
metas = st.lists(
    st.builds(
        TensorMeta,
        st.sampled_from(["smashed", "gradients", "labels"]),
        st.just("U8"),
        st.tuples(st.integers(0, 9)),
        st.just("raw"),
        st.integers(0, 9),
    ),
    max_size=3,
).map(tuple)


class UShaped(Play):
    """A run in which the clients keep the tail, except where the planner chose the cut."""

    def joined(self, peer: Peer) -> Joined:
        joined = super().joined(peer)
        tail: Prepared = msgspec.structs.replace(joined.prepared, tail="pool")
        return msgspec.structs.replace(joined, prepared=tail)


class Traffic(RuleBasedStateMachine):
    """Peers that send what they may and what they may not while the run goes on and connections change.

    Beside the relay stand `connected`, the connection of each peer, and sums over what passed. Nothing there is
    remembered from one message to the next, and so nothing can be forgotten too late.
    """

    @initialize(
        data=st.data(),
        config=configs(),
        servers=st.integers(1, 2),
        random=st.randoms(use_true_random=False),
        kind=st.sampled_from([Play, UShaped]),
    )
    def start(self, data: st.DataObject, config: Config, servers: int, random: Random, kind: type[Play]) -> None:
        self.play = kind(config, data.draw(sizes_for(config)), servers).begin()
        self.sessions: dict[str, Session] = {}
        self.by_peer: dict[Peer, Session] = {}
        self.relay = Relay(RUN, self.play.scheduler, self.sessions, self.by_peer)
        self.tokens = 0
        self.connected: dict[Peer, bytes] = {}
        self.closed: list[Lease] = [NO_SUCH_LEASE]
        self.sent: list[tuple[bytes, Tensors | Step]] = []
        self.ends: list[Peer] = []
        self.passed: defaultdict[Lease, list[tuple[Session, Tensors, int]]] = defaultdict(list)
        self.up: Counter[str] = Counter()
        self.down: Counter[str] = Counter()
        for number, peer in enumerate(self.play.peers):
            self.enter(peer)
            if number < CONNECTIONS:
                self.connect(peer, b"id %d" % number)
        self.obey(0, random)

    def enter(self, peer: Peer) -> None:
        """Let a process say hello as this peer, in the place of the one before it."""
        before = self.by_peer.get(peer)
        if before is not None:
            del self.sessions[before.token]
            self.relay.detach(before)
            self.connected.pop(peer, None)
        self.tokens += 1
        role: Role = "client" if peer[0] == "client" else "server"
        hello = Hello(protocol=PROTOCOL, role=role, instance="a", index=peer[1])
        session = Session(f"token {self.tokens:010}", hello, peer[1], b"", 0.0)
        self.sessions[session.token] = self.by_peer[peer] = session

    def peer(self, number: int) -> Peer:
        """Return a peer, as often as not one of the two between whom something passed last."""
        peers = self.ends * (len(self.play.peers) // 2) + self.play.peers
        return peers[number % len(peers)]

    # What happens beside the tensors

    @rule(count=st.integers(0, 3), random=st.randoms(use_true_random=False))
    def obey(self, count: int, random: Random) -> None:
        """Let the run go on, and on until some tensors may pass, if they ever may again."""
        while (due := self.play.due()) and (count > 0 or not any(w.ready for w in self.play.scheduler.work.values())):
            count -= 1
            for said in self.play.tell(random.choice(due)):
                if isinstance(said, Close):
                    self.forget(said.job.lease)

    def forget(self, lease: Lease) -> None:
        """Drop what was known of a lease that is over."""
        self.relay.forget(lease)
        self.passed.pop(lease, None)
        self.closed.append(lease)
        self.send_all_again()

    @rule(number=some, connection=connections)
    def attach(self, number: int, connection: bytes) -> None:
        """Connect a peer anew, perhaps by what was another's connection."""
        self.connect(self.peer(number), connection)

    def connect(self, peer: Peer, connection: bytes) -> None:
        token = self.by_peer[peer].token
        assert self.relay.route(connection, Attach(RUN, token), 0) == Route(connection, Attached(RUN, token))
        self.connected = {p: c for p, c in self.connected.items() if c != connection} | {peer: connection}
        self.send_all_again()

    @rule(connection=connections, run=st.sampled_from([RUN, "another"]))
    def attach_with_a_token_that_nobody_has(self, connection: bytes, run: str) -> None:
        assert self.relay.route(connection, Attach(run, "no token"), 0) == Route(connection, Detached(RUN, ""))

    @rule(number=some, connects=st.booleans())
    def replace(self, number: int, connects: bool) -> None:
        """Start a peer's process again; it may find no connection yet, or that of the one before."""
        peer = self.peer(number)
        connection = self.connected.get(peer)
        self.enter(peer)
        self.send_all_again()
        if connects and connection is not None:
            self.connect(peer, connection)

    # Tensors and steps

    @precondition(lambda self: any(client_of(w.job) is not None for w in self.play.scheduler.work.values()))
    @rule(number=some, back=st.booleans(), tensors=metas, extra=some, step=st.booleans(), leg=legs)
    def send_as_ordered(
        self, number: int, back: bool, tensors: tuple[TensorMeta, ...], extra: int, step: bool, leg: int
    ) -> None:
        """Send as one of the two that have a job together, which may not be ready yet; lanes are what this takes."""
        jobs = [w.job for w in self.play.scheduler.work.values() if client_of(w.job) is not None]
        job = jobs[number % len(jobs)]
        peer: Peer = ("server", job.server) if back else ("client", client_of(job) or 0)
        connection = self.connected.get(peer, b"nobody's")
        token = self.by_peer[peer].token
        if step:
            self.send(connection, Step(RUN, token, job.lease, 0, 1.0), extra)
        else:
            self.send(connection, tensors_of(RUN, token, job.lease, KINDS[type(job)], tensors, leg), extra)

    @rule(
        connection=connections,
        number=some,
        which=some,
        run=st.sampled_from([RUN, RUN, "another"]),
        kind=st.sampled_from(["train", "eval", "probe"]),
        tensors=metas,
        extra=some,
        leg=legs,
    )
    def send_anything(
        self,
        connection: bytes,
        number: int,
        which: int,
        run: str,
        kind: Kind,
        tensors: tuple[TensorMeta, ...],
        extra: int,
        leg: int,
    ) -> None:
        """Send on some connection, with somebody's token, under a lease that is open or was."""
        leases = [*self.play.scheduler.work, *self.closed[-2:]]
        token = self.by_peer[self.peer(number)].token
        self.send(connection, tensors_of(run, token, leases[which % len(leases)], kind, tensors, leg), extra)

    @precondition(lambda self: self.sent)
    @rule(back=st.integers(1, 4), change=st.sampled_from(CHANGES), number=some)
    def send_again(self, back: int, change: str, number: int) -> None:
        """Send what passed a while ago, when the relay knew the way, or the like of it."""
        connection, message = self.sent[-min(back, len(self.sent))]
        peer = self.peer(number)
        likes: dict[str, str | int | tuple[TensorMeta, ...]] = {}
        if change == "run":
            likes["run"] = "another"
        elif change == "kind" and isinstance(message, Tensors):
            likes["kind"] = [*KINDS.values()][number % 3]
        elif change == "leg" and isinstance(message, Tensors):
            likes["leg"] = number % 5
        elif change == "tensors" and isinstance(message, Tensors):
            likes["tensors"] = tuple(msgspec.structs.replace(meta, what="labels") for meta in message.tensors)
        elif change in ("session", "sender"):
            likes["session"] = self.by_peer[peer].token
        if change in ("connection", "sender"):
            connection = self.connected.get(peer, connection)
        self.send(connection, msgspec.structs.replace(message, **likes), number)

    def send_all_again(self) -> None:
        """Send what passed lately, now that something has changed."""
        for connection, message in self.sent[-4:]:
            self.send(connection, message, 0)

    def send(self, connection: bytes, message: Tensors | Step, extra: int) -> None:
        """Send a message, `extra` being what a lane does not look at; it passes if it may, and then it counts."""
        if isinstance(message, Tensors):
            message = msgspec.structs.replace(message, scalars={"left": float(extra)} if extra else {})
        header = encode(message)
        frames = [bytes(meta.nbytes) for meta in message.tensors] if isinstance(message, Tensors) else []
        sizes = [len(frame) for frame in frames]
        size = len(header) + sum(sizes)
        assert self.relay.lane(connection, header, [*sizes, 0]) is None, "frames that the header does not declare"
        lane = self.relay.lane(connection, header, sizes)
        if lane is None:
            route = self.relay.route(connection, message, size)
        else:
            assert lane.size(header) == size
            lane.take(header)
            route = Route(lane.to)
        sender = next((peer for peer, c in self.connected.items() if c == connection), None)
        if sender is None:
            assert route == Route(connection, Detached(RUN, ""))
            return
        receiver = self.receiver(sender, message)
        assert route == (None if receiver is None else Route(self.connected[receiver]))
        if receiver is not None:
            self.ends = [sender, receiver]
            if (connection, message) not in self.sent[-4:]:
                self.sent.append((connection, message))
            self.up[self.by_peer[sender].token] += size
            self.down[self.by_peer[receiver].token] += size
            if isinstance(message, Tensors):
                self.passed[message.lease].append((self.by_peer[sender], message, size))

    def receiver(self, sender: Peer, message: Tensors | Step) -> Peer | None:
        """Return whom a message goes to, or None where it may not pass: the rules, and no memory."""
        work = self.play.scheduler.work.get(message.lease)
        client = client_of(work.job) if work else None
        if work is None or client is None or not work.ready:
            return None
        if message.run != RUN or message.session != self.by_peer[sender].token:
            return None
        if isinstance(message, Tensors) and message.kind != KINDS[type(work.job)]:
            return None
        ends: list[Peer] = [("client", client), ("server", work.job.server)]
        if sender not in ends:
            return None
        tail = isinstance(work.job, Turn) and work.job.plan.tail
        allowed = ([0, 2] if tail else [0], [1, 3] if tail else [1])[ends.index(sender)]
        if isinstance(message, Tensors) and message.leg not in allowed:
            return None
        ends.remove(sender)
        return ends[0] if ends[0] in self.connected else None

    # What holds at any time

    @invariant()
    def bytes_counted_under_a_lease_are_bytes_passed(self) -> None:
        for lease in [*self.play.scheduler.work, *self.closed[-2:]]:
            passed = self.passed.get(lease, [])
            for way, role in enumerate(("client", "server")):
                sizes = Counter[What | str]()
                for sender, message, size in passed:
                    if sender.role == role:
                        sizes += kinds_of(message, size)
                counted = {kind: both[way] for kind, both in self.relay.counted(lease).items()}
                assert +Counter(counted) == sizes

    @invariant()
    def bytes_of_a_session_are_bytes_passed(self) -> None:
        for token, session in self.sessions.items():
            assert (session.up, session.down) == (self.up[token], self.down[token])

    @invariant()
    def the_server_is_asked_while_something_that_came_up_was_not_answered(self) -> None:
        for lease in [*self.play.scheduler.work, *self.closed[-2:]]:
            legs = {role: set[int]() for role in ("client", "server")}
            for sender, message, _ in self.passed.get(lease, []):
                legs[sender.role].add(message.leg)
            answered = {leg - 1 for leg in legs["server"]}
            assert self.relay.asks_server(lease) == bool(legs["client"] - answered)


def test_who_is_to_send_next_is_seen_from_the_keys_and_repeats_change_nothing() -> None:
    exchange = Exchange()

    def sent(step: int, micro: int, leg: int = 0) -> tuple[bool, bool]:
        micros = 3.0 if leg == 0 else None
        for _ in range(2):
            exchange.note(step, micro, leg, micros)
        return exchange.asks_server, exchange.is_held_up(window=2)

    assert (exchange.asks_server, exchange.is_held_up(2)) == (False, False), "nothing was sent yet"
    assert sent(0, 0) == (True, False), "the window has room"
    assert sent(0, 1) == (True, True)
    assert sent(0, 0, leg=1) == (True, False)
    assert sent(0, 2) == (True, True)
    assert sent(0, 1, leg=1) == (True, True), "the step has no more"
    assert sent(0, 2, leg=1) == (False, False)
    assert sent(1, 0) == (True, False)
    assert sent(0, 2) == (True, False), "an old question"
    assert sent(0, 2, leg=1) == (True, False), "and an old answer"
    assert sent(1, 0, leg=1) == (False, False)


def tensors_of(run: str, token: str, lease: Lease, kind: Kind, tensors: tuple[TensorMeta, ...], leg: int) -> Tensors:
    return Tensors(run, token, lease, kind, leg, tensors, 0, 0)


def kinds_of(message: Tensors, size: int) -> Counter[str]:
    """Return a message's bytes by what they are."""
    if message.kind == "eval":
        return +Counter({"evaluation": size})
    kinds = Counter[str]()
    for meta in message.tensors:
        kinds[meta.what] += meta.nbytes
    kinds["headers"] = size - kinds.total()
    return +kinds


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(
    max_examples=400, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
