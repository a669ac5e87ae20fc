"""A network that fails: a TCP proxy before each peer, which cuts, swallows, and drops or doubles control messages.

A peer is told a loopback address of its own (127.0.0.2 and up, as Linux has them) with the broker's own port numbers,
since it connects to the data port that the broker names on the host that it was told. What goes over the control port
is ZMTP 3 (https://rfc.zeromq.org/spec/23/) and is taken apart: whole messages are passed on once, twice or not at all,
and what is left is a valid stream. The other ports are bytes. Below it the kernel loses all packets to a peer's address
for a while: there no connection ends, and what was under way comes late.
"""

import asyncio
import contextlib
import socket
import struct
import subprocess
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from threading import Thread
from typing import Any, NamedTuple, Self, TypeVar

GREETING = 64
"""Bytes with which each side of a ZMTP connection begins."""

MORE, LONG, COMMAND = 1, 2, 4
"""Bits of the byte before each frame: another frame of the message follows, its length has 8 bytes, it is a command."""

PIECE = 65536
"""Bytes that are passed on at once."""

UNUSED = "127.0.0.99"
"""A loopback address that is nobody's, to see what this process may do."""

T = TypeVar("T")

Judge = Callable[[bool, bytes], int]
"""How often a message on the control port is passed on, by whether it goes up to the broker and its first frame."""


class Piece(NamedTuple):
    """Bytes of a stream: a whole message with its first frame; a command, or some of the greeting, without."""

    raw: bytes
    first: bytes | None


class Stream:
    """One way of a ZMTP connection, taken apart as it comes."""

    def __init__(self) -> None:
        self._rest = b""
        self._message: list[bytes] = []
        self._first = b""
        self._greeting = GREETING

    def feed(self, data: bytes) -> Iterator[Piece]:
        """Yield what is whole now. Of the greeting that is any byte: each side waits for the other's in between."""
        self._rest += data
        if self._greeting:
            begun = self._take(self._greeting)
            self._greeting -= len(begun)
            yield Piece(begun, None)
        while (frame := self._frame()) is not None:
            flags, raw, body = frame
            if flags & COMMAND:
                yield Piece(raw, None)
                continue
            if not self._message:
                self._first = body
            self._message.append(raw)
            if not flags & MORE:
                yield Piece(b"".join(self._message), self._first)
                self._message = []

    def _frame(self) -> tuple[int, bytes, bytes] | None:
        """Take the next frame: its flags, all its bytes, its body; None where it is not whole."""
        if not self._rest:
            return None
        head = 9 if self._rest[0] & LONG else 2
        if len(self._rest) < head:
            return None
        size = int.from_bytes(self._rest[1:head])
        if len(self._rest) < head + size:
            return None
        raw = self._take(head + size)
        return raw[0], raw, raw[head:]

    def _take(self, size: int) -> bytes:
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken


class Connection:
    """One TCP connection through a proxy, both ways of it."""

    def __init__(self, port: int, writers: Sequence[asyncio.StreamWriter]) -> None:
        self.port = port
        self.swallows = False
        self._writers = writers
        for writer in writers:
            # Closed, it is reset: nothing that is under way arrives any more.
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def cut(self) -> None:
        """Reset both sides."""
        for writer in self._writers:
            writer.transport.abort()


class Proxy:
    """The network before one peer. Its methods may be called from any thread."""

    def __init__(self, net: "Net", host: str, target: str, ports: Sequence[int], judge: Judge) -> None:
        self.host = host
        self._net, self._target, self._ports, self._judge = net, target, ports, judge
        self._connections: set[Connection] = set()
        self._listening: list[asyncio.Server] = []

    def cut(self, port: int | None = None) -> int:
        """Reset the connections to a port, or all; return how many there were."""
        return self._net.call(self._cut(port))

    def swallow(self) -> int:
        """From now on nothing comes through the connections that there are, either way, and none is closed."""
        return self._net.call(self._swallow())

    async def listen(self) -> None:
        """Take connections. Raises OSError where the address or a port cannot be had."""
        for port in self._ports:
            self._listening.append(await asyncio.start_server(self._through(port), self.host, port))

    async def close(self) -> None:
        """Take none any more, and cut those that there are."""
        for listening in self._listening:
            listening.close()
        await self._cut(None)

    async def _cut(self, port: int | None) -> int:
        meant = [each for each in self._connections if port in (None, each.port)]
        for connection in meant:
            connection.cut()
        return len(meant)

    async def _swallow(self) -> int:
        for connection in self._connections:
            connection.swallows = True
        return len(self._connections)

    def _through(self, port: int) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                up_reader, up_writer = await asyncio.open_connection(self._target, port)
            except OSError:  # no broker there: to the peer it is as if nobody listened
                writer.transport.abort()
                return
            connection = Connection(port, (writer, up_writer))
            self._connections.add(connection)
            ways = ((True, reader, up_writer), (False, up_reader, writer))
            try:
                await asyncio.gather(*(self._pass(connection, *way) for way in ways))
            finally:
                self._connections.discard(connection)

        return connected

    async def _pass(
        self, connection: Connection, up: bool, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Pass one way on to its end; with it the other one ends."""
        stream = Stream() if connection.port == self._ports[0] else None
        with contextlib.suppress(OSError):
            while data := await reader.read(PIECE):
                if connection.swallows:
                    continue
                writer.write(data if stream is None else self._judged(stream, up, data))
                await writer.drain()
        if not connection.swallows:
            connection.cut()

    def _judged(self, stream: Stream, up: bool, data: bytes) -> bytes:
        return b"".join(
            piece.raw * (1 if piece.first is None else self._judge(up, piece.first)) for piece in stream.feed(data)
        )


class Net:
    """All proxies, in a thread of their own, for as long as this is entered."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="net", daemon=True)
        self._proxies: list[Proxy] = []

    def proxy(self, host: str, target: str, ports: Sequence[int], judge: Judge) -> Proxy:
        """Open a proxy on `host` before `target`, with the same ports. Raises OSError where it cannot listen."""
        made = Proxy(self, host, target, ports, judge)
        self._proxies.append(made)
        self.call(made.listen())
        return made

    def call(self, job: Coroutine[Any, Any, T]) -> T:
        """Have something done in the thread of the net, and wait for it."""
        return asyncio.run_coroutine_threadsafe(job, self._loop).result()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        for proxy in self._proxies:
            await proxy.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


class Cables:
    """The cables to loopback addresses, as far as the kernel is concerned: its routes."""

    def __init__(self) -> None:
        self._out: set[str] = set()

    def pull(self, host: str) -> None:
        """Lose every packet to this address from now on."""
        self._out.add(host)
        _ip("route", "replace", "blackhole", host, "table", "local")

    def plug(self, host: str) -> None:
        """Let packets through again; those that were lost are sent again by TCP."""
        self._out.discard(host)
        _ip("route", "del", "blackhole", host, "table", "local")

    def plug_all(self) -> None:
        """Plug in all that are out, also those that a process left so which was killed."""
        left = _ip("route", "show", "table", "local", "type", "blackhole").split()
        for host in {*self._out, *(word for word in left if word.startswith("127."))}:
            with contextlib.suppress(subprocess.CalledProcessError):
                self.plug(host)


@contextmanager
def cables() -> Iterator[Cables | None]:
    """Yield the cables, all plugged in at the end; None where this process may not touch them (it takes root)."""
    made = Cables()
    try:
        made.pull(UNUSED)
        made.plug_all()
    except (OSError, subprocess.CalledProcessError):
        yield None
        return
    try:
        yield made
    finally:
        made.plug_all()


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout
