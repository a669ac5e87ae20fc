"""The messages of protocol 1, and the records inside them. `broker/README.md` is their specification.

A message on the wire is `[header, frame, frame, …]`. The header is one of the structs here, encoded
with msgpack and validated as it is decoded. Control messages are maps, so that a field can be added;
data messages are arrays, since their headers are sent once for each tensor.
"""

from math import log
from typing import Annotated, Literal, NamedTuple

import msgspec

PROTOCOL = 1

Role = Literal["client", "server", "monitor"]
Kind = Literal["train", "eval", "predict", "probe"]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
Amount = Annotated[float, msgspec.Meta(ge=0, le=1e300)]
Finite = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]
Bucket = Annotated[int, msgspec.Meta(ge=-3000, le=3000)]
What = Literal["smashed", "gradients", "labels", "ids", "norms", "weights", "optimizer", "evaluation", "other"]


class Lease(NamedTuple):
    """The right to do one job. A later one for the same peer fences every earlier one."""

    epoch: int
    number: int


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of what travels inside messages."""


class Ref(Record, frozen=True):
    """A state, by the digest of its contents, and who holds it: `server.0`, `client.3` or `broker`."""

    digest: str
    holder: str


class Plan(Record, frozen=True):
    """What a client is told to use.

    `cut` names the place in the model, `micro_batches` is M, `window` the number of unanswered
    micro-batches that are allowed (the credit), `up` and `down` are the codecs of activations and of their gradients.
    `tail` is the place where a U-shaped model comes back to the client; empty where the labels leave it.
    """

    cut: str
    micro_batches: Positive = 1
    window: Positive = 1
    up: str = "raw"
    down: str = "raw"
    tail: str = ""


class Init(Record, frozen=True, tag="init"):
    """A server makes version 0: the freshly initialised model."""

    lease: Lease
    server: int


class Share(NamedTuple):
    """One client's part of a stage: its steps `first … first + steps - 1` of the round."""

    client: int
    first: int
    steps: int


class Group(Record, frozen=True):
    """Turns that share one back at one server, each named by its client: what each of them does.

    `number` is the same for all of a group and for no other under one epoch.
    """

    number: int
    shares: tuple[Share, ...]


class Turn(Record, frozen=True, tag="turn"):
    """A client trains with a server: everything that the turn depends on.

    Steps `first … first + count - 1` of the round, counted over all `train.local_epochs` of `epoch_steps` each; the
    learning-rate position is `round · local_epochs` plus the epoch within the round. `back`, where it is given, is what
    the server begins with in place of its part of `base`; `group` are the turns that share its back.
    """

    lease: Lease
    client: int
    server: int
    base: Ref
    plan: Plan
    round: int
    first: int
    count: int
    threads: tuple[int, int] = (0, 0)
    epoch_steps: Positive = 1
    back: Ref | None = None
    group: Group | None = None


class Evaluate(Record, frozen=True, tag="evaluate"):
    """A client evaluates a version on its part of the validation or test data, forward only."""

    lease: Lease
    client: int
    server: int
    base: Ref
    plan: Plan
    round: int
    part: Literal["validation", "test"]


class Predict(Record, frozen=True, tag="predict"):
    """A client asks for outputs, forward only, for as long as it is here: a broker that serves a version gives it."""

    lease: Lease
    client: int
    server: int
    base: Ref
    plan: Plan


class Contribution(Record, frozen=True):
    """What one client's turn leaves: the state of the front and of the back, and its weight.

    Without a back, the one that several clients share is another contribution's.
    """

    client: int
    weight: float
    front: Ref
    back: Ref | None = None


class Merge(Record, frozen=True, tag="merge"):
    """A server makes a version out of contributions: one is joined, several are averaged in client order.

    `share` is that of the result in the version; the rest is the base's.
    """

    lease: Lease
    server: int
    base: Ref
    round: int
    inputs: tuple[Contribution, ...]
    share: float = 1.0


class Measure(Record, frozen=True, tag="measure"):
    """A server measures itself; with a client, that one measures itself and its link to the server."""

    lease: Lease
    server: int
    client: int = -1


Job = Init | Turn | Evaluate | Predict | Merge | Measure


class Stretch(Record, frozen=True):
    """What one stretch of the model between neighbouring cuts costs a peer.

    `forward` and `backward` are seconds for each slice size of the profile, `step` those of the optimizer's step;
    `saved` is bytes a sample that wait for the backward pass, `weights` bytes of parameters and buffers.
    """

    forward: tuple[Amount, ...]
    backward: tuple[Amount, ...]
    step: Amount = 0.0
    saved: Amount = 0.0
    weights: Count = 0


class Profile(Record, frozen=True):
    """What a peer measured of itself: every stretch at several slice sizes (samples, ascending).

    `cuts` are the places in the model's order; stretch i ends at cut i, the last one at the loss. `up` and `down` are
    bytes a sample on the wire at each cut, after the codec. `encode` and `decode` are the seconds a sample in which
    this peer packs what it sends at each cut and unpacks what it receives there; none where all travels raw.
    `batch_seconds` is what a mini-batch takes to load, `message_seconds` what encoding, queueing and decoding add to
    each micro-batch, however small. `batch_norm` says whether the model has BatchNorm. Where the peer ran out of memory
    stretches are missing from the end, and `note` says so.
    """

    cuts: tuple[str, ...]
    up: tuple[Amount, ...]
    down: tuple[Amount, ...]
    sizes: tuple[int, ...]
    stretches: tuple[Stretch, ...]
    batch_seconds: Amount = 0.0
    message_seconds: Amount = 0.0
    batch_norm: bool = False
    note: str = ""
    encode: tuple[Amount, ...] = ()
    decode: tuple[Amount, ...] = ()


class LinkSpeed(Record, frozen=True):
    """A client's link to its server through the broker: bytes a second each way, and a round trip in seconds.

    `spread` is how far repeated measurements of a rate lay apart, relative to their median.
    """

    up: Amount
    down: Amount
    rtt: Amount
    spread: Amount = 0.0


class Flow(NamedTuple):
    """Messages of one way as they were seen to arrive: their bytes, and the seconds that they took one after the other.

    `starts` counts those that found the way empty: their seconds contain its delay.
    """

    bytes: Count = 0
    seconds: Amount = 0.0
    starts: Count = 0


class Tally(Record, frozen=True):
    """What a job did, counted. Sums are over samples; `step_seconds` counts steps by duration bucket.

    `seconds` and `idle` are wall time in the job and the part of it spent waiting for the other side, `busy` the part
    spent on loading batches, forward, backward and optimizer's step. `flow` is what came in from the other side.
    `traffic` and `traffic_raw` are filled in by the broker: bytes by kind, up and down as seen from the client, as they
    were sent and as they would have been without a codec.
    """

    steps: Count = 0
    samples: Count = 0
    loss_sum: Amount = 0.0
    top1: Count = 0
    top5: Count = 0
    seconds: Amount = 0.0
    idle: Amount = 0.0
    busy: Amount = 0.0
    flow: Flow = Flow()
    step_seconds: dict[Bucket, Count] = {}
    traffic: dict[str, tuple[Count, Count]] = {}
    traffic_raw: dict[str, tuple[Count, Count]] = {}


def bucket_of(seconds: float) -> int:
    """Return the bucket of a duration: buckets are 1 % wide, so that quantiles are right to 0.5 %."""
    return round(log(max(seconds, 1e-9)) / log(1.01))


def bucket_seconds(bucket: int) -> float:
    """Return the middle of a bucket, in seconds."""
    return float(1.01**bucket)


class Held(Record, frozen=True):
    """One job as its peer sees it: how far it is, and its result once it is done."""

    lease: Lease
    state: Literal["opening", "ready", "running", "done"]
    step: int = 0
    digest: str = ""
    tally: Tally = Tally()
    profile: Profile | None = None
    link: LinkSpeed | None = None


class Span(NamedTuple):
    """What a peer did when: `begin` on the broker's clock, in seconds; step and micro-batch −1 where it has none.

    `lane` says who: the thread that computes, the way out of this peer (`up`) or the way in (`down`). `client` is
    whose job it was, where a server did it.
    """

    lane: Literal["compute", "up", "down"]
    name: str
    begin: Finite
    seconds: Amount
    step: int = -1
    micro: int = -1
    client: int = -1


class Prepared(Record, frozen=True):
    """A peer is ready to be given jobs: its data or model is loaded. Sizes in samples.

    `cut` is the name of the place that the config's cut means in this peer's model, `tail` that of its tail, `earliest`
    that of `plan.min_cut` (empty: any place).
    """

    cut: str = ""
    tail: str = ""
    train: int = 0
    validation: int = 0
    test: int = 0
    torch: str = ""
    capability: str = ""
    threads: int = 0
    device: str = "cpu"
    host: str = ""
    cores: int = 1
    earliest: str = ""


class Finish(Record, frozen=True):
    """The run is over. `ok` is false where it ended early; the sentence says why."""

    ok: bool
    sentence: str


class Control(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="type"):
    """Base of the messages on the control connection."""


class Hello(Control, frozen=True, tag="hello"):
    """Peer → broker: who I am. Sent again until it is answered. `index` −1 asks for the next free one."""

    protocol: int
    role: Role
    instance: str
    index: int = -1
    host: str = ""


class Welcome(Control, frozen=True, tag="welcome"):
    """Broker → peer: you are in. `config` is the run's config as JSON; ports belong to the broker's host.

    `serving`: there is no training here, a finished run's last version answers.
    """

    session: str
    run: str
    index: int
    config: bytes
    data_port: int
    events_port: int
    serving: bool = False


