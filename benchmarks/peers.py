"""Peers without a model: they say what a client and a server say until tensors flow, and then pass them on."""

from typing import NamedTuple, TypeVar

import click
import zmq

from zsplit.greeting import greet, parse_address
from zsplit.wire.frames import decode_control, decode_data, encode
from zsplit.wire.manifest import Manifest
from zsplit.wire.messages import (
    PROTOCOL,
    Attach,
    Attached,
    Beat,
    Chunk,
    Held,
    Hello,
    Init,
    Job,
    Lease,
    Orders,
    Prepared,
    Pull,
    Refused,
    Role,
    TensorMeta,
    Tensors,
    Turn,
)

ANSWER_SECONDS = 60.0
"""How long an answer may take before the benchmark gives up."""

Socket = zmq.Socket[bytes]
J = TypeVar("J", bound=Job)


class Sender(NamedTuple):
    """What a header tells of who sends it; these defaults mean nothing to anybody, and are of the usual length."""

    run: str = "0" * 8
    session: str = "0" * 16
    lease: Lease = Lease(1, 2)

    def header(self, leg: int, size: int) -> bytes:
        """Return the header of one tensor of `size` bytes: smashed data on leg 0, gradients on leg 1."""
        meta = TensorMeta("gradients" if leg else "smashed", "U8", (size,), "raw", size)
        scalars = {"loss": 0.5, "left": 60.0} if leg else {"batch": 128.0, "micros": 1.0, "left": 60.0}
        return encode(Tensors(self.run, self.session, self.lease, "train", leg, (meta,), 0, 0, scalars))


class Peer:
    """A peer without a model that has joined the broker and attached its data connection."""

    def __init__(self, context: zmq.Context[Socket], address: str, role: Role) -> None:
        self.control, self.data = dealer(context), dealer(context)
        self.control.connect(f"tcp://{address}")
        hello = Hello(protocol=PROTOCOL, role=role, instance=f"{role} of benchmarks/relay.py", index=0)
        welcome = greet(self.control, address, hello, ANSWER_SECONDS, say=lambda _: None)
        self.run, self.session = welcome.run, welcome.session
        self.data.connect(f"tcp://{parse_address(address)[0]}:{welcome.data_port}")
        self.data.send(encode(Attach(self.run, self.session)))
        if not isinstance(decode_data(self.data.recv()), Attached):
            raise click.ClickException(f"the broker did not attach the {role}'s data connection: is it this version's?")

    def beat(self, *held: Held) -> None:
        """Tell the broker what this peer holds: its data, one sample, and these jobs."""
        prepared = Prepared(cut="0", train=1)
        self.control.send(encode(Beat(session=self.session, sent=0, held=held, prepared=prepared)))

    def job(self, kind: type[J]) -> J:
        """Wait for a job of this kind and return it."""
        while True:
            message = decode_control(self.control.recv())
            if isinstance(message, Refused):
                raise click.ClickException(f"the broker refused a peer: {message.sentence}")
            if isinstance(message, Orders):
                if message.finish is not None:
                    raise click.ClickException(f"the broker gave up on the run: {message.finish.sentence}")
                for job in message.jobs:
                    if isinstance(job, kind):
                        return job

    def hand_over(self, state: Manifest) -> None:
        """Answer the broker's one pull of a state without tensors."""
        pull, body = decode_data(self.data.recv()), state.encode()
        assert isinstance(pull, Pull)
        chunk = Chunk(self.run, self.session, pull.lease, pull.origin, pull.digest, pull.offset, len(body), pull.what)
        self.data.send_multipart([encode(chunk), body])


def enter_as_client(peer: Peer) -> Sender:
    """Wait until the client may train."""
    peer.beat()
    return Sender(peer.run, peer.session, peer.job(Turn).lease)


def enter_as_server(peer: Peer) -> Sender:
    """Make version 0, let the broker store it, and be ready for the client's turn."""
    version = Manifest.of(())
    peer.beat()
    peer.beat(Held(lease=peer.job(Init).lease, state="done", digest=version.digest))
    peer.hand_over(version)
    lease = peer.job(Turn).lease
    peer.beat(Held(lease=lease, state="ready"))
    return Sender(peer.run, peer.session, lease)


def dealer(context: zmq.Context[Socket]) -> Socket:
    """Return a peer's socket."""
    made = context.socket(zmq.DEALER)
    made.setsockopt(zmq.IMMEDIATE, 1)
    made.setsockopt(zmq.RCVTIMEO, int(ANSWER_SECONDS * 1000))
    return made
