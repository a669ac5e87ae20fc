"""Waking a poller from another thread: one byte through a socket pair."""

import contextlib
import socket


class Wake:
    """`fd` becomes readable after `set` and stays so until `clear`."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self.fd = self._reader.fileno()

    def set(self) -> None:
        with contextlib.suppress(OSError):  # a full pipe wakes as well
            self._writer.send(b"!")

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._reader.recv(4096):
                pass

    def close(self) -> None:
        self._reader.close()
        self._writer.close()