class Refused(Control, frozen=True, tag="refused"):
    """Broker → peer: you are not in, for the reason that the sentence gives. Exit with `code`."""

    sentence: str
    code: int = 1


class Unknown(Control, frozen=True, tag="unknown"):
    """Broker → peer: I do not know the session of your beat. Say hello again, as the same instance."""


class Beat(Control, frozen=True, tag="beat"):
    """Peer → broker, regularly and on every change: all that I hold, and which orders I have obeyed last.

    `sent` is the peer's clock (s).
    """

    session: str
    sent: float
    revision: int = 0
    held: tuple[Held, ...] = ()
    have: tuple[str, ...] = ()
    prepared: Prepared | None = None


class Orders(Control, frozen=True, tag="orders"):
    """Broker → peer, as answer to every beat and on every change: all that you should hold.

    A job that is not listed is over: drop it. A state whose digest is neither in `keep` nor the result
    of a listed job may be forgotten. `echo` is the beat's `sent`, `now` the broker's clock.
    """

    revision: int
    jobs: tuple[Job, ...] = ()
    keep: tuple[str, ...] = ()
    finish: Finish | None = None
    echo: float = 0.0
    now: float = 0.0


class Telemetry(Control, frozen=True, tag="telemetry"):
    """Peer → broker: what the monitor shows. May be lost; nothing depends on it."""

    session: str
    losses: tuple[Finite, ...] = ()
    samples_per_second: Amount = 0.0
    idle_share: Amount = 0.0
    note: str = ""
    spans: tuple[Span, ...] = ()


class Fault(Control, frozen=True, tag="fault"):
    """Peer → broker: I cannot go on, for the reason that the sentence gives. `fatal`: nobody can, the run is to end."""

    session: str
    sentence: str
    fatal: bool = False


class Bye(Control, frozen=True, tag="bye"):
    """Peer → broker: I leave."""

    session: str


class Data(msgspec.Struct, frozen=True, array_like=True, tag_field="type", gc=False):
    """Base of the messages on the data connection: every one names its run and its sender's session.

    Nothing in one refers back to it, so the garbage collector need not know of it.
    """

    run: str
    session: str


class Attach(Data, frozen=True, tag="a"):
    """Peer → broker: this data connection belongs to my session."""


class Attached(Data, frozen=True, tag="A"):
    """Broker → peer: it does now. Without it nothing else passes."""


class Detached(Data, frozen=True, tag="D"):
    """Broker → peer: I do not know this data connection; make a new one and attach that."""


class Resend(Data, frozen=True, tag="R"):
    """Broker → peer: what you sent under this lease may be lost. Send again what is not answered, in order."""

    lease: Lease


class TensorMeta(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One tensor: what it is, its dtype (safetensors' names), shape, codec and byte count in its frame."""

    what: What
    dtype: str
    shape: tuple[int, ...]
    codec: str
    nbytes: int


class Tensors(Data, frozen=True, tag="t"):
    """Tensors of one micro-batch on one leg; with the lease, (kind, step, micro, leg) is the idempotency key.

    Legs with two parts: 0 smashed data and labels (or sample ids) up, 1 gradients down. U-shaped: 0 smashed data up, 1
    the middle's output down, 2 its gradients up, 3 the gradients of the smashed data down. `scalars` carries, up, the
    samples of the mini-batch (`batch`) and its number of micro-batches (`micros`); down, where the server has the
    labels, the mean loss of the slice (`loss`), or in an evaluation `loss`, `top1`, `top5` and `samples`, summed. A
    prediction has smashed data alone up, and down as `other` the outputs, or what a tail at the client makes them of.
    """

    lease: Lease
    kind: Kind
    leg: int
    tensors: tuple[TensorMeta, ...]
    step: int
    micro: int
    scalars: dict[str, float] = {}


class Step(Data, frozen=True, tag="s"):
    """Client → server: step the optimizer now, gradients scaled by `scale` (clipping by the global norm)."""

    lease: Lease
    step: int
    scale: float


class Pull(Data, frozen=True, tag="p"):
    """Ask `source` for bytes of a state (offset −1: the manifest). The broker fills in who asks, `origin`."""

    lease: Lease
    source: str
    digest: str
    offset: int
    length: int
    what: What
    origin: str = ""


class Chunk(Data, frozen=True, tag="c"):
    """Answer to a pull, to `origin`: one frame of `nbytes` bytes; none where the holder lacks the state."""

    lease: Lease
    origin: str
    digest: str
    offset: int
    nbytes: int
    what: What


ControlMessage = Hello | Welcome | Refused | Unknown | Beat | Orders | Telemetry | Fault | Bye
DataMessage = Attach | Attached | Detached | Resend | Tensors | Step | Pull | Chunk
