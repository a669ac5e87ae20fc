"""Runs under random faults end as if nothing had happened: the same weights, every step once, and nobody at hand.

A broker, two servers and six clients train a small model on the digits, each a process of its own with a network of its
own before it. Processes are killed and started again, stopped for a while, cut off and doubled; messages are lost; the
disk runs full. No client is ever closed out under these settings, so each run is to end with the weights of one that
nothing happened to, round by round and bit for bit.

    chaos_net.py     the network before each peer: cuts, swallows, drops and doubles control messages
    chaos_fleet.py   the processes, started as a person starts them
    chaos_faults.py  which faults come, drawn from the seed
    chaos_watch.py   what passes on the control connections: jobs, and who is at work again how soon after a fault
    chaos_books.py   what a run left, beside what it was to leave

It needs Linux: for a loopback address for each peer, and for the small disk.
"""

import heapq
import itertools
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, NamedTuple

import click
from chaos_books import Run, Verdict, judge, read_run
from chaos_faults import KINDS, Fault, faults
from chaos_fleet import ZSPLIT, Disk, Fleet, Member, small_disk
from chaos_net import Cables, Net, cables
from chaos_watch import Recovery, Trial, Watch
from common import json_option, machine, show, write
from rich.box import SIMPLE
from rich.table import Table

COUNTS = {"server": 2, "client": 6}

LEASE, BEAT = 2.5, 0.25
"""`link.lease_seconds` and `link.beat_seconds`: short, so that much can be lost in little time."""

BACK_SECONDS = 5.0
"""How soon a client or broker is to be back at work after its hello, and a server's turns after the lease is over."""

LOSS, DOUBLE = 0.02, 0.02
"""Share of the control messages that are dropped, and doubled."""

LOOK_SECONDS = 0.02
"""How often it is looked at what is due, and who has ended."""

MOST_LOADING = 1
"""Peers that may be away or loading when another process is killed: importing torch takes seconds of a core."""

ALONE_SECONDS = 30.0
"""How long nothing else happens after a fault that is looked at alone."""

STUCK_SECONDS = 120.0
"""A run in which no turn moves for so long after the last kill will not end by itself."""

LONGEST_SECONDS = 1200.0
"""Nor will one that goes on for so long."""

FAULTS = "faults.log"
"""In the folder of a run: what came when (unix seconds), to whom, for how long."""

SETTINGS = (
    f"schedule.clients={COUNTS['client']}",
    "schedule.rejoin_timeout=86400",
    "schedule.round_timeout=0",
    "server.threads=1",
    "client.threads=1",
    "data.train_size=480",
    "data.test_size=120",
    "train.batch_size=10",
    f"link.lease_seconds={LEASE}",
    f"link.beat_seconds={BEAT}",
)

RTT_MS = 20
"""What each client's link adds to a round trip: a run lasts longer by that, and computes no more."""


class Mode(NamedTuple):
    """A way to train: keys that are set, and the number of rounds that lasts about half a minute."""

    settings: tuple[str, ...]
    rounds: int


MODES: Mapping[str, Mode] = {
    "round_robin": Mode(("schedule.policy=round_robin", "run.commit_every=2"), 15),
    "replica": Mode(("schedule.policy=parallel", "schedule.server_model=replica"), 40),
    "shared": Mode(("schedule.policy=parallel", "schedule.server_model=shared"), 20),
    "fused": Mode(("schedule.policy=parallel", "schedule.server_model=fused"), 30),
}


class Outcome(NamedTuple):
    """How a run under faults went: no verdict where it did not end. If not well, `sentence` says why, `kept` where."""

    mode: str
    seconds: float
    injected: Counter[str]
    verdict: Verdict | None
    recoveries: list[Recovery]
    sentence: str
    kept: str

    @property
    def good(self) -> bool:
        """Whether it is as if nothing had happened."""
        return self.verdict is not None and self.verdict.good


