"""What comes on the data connection: passed on as the relay says, or taken in where it is for the broker itself."""

import zmq

from zsplit import crash
from zsplit.errors import RemoteProtocolError
from zsplit.wire.frames import check_sizes, decode_data, encode
from zsplit.wire.messages import Attach, Chunk, DataMessage, Pull
from zsplit_broker.depot import Depot
from zsplit_broker.disk import Writer
from zsplit_broker.port import Port
from zsplit_broker.relay import BROKER
from zsplit_broker.router import Router
from zsplit_broker.session import Session
from zsplit_broker.sockets import BELL
from zsplit_broker.versions import Versions


class Switch:
    """The broker's data messages, one after the other. `relayed` counts those that were passed on."""

    def __init__(self, run: str, port: Port, router: Router, versions: Versions, writer: Writer) -> None:
        self.port = port
        self.depot = Depot(run, versions, writer, self._ask)
        self.relayed = self.relayed_bytes = 0
        self._run, self._router, self._relay = run, router, router.relay

    def pass_on_until_the_bell(self) -> None:
        """Pass messages on until the bell rings."""
        receive, pass_on = self.port.receive, self._pass_on
        while pass_on(*receive()):
            pass

    def _pass_on(self, sender: bytes, header: bytes, frames: list[zmq.Frame]) -> bool:
        """Pass a data message on, of which only the header is read; return whether it was none of the bell's.

        Nothing refers to the frames after it: their memory is free for the next ones as soon as they are sent.
        """
        if sender == BELL:
            return False
        crash.at("broker.relay")
        try:
            message = decode_data(header)
            lane = self._relay.lane(sender, message, frames)
            if lane is None:
                check_sizes(message, list(map(len, frames)))
        except RemoteProtocolError:
            self._router.dropped += 1
            return True
        if lane is None:
            self._route(sender, message, header, frames)
        else:
            sent = self.port.send(lane.to, header, frames)
            # What follows is done while it is on its way: a lone message waits for nothing else.
            self._router.dropped += not sent
            size = len(header) + sum(map(len, frames))
            lane.count(message, size)
            self.relayed += 1
            self.relayed_bytes += size
        return True

    def _route(self, sender: bytes, message: DataMessage, header: bytes, frames: list[zmq.Frame]) -> None:
        """Pass a message on for which there is no lane yet, or never will be."""
        size = len(header) + sum(map(len, frames))
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
                self._have_sent_again(self._relay.by_data[sender])

    def _have_sent_again(self, session: Session) -> None:
        """A peer's data connection is a new one: what was on its way to it or from it may be lost."""
        for to, resend in list(self._relay.resends(session)):
            self._forward(to, encode(resend), [])
        self.depot.ask_again(session.name)

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
