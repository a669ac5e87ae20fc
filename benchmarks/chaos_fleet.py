"""The processes of a run as a person starts them on many machines, each peer behind a network of its own."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from chaos_net import Net, Proxy
from chaos_watch import Watch

ZSPLIT = Path(sys.executable).with_name("zsplit")

BROKER = "broker"
TARGET = "127.0.0.1"

PORTS = 3
"""A broker's ports: control, data, events."""

LEAVING = 5.0
"""Seconds that peers have to leave once the run is over."""

DISK_MB = 48
"""Size of the disk that is filled: room for the run, and little to fill."""


class Member:
    """One process, under the same command however often it is started. Its words are appended to a log."""

    def __init__(self, name: str, command: list[str], folder: Path, proxy: Proxy | None = None) -> None:
        self.name, self.proxy = name, proxy
        self.role = name.partition(" ")[0]
        self.log = folder / f"{name.replace(' ', '-')}.log"
        self._command = command
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, as whoever watches over it would."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=self.log.parent,
                start_new_session=True,
            )

    def kill(self) -> None:
        """End it as a loss of power would. It may be down already."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            if self.process.stdin is not None:
                self.process.stdin.close()
            self.process = None

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it is up."""
        if self.process is not None:
            self.process.send_signal(number)

    @property
    def code(self) -> int | None:
        """The exit code with which it ended by itself; None while it is up, and where it was killed."""
        return None if self.process is None else self.process.poll()

    @property
    def last_words(self) -> str:
        """The last line that it said."""
        said = self.log.read_text(errors="replace").strip() if self.log.exists() else ""
        return said.rpartition("\n")[2]


class Fleet:
    """A broker, servers and clients; none of them outlives this."""

    def __init__(
        self,
        folder: Path,
        out: Path,
        settings: Iterable[str],
        counts: Mapping[str, int],
        net: Net,
        watch: Watch,
    ) -> None:
        self.folder, self.out, self.watch = folder, out, watch
        self.ports = free_ports()
        self._extra = itertools.count()
        options = itertools.chain.from_iterable(
            ("--set", setting) for setting in (f"broker.port={self.ports[0]}", *settings)
        )
        command = [str(ZSPLIT), BROKER, *options, "--out", str(out), "--attached"]
        self.members = {BROKER: Member(BROKER, command, folder)}
        for role, index in ((role, index) for role, count in counts.items() for index in range(count)):
            name, host = f"{role} {index}", f"127.0.0.{len(self.members) + 1}"
            proxy = net.proxy(host, TARGET, self.ports, watch.judge(name))
            self.members[name] = Member(name, self._peer(role, index, host), folder, proxy)

    @property
    def broker(self) -> Member:
        """The broker."""
        return self.members[BROKER]

    @property
    def peers(self) -> list[Member]:
        """All but the broker."""
        return [member for member in self.members.values() if member.name != BROKER]

    def double_of(self, client: str) -> Member:
        """Return, not started, another process that claims a client's index, from another host."""
        command = self._peer("client", int(client.partition(" ")[2]), TARGET)
        return Member(f"double-{next(self._extra)} of {client}", command, self.folder)

    def start(self) -> None:
        """Start all of them."""
        for member in self.members.values():
            member.start()

    def let_leave(self) -> None:
        """Give the peers time to leave by themselves."""
        until = time.monotonic() + LEAVING
        while time.monotonic() < until and any(peer.process and peer.code is None for peer in self.peers):
            time.sleep(0.05)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for member in self.members.values():
            member.kill()

    def _peer(self, role: str, index: int, host: str) -> list[str]:
        command = [str(ZSPLIT), role, "--broker", f"{host}:{self.ports[0]}"]
        return command + (["-i", str(index)] if role == "client" else [])


def free_ports() -> range:
    """Return three ports in a row that are free, below those that a system gives away by itself."""
    start = 20_000 + os.getpid() * PORTS % 10_000
    starts = range(start, 32_000, PORTS)
    return next(ports for at in starts if all(map(_is_free, ports := range(at, at + PORTS))))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((TARGET, port))
        except OSError:
            return False
    return True


class Disk:
    """A small disk of its own for the run's folder, which can be filled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    def fill(self) -> None:
        """Leave not a byte."""
        with self._ballast.open("ab", buffering=0) as file:  # a buffer that does not fit would be written once more
            size = 2**20
            while size:
                free = os.statvfs(self.folder).f_bavail * os.statvfs(self.folder).f_frsize
                size = min(size, free)
                try:
                    file.write(bytes(size))
                except OSError:
                    size //= 2

    def free(self) -> None:
        """Give all of it back."""
        self._ballast.unlink(missing_ok=True)


@contextmanager
def small_disk(folder: Path) -> Iterator[Disk | None]:
    """Mount a small disk at the folder, and take it away at the end; None where this process may not mount."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "zsplit-chaos", str(folder)]
    if not sys.platform.startswith("linux") or subprocess.run(command, capture_output=True).returncode:
        yield None
        return
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