class FailedError(Exception):
    """A run cannot end by itself any more, for the reason given."""


# One run under faults


class Chaos:
    """Does to a fleet what is due, and sees who ends by himself."""

    def __init__(self, fleet: Fleet, disk: Disk | None, wires: Cables | None, drawn: Iterator[Fault]) -> None:
        self.fleet, self.disk, self.wires, self.drawn = fleet, disk, wires, drawn
        self.watch = fleet.watch
        self.injected: Counter[str] = Counter()
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._busy: set[str] = set()
        self._doubles: list[tuple[Member, str, float]] = []
        self._next: Fault | None = None
        self._due = self._until = 0.0
        self._trial: tuple[Trial | None, float] | None = None

    def run(self) -> None:
        """Go on until the broker has ended well. Raises FailedError where that will not be."""
        self.fleet.start()
        self.watch.moved = self._due = time.monotonic()
        self._until = self._due + LONGEST_SECONDS
        try:
            while self.fleet.broker.code is None:
                self._look(time.monotonic())
                time.sleep(LOOK_SECONDS)
            if self.fleet.broker.code:
                raise FailedError(f"the broker ended by itself: {self.fleet.broker.last_words}")
            self.fleet.let_leave()
        finally:
            for double, *_ in self._doubles:
                double.kill()

    def _look(self, now: float) -> None:
        while self._agenda and self._agenda[0][0] <= now:
            heapq.heappop(self._agenda)[2]()
        self._look_at_doubles(now)
        for peer in self.fleet.peers:
            if peer.code and self.fleet.broker.code is None:
                raise FailedError(f"{peer.name} ended by itself: {peer.last_words}")
        if now - self.watch.moved > STUCK_SECONDS:
            raise FailedError(f"nothing moved for {STUCK_SECONDS:g} s")
        if now > self._until:
            raise FailedError(f"it has not ended after {LONGEST_SECONDS:g} s")
        if self._may_go_on(now):
            self._draw(now)

    def _may_go_on(self, now: float) -> bool:
        """Whether another fault may come: not beside one that has to be alone."""
        if self._doubles:
            return False
        if self._trial is not None:
            trial, until = self._trial
            if trial is not None and trial.seconds is None and now < until:
                return False
            self._trial, self._due = None, now + (self._next.pause if self._next else 0.0)
        return True

    def _draw(self, now: float) -> None:
        """Let the next fault come once it is due."""
        if self._next is None:
            self._next = next(self.drawn)
            self._due = now + self._next.pause
        if now < self._due or self._must_wait(self._next):
            return
        fault, self._next = self._next, None
        done = self._inject(fault, now)
        self.injected[fault.kind] += done
        with (self.fleet.folder / FAULTS).open("a") as log:
            note = "" if done else "  (not done: its target is under another one)"
            log.write(f"{time.time():.3f} {self._target(fault).name}: {fault.kind}, {fault.seconds:.2f} s{note}\n")

    def _must_wait(self, fault: Fault) -> bool:
        """Whether a fault is to find all others over, or would take away more processes than this machine can load.

        The rest comes from the first moment on; a second process has to come after the first one.
        """
        second = fault.kind == "duplicate client"
        alone = fault.alone or second
        if len(self.watch.loading) > (0 if alone else MOST_LOADING) or (second and not self.watch.begun):
            return True
        return alone and bool(self._busy)

    def _inject(self, fault: Fault, now: float) -> bool:
        """Do it, unless whom it is meant for is under another one; return whether it was done."""
        member = self._target(fault)
        if member.name in self._busy:
            return False
        if self.disk is not None and fault.kind == "full disk":
            if member.name in self.watch.loading:
                return False
            self._fill(self.disk, member, fault.seconds, now)
            return True
        verb = fault.kind.split()[0]
        if verb == "kill":
            self._kill(member, fault, now)
        elif verb == "stop":
            self._hold(member, fault.seconds, now)
        elif verb == "half-open":
            self._swallow(member, fault.seconds, now)
        elif verb == "cable":
            self._unplug(member, fault.seconds, now)
        elif verb == "duplicate":
            double = self.fleet.double_of(member.name)
            double.start()
            self._doubles.append((double, member.name, now))
        else:
            assert member.proxy is not None
            return bool(member.proxy.cut(self.fleet.ports[fault.port] if fault.kind == "cut one" else None))
        return True

    def _target(self, fault: Fault) -> Member:
        members = [m for m in self.fleet.members.values() if m.role == fault.role]
        members = members or self.fleet.peers
        return members[int(fault.target * len(members))]

    def _kill(self, member: Member, fault: Fault, now: float) -> None:
        goal = BACK_SECONDS + (LEASE if member.role == "server" else 0.0)
        trial = self.watch.trial(fault.kind, member.name, goal) if fault.alone else None
        member.kill()
        self.watch.killed(member.name)

        def again() -> None:
            member.start()
            self.watch.restarted(member.name)

        self._for(member.name, fault.seconds, now, again)
        self._trial = (trial, now + ALONE_SECONDS) if trial is not None else None

    def _hold(self, member: Member, seconds: float, now: float) -> None:
        member.signal(signal.SIGSTOP)
        self._for(member.name, seconds, now, lambda: member.signal(signal.SIGCONT))

    def _swallow(self, member: Member, seconds: float, now: float) -> None:
        proxy = member.proxy
        assert proxy is not None
        proxy.swallow()
        self._for(member.name, seconds, now, proxy.cut)

    def _unplug(self, member: Member, seconds: float, now: float) -> None:
        wires, proxy = self.wires, member.proxy
        assert wires is not None
        assert proxy is not None
        wires.pull(proxy.host)
        self._for(member.name, seconds, now, lambda: wires.plug(proxy.host))

    def _fill(self, disk: Disk, broker: Member, seconds: float, now: float) -> None:
        """Fill the disk. The broker lives on meanwhile: one that is started on a full disk ends with a sentence."""
        disk.fill()
        self._for(broker.name, seconds, now, disk.free)

    def _for(self, name: str, seconds: float, now: float, ended: Callable[[], object]) -> None:
        """Have a fault of this member end after so many seconds; until then nothing else happens to it."""
        self._busy.add(name)

        def end() -> None:
            self._busy.discard(name)
            ended()

        heapq.heappush(self._agenda, (now + seconds, next(self._numbers), end))

    def _look_at_doubles(self, now: float) -> None:
        """See that who claimed another's index was refused. Raises FailedError where not."""
        for entry in list(self._doubles):
            double, client, since = entry
            if double.code is None and now - since < STUCK_SECONDS:
                continue
            self._doubles.remove(entry)
            code, words = double.code, double.last_words
            double.kill()
            if (code, "already running" in words) != (1, True):
                raise FailedError(f"another {client} was to be refused, and ended with {code}: {words}")


