"""What the broker publishes: pub/sub topics, one schema each, as JSON.

A message on the events socket is `[topic, body]`. The body of every topic starts with `v` (the schema's
version), `seq` (counted for each topic from 1, so that a subscriber sees its gaps) and `time` (unix
seconds). The last body of each topic is sent again when somebody subscribes: one whose `seq` was
seen already is a repeat.
"""

import msgspec

from zsplit.errors import RemoteProtocolError


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="topic"):
    """Base of all events."""

    v: int = 1
    seq: int = 0
    time: float = 0.0


class RunEvent(Event, frozen=True, kw_only=True, tag="run"):
    """The run as a whole; `round` counts the rounds that are done, stored and evaluated. `current` is the one that is
    worked on, from 1: the one before may still be stored or evaluated.

    State: `waiting`, `measuring`, `planning`, `storing`, `training`, `evaluating`, `finished` or `failed`; `serving`
    where a finished run is asked. `cut` is `auto` before there is a plan, and names every place where clients differ.
    """

    name: str
    run: str
    state: str
    sentence: str = ""
    policy: str
    model: str
    data: str
    cut: str
    round: int
    current: int = 0
    rounds: int
    clients: int
    joined: int
    servers: int
    version: str = ""
    out: str = ""
    seconds: float = 0.0
    test_accuracy: float | None = None


class RoundEvent(Event, frozen=True, kw_only=True, tag="round"):
    """A round is over. Losses and accuracies are means over samples; None where nothing was evaluated.

    `step_seconds` is the median duration of the round's steps, as the clients saw them. Bytes are those of all its
    messages on the data connection, as seen from the clients; `seconds` is what it took of the run's time.
    """

    round: int
    samples: int
    steps: int
    train_loss: float | None
    val_loss: float | None = None
    val_accuracy: float | None = None
    val_top5: float | None = None
    version: str = ""
    seconds: float = 0.0
    step_seconds: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0


class ClientEvent(Event, frozen=True, kw_only=True, tag="client"):
    """One client. State: `loading`, `waiting`, `measuring`, `training`, `evaluating`, `predicting`, `lost` or `done`.

    `round` counts from 1; `step` of `steps` is that of its latest turn. `losses` are the steps' since the last
    event, `loss` the latest of them, or None where there was none. Bytes are payload and headers on the data
    connection so far; `age` is seconds since its last sign of life.
    """

    index: int
    state: str
    round: int = 0
    step: int = 0
    steps: int = 0
    loss: float | None = None
    losses: tuple[float, ...] = ()
    samples_per_second: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    idle_share: float = 0.0
    age: float = 0.0
    server: int | None = None
    host: str = ""
    device: str = ""


class ServerEvent(Event, frozen=True, kw_only=True, tag="server"):
    """One server.

    State: `loading`, `waiting`, `measuring`, `initialising`, `training`, `evaluating`, `merging`, `predicting`, `lost`
    or `done`.
    """

    index: int
    state: str
    clients: tuple[int, ...] = ()
    samples_per_second: float = 0.0
    idle_share: float = 0.0
    age: float = 0.0
    host: str = ""
    device: str = ""


class BrokerEvent(Event, frozen=True, kw_only=True, tag="broker"):
    """The broker's rates over the last second, and what it dropped since the start (stale or not allowed)."""

    messages_per_second: float
    bytes_per_second: float
    messages: int
    bytes: int
    dropped: int
    seconds: float


class LogEvent(Event, frozen=True, kw_only=True, tag="log"):
    """Something happened. Level: `info`, `warning` or `error`; `who` is a peer's name or `broker`."""

    level: str
    who: str
    text: str


AnyEvent = RunEvent | RoundEvent | ClientEvent | ServerEvent | BrokerEvent | LogEvent

_decoder: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)


def topic(event: AnyEvent) -> str:
    """Return the event's topic: `run`, `round`, `client.<i>`, `server.<k>`, `broker` or `log`."""
    name = str(type(event).__struct_config__.tag)
    return f"{name}.{event.index}" if isinstance(event, ClientEvent | ServerEvent) else name


def encode_event(event: AnyEvent) -> bytes:
    """Return the body as JSON."""
    return msgspec.json.encode(event)


def decode_event(body: bytes) -> AnyEvent:
    """Return the event. Raises RemoteProtocolError for anything else."""
    try:
        return _decoder.decode(body)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise RemoteProtocolError(f"not an event: {error}") from error
