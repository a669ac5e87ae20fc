"""What comes on the data connection: passed on as the relay says, or taken in where it is for the broker itself."""

import contextlib

import zmq

from zsplit import crash
from zsplit.errors import RemoteProtocolError
from zsplit.wire.frames import MAX_FRAMES, check_sizes, decode_data, encode
from zsplit.wire.messages import Attach, Chunk, DataMessage, Pull
from zsplit_broker.depot import Depot
from zsplit_broker.disk import Writer
from zsplit_broker.port import Port
from zsplit_broker.relay import BROKER
from zsplit_broker.router import Router
from zsplit_broker.sockets import BELL
from zsplit_broker.traffic import Lane
from zsplit_broker.versions import Versions
from zsplit_broker.work import Peer

BATCH = 64
"""Messages that are counted at once, after they were passed on: from the second on the code for it is in the caches."""


class Switch:
    """The broker's data messages, one after the other. `relayed` counts those that were passed on."""

    def __init__(self, run: str, port: Port, router: Router, versions: Versions, writer: Writer) -> None:
        self.port = port
        self.depot = Depot(run, versions, writer, self._ask)
        self.relayed = self.relayed_bytes = 0
        self._passed: list[tuple[Lane, bytes, bool]] = []
        self._run, self._router, self._relay = run, router, router.relay

    def pass_on_until_the_bell(self) -> None:
        """Pass messages on until the bell rings.

        What a lone message waits for is in as few functions as can be: since the one before it their code has left the
        caches, and a call takes ten times as long as it seems to.
        """
        receive, find, send = self.port.receive, self._relay.lane, self.port.send
        passed, trap = self._passed, crash.trap("broker.relay")
        lane: Lane | None = None
        while True:
            sender = receive()
            part = receive(0, False)  # a frame says whether more follow at a tenth of what the socket takes
            header = part.bytes
            frames: list[zmq.Frame] = []
            sizes: list[int] = []
            while part.more:
                part = receive(0, False)
                if len(frames) < MAX_FRAMES:
                    frames.append(part)
                    sizes.append(len(part))
            before, lane = lane, lane.next if lane else None
            if lane is None or not lane.takes(sender, header, sizes):
                lane = find(sender, header, sizes)
                if before is not None and lane is not None:
                    before.next = lane
            if lane is None:
                if sender == BELL:
                    break
                self._look_into(sender, header, frames, sizes)
            else:
                if trap is not None:
                    trap.spring()
                passed.append((lane, header, send(lane.to, header, frames)))
                if len(passed) == BATCH:
                    self._count()
            del part, frames  # their memory is free for what comes next as soon as it is sent
        self._count()

    def _count(self) -> None:
        """Count what was passed on over lanes."""
        for lane, header, sent in self._passed:
            self._router.dropped += not sent
            self.relayed += 1
            self.relayed_bytes += lane.size(header)
            with contextlib.suppress(RemoteProtocolError):  # whoever got it says so, and leaves
                lane.take(header)
        self._passed.clear()

    def _look_into(self, sender: bytes, header: bytes, frames: list[zmq.Frame], sizes: list[int]) -> None:
        """Decode a message for which there is no lane yet, or never will be, and pass it on if it may."""
        crash.at("broker.relay")
        try:
            message = decode_data(header)
            check_sizes(message, sizes)
        except RemoteProtocolError:
            self._router.dropped += 1
        else:
            self._route(sender, message, header, frames, len(header) + sum(sizes))

    def _route(self, sender: bytes, message: DataMessage, header: bytes, frames: list[zmq.Frame], size: int) -> None:
        """Pass a message of `size` bytes on, take it in, or drop it, as the relay says."""
        route = self._relay.route(sender, message, size)
        if route is None:
            self._router.dropped += 1
        elif route.to == BROKER:
            self._receive(route.message or message, frames)
        else:
            if route.message is not None:  # in the place of what came, whose frames it does not have
                header, frames = encode(route.message), []
            sent = self._forward(route.to, header, frames)
            if isinstance(message, Pull) and not sent:
                self._forward(sender, encode(self._relay.lacking(message, self._relay.name_of(sender))), [])
            self.relayed += 1
            self.relayed_bytes += size
            if isinstance(message, Attach) and sender in self._relay.by_data:
                self.have_sent_again(self._relay.by_data[sender].peer)

    def have_sent_again(self, peer: Peer) -> None:
        """A peer's data connection is a new one, or it is gone: what was on its way to it or from it may be lost."""
        for to, resend in list(self._relay.resends(peer)):
            self._forward(to, encode(resend), [])
        self.depot.ask_again(peer)

    def _forward(self, to: bytes, header: bytes, frames: list[zmq.Frame]) -> bool:
        """Send a data message; return whether its connection took it."""
        sent = self.port.send(to, header, frames)
        self._router.dropped += not sent
        return sent

    # For the broker itself

    def _ask(self, pull: Pull) -> bool:
        """Ask the holder of a version for a piece of it; return whether that could be said."""
        holder = self._relay.data_of(pull.source)
        return holder is not None and self._forward(holder, encode(pull), [])

    def _receive(self, message: DataMessage, frames: list[zmq.Frame]) -> None:
        """Take in a data message for the broker itself: a piece of a version, or a question for one."""
        if isinstance(message, Chunk):
            self.depot.take(message, memoryview(frames[0].buffer) if frames else None)
        elif isinstance(message, Pull):
            self._answer_pull(message)

    def _answer_pull(self, pull: Pull) -> None:
        to = self._relay.data_of(pull.origin)
        if to is not None:
            data = self.depot.read(pull)
            answer = Chunk(self._run, "", pull.lease, pull.origin, pull.digest, pull.offset, len(data), pull.what)
            self._forward(to, encode(answer), [zmq.Frame(data)] if data else [])