def disturbed(
    mode: str, rounds: int, folder: Path, expected: Run, seed: str, kinds: list[str], shares: tuple[float, float]
) -> Outcome:
    """Do a run under faults in a folder, which is kept where the run was not as it was to be.

    `shares` are those of the control messages that are dropped, and doubled.
    """
    began = time.monotonic()
    folder.mkdir()
    home = folder / "disk"
    home.mkdir()
    watch = Watch(seed, *shares)
    verdict, sentence = None, ""
    with ExitStack() as stack:
        disk = stack.enter_context(small_disk(home)) if "full disk" in kinds else None
        settings = [*settings_of(mode, rounds), f"link.rtt_ms={RTT_MS}"]
        net = stack.enter_context(Net())
        fleet = stack.enter_context(Fleet(folder, home / "run", settings, COUNTS, net, watch))
        wires = stack.enter_context(cables()) if "cable out" in kinds else None
        here = {"full disk": disk is not None, "cable out": wires is not None}
        mine = [kind for kind in kinds if here.get(kind, True)]
        if mine != kinds:
            say(f"left out, since it takes root: {', '.join(kind for kind in kinds if kind not in mine)}")
        chaos = Chaos(fleet, disk, wires, faults(Random(seed), mine, LEASE) if mine else iter(()))
        try:
            chaos.run()
            verdict = judge(expected, fleet.out, watch.seen_jobs())
        except FailedError as failure:
            sentence = str(failure)
        except (OSError, ValueError, KeyError) as error:
            sentence = f"the folder cannot be read: {type(error).__name__}: {error}"
        outcome = Outcome(
            mode,
            time.monotonic() - began,
            chaos.injected + watch.injected,
            verdict,
            watch.recoveries(),
            sentence,
            str(folder),
        )
        if disk is not None and not outcome.good:
            shutil.copytree(home / "run", folder / "run")  # the disk goes, this stays
    if outcome.good:
        shutil.rmtree(folder)
        return outcome._replace(kept="")
    return outcome


def undisturbed(mode: str, rounds: int, folder: Path) -> Run:
    """Do the same run with nothing in its way; return what it left."""
    options = itertools.chain.from_iterable(("--set", s) for s in ("broker.port=0", *settings_of(mode, rounds)))
    out = folder / f"undisturbed-{mode}"
    with subprocess.Popen(
        [ZSPLIT, "run", "--json", "--no-monitor", "--out", out, *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            _, said = process.communicate()
        finally:
            process.terminate()
    if process.returncode:
        raise click.ClickException(f"the undisturbed run failed: {said.strip()}")
    return read_run(out)


def settings_of(mode: str, rounds: int) -> list[str]:
    """Return what is set in a mode."""
    return [*SETTINGS, *MODES[mode].settings, f"run.rounds={rounds}"]


# The command


def figures_of(seed: int, outcomes: list[Outcome]) -> dict[str, Any]:
    """Return all figures."""
    recoveries = [recovery for outcome in outcomes for recovery in outcome.recoveries]
    return {
        "seed": seed,
        "runs": [
            {
                "mode": each.mode,
                "seconds": each.seconds,
                "injected": dict(each.injected),
                "survived": False,
                "lost": None,
                "twice": None,
                "identical": False,
                **(each.verdict._asdict() if each.verdict else {}),
                "sentence": each.sentence,
                "kept": each.kept,
                "recoveries": [recovery._asdict() for recovery in each.recoveries],
            }
            for each in outcomes
        ],
        "injected": dict(sum((each.injected for each in outcomes), Counter())),
        **{
            name: sum(getattr(each.verdict, name) for each in outcomes if each.verdict)
            for name in ("survived", "lost", "twice", "identical")
        },
        "back": {kind: back_of([r for r in recoveries if r.kind == kind]) for kind in {r.kind for r in recoveries}},
        "ok": all(each.good for each in outcomes),
    }


def back_of(recoveries: list[Recovery]) -> dict[str, float]:
    """Return how soon all was at work again: median and worst, and how many times it was within what it is to be."""
    seconds = [recovery.seconds for recovery in recoveries]
    return {
        "count": len(seconds),
        "median": median(seconds),
        "worst": max(seconds),
        "goal": recoveries[0].goal,
        "within": sum(recovery.seconds <= recovery.goal for recovery in recoveries),
    }


def tables_of(figures: dict[str, Any]) -> Iterator[Table]:
    """Yield the figures as tables."""
    table = Table(title=f"Seed {figures['seed']}: {len(figures['runs'])} runs under faults", box=SIMPLE)
    table.add_column("run")
    for column in ("s", "faults", "messages", "survived", "lost", "twice", "identical"):
        table.add_column(column, justify="right")
    for each in figures["runs"]:
        counts = [str(each[name]) if each[name] is not None else "?" for name in ("lost", "twice")]
        words = ["yes" if each[name] else "no" for name in ("survived", "identical")]
        table.add_row(each["mode"], f"{each['seconds']:.0f}", *_amounts(each["injected"]), words[0], *counts, words[1])
    total = [str(figures[name]) for name in ("survived", "lost", "twice", "identical")]
    seconds = sum(each["seconds"] for each in figures["runs"])
    table.add_row("all", f"{seconds:.0f}", *_amounts(figures["injected"]), *total, style="bold")
    yield table

    table = Table(title="What was done to them", box=SIMPLE)
    table.add_column("fault")
    for column in ("times", "at work again: median s", "worst", "within what it is to be"):
        table.add_column(column, justify="right")
    for kind, times in sorted(figures["injected"].items()):
        back = figures["back"].get(kind)
        cells = (
            (f"{back['median']:.1f}", f"{back['worst']:.1f}", f"{back['within']} of {back['count']} ({back['goal']:g})")
            if back
            else ("", "", "")
        )
        table.add_row(kind, str(times), *cells)
    yield table


def _amounts(injected: Mapping[str, int]) -> tuple[str, str]:
    """Return the number of faults, and of messages that were dropped or doubled."""
    messages = sum(times for kind, times in injected.items() if kind.startswith("message"))
    return str(sum(injected.values()) - messages), str(messages)


def _list(allowed: Mapping[str, object]) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    def chosen(_context: click.Context, _option: click.Parameter, text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        for name in names:
            if name not in allowed:
                raise click.BadParameter(f"{name!r} is none of {', '.join(allowed)}")
        return names

    return chosen


def say(text: str) -> None:
    """Say on stderr what is being done."""
    click.echo(text, err=True)


@click.command(context_settings={"show_default": True})
@click.option("--minutes", default=10.0, type=click.FloatRange(min=0), help="How long; one run at least is ended.")
@click.option("--seed", default=1, help="All faults are drawn from it.")
@click.option("--modes", default=",".join(MODES), callback=_list(MODES), help="What is trained, one after the other.")
@click.option("--rounds", default=0, type=click.IntRange(min=0), help="Rounds of a run; 0: about half a minute.")
@click.option("--only", "kinds", default=",".join(KINDS), callback=_list(KINDS), help="Kinds of faults.")
@click.option("--lossless", is_flag=True, help="Drop and double no messages.")
@json_option
def main(
    minutes: float, seed: int, modes: list[str], rounds: int, kinds: list[str], lossless: bool, file: Path | None
) -> None:
    """Train under random faults, and compare with training under none."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = Path(tempfile.mkdtemp(prefix="zsplit-chaos-"))
    until = time.monotonic() + 60 * minutes
    expected: dict[str, Run] = {}
    outcomes: list[Outcome] = []
    try:
        for number, mode in enumerate(itertools.cycle(modes)):
            if outcomes and time.monotonic() + max(each.seconds for each in outcomes) > until:
                break
            many = rounds or MODES[mode].rounds
            if mode not in expected:
                say(f"{mode}, undisturbed …")
                expected[mode] = undisturbed(mode, many, folder)
            say(f"{mode} under faults …")
            run = folder / f"run-{number}-{mode}"
            shares = (0.0, 0.0) if lossless else (LOSS, DOUBLE)
            outcomes.append(disturbed(mode, many, run, expected[mode], f"{seed}/{number}", kinds, shares))
            if not outcomes[-1].good:
                say(f"{mode}: {outcomes[-1].sentence or 'it differs from the undisturbed run'}; kept in {folder}")
    finally:
        if all(each.good for each in outcomes):
            shutil.rmtree(folder)
    figures = figures_of(seed, outcomes)
    for table in tables_of(figures):
        show(table)
    write(file, {"machine": machine("torch", "pyzmq"), **figures})
    sys.exit(0 if figures["ok"] else 1)


if __name__ == "__main__":
    main()
