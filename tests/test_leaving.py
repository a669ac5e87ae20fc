"""A peer that gets SIGTERM leaves when it can: a client after its step, a server after its turns."""

import os
import signal
from pathlib import Path
from threading import Thread
from typing import Any, cast
from unittest.mock import Mock

import pytest
from conftest import QUICK, Processes, settings, until
from helpers import config_of
from lone_link import LEASE, TURN

from zsplit.errors import ConfigError, RunFailedError
from zsplit.train import client as client_module
from zsplit.train import peer
from zsplit.train import server as server_module
from zsplit.train.client import Client, Left, Revoked
from zsplit.train.jobs import Training
from zsplit.train.link import Leave, Link
from zsplit.train.server import Server
from zsplit.wire.messages import Finish, Orders

LEAVE = Leave("stopped by SIGTERM")
OVER = Finish(ok=True, sentence="the run is finished")


@pytest.fixture(autouse=True)
def _undescribed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (client_module, server_module):
        monkeypatch.setattr(module, "describe", Mock())


def link_with(*events: object) -> Any:
    """Return a link on which these events come, and then nothing at once."""
    link = Mock(welcome=Mock(index=3))
    link.next.side_effect = [*events, None]
    return link


def client_with(*events: object) -> Client:
    return Client(cast("Link", link_with(*events)), config_of(), Mock(), Mock())


def server_with(*events: object) -> Server:
    return Server(cast("Link", link_with(*events)), config_of(), Mock())


def test_a_client_that_waits_leaves_at_once() -> None:
    assert client_with(LEAVE).serve() == Finish(ok=True, sentence="client 3 left: stopped by SIGTERM")


def test_a_client_leaves_between_two_steps_and_not_within_one() -> None:
    client = client_with(LEAVE)
    assert client._wait(LEASE, leaves=False) is None
    with pytest.raises(Left, match="after its step: stopped by SIGTERM"):
        client._look_up(LEASE)


@pytest.mark.parametrize("leaves", [True, False])
def test_between_two_steps_a_client_sees_that_its_turn_was_taken_away(leaves: bool) -> None:
    client = client_with(*[LEAVE] * leaves, Orders(revision=1))
    with pytest.raises(Revoked):
        client._look_up(LEASE)


def test_between_two_steps_a_client_goes_on_where_nothing_has_changed() -> None:
    client = client_with(Orders(revision=1, jobs=(TURN,)))
    client._look_up(LEASE)
    assert client.orders.jobs == (TURN,)


def test_a_server_without_turns_leaves_at_once() -> None:
    assert server_with(LEAVE).serve() == Finish(ok=True, sentence="server 3 left: stopped by SIGTERM")


def test_a_server_leaves_when_its_turns_are_over_and_begins_none_meanwhile() -> None:
    other = Mock(lease=Mock())
    server = server_with(Orders(revision=1, jobs=(TURN,)), LEAVE, Orders(revision=2, jobs=(TURN, other)))
    begun: list[object] = []
    server._handler = lambda job: begun.append(job) or Mock(spec=Training)  # type: ignore[method-assign]
    server._drop = Mock()  # type: ignore[method-assign]
    link = cast("Mock", server.link)
    link.next.side_effect = [*link.next.side_effect, Orders(revision=3, jobs=(other,))]
    assert server.serve() == Finish(ok=True, sentence="server 3 left: stopped by SIGTERM")
    assert begun == [TURN]


def test_a_signal_asks_once_and_the_second_one_is_what_it_always_was() -> None:
    link, before = Mock(), signal.getsignal(signal.SIGTERM)
    with peer._draining(link):
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: link.leave.called)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    link.leave.assert_called_once_with("stopped by SIGTERM")
    assert signal.getsignal(signal.SIGTERM) is before


def test_no_other_thread_than_the_main_one_touches_signals() -> None:
    seen: list[object] = []

    def live() -> None:
        with peer._draining(Mock()):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = Thread(target=live)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.parametrize(("error", "fatal"), [(RunFailedError, True), (ConfigError, False)])
def test_the_broker_is_told_what_went_wrong_and_whether_anybody_can_go_on(error: type[Exception], fatal: bool) -> None:
    link = Mock()
    with pytest.raises(error):
        peer._live(link, 1.0, Mock(side_effect=error("the loss became nan")))
    link.fault.assert_called_once_with("the loss became nan", fatal=fatal)
    link.close.assert_called_once()


def test_a_bug_ends_one_peer() -> None:
    link = Mock()
    with pytest.raises(OSError, match="the disk is scratched"):
        peer._live(link, 1.0, Mock(side_effect=OSError("the disk is scratched")))
    link.fault.assert_called_once_with("it failed with OSError: the disk is scratched")


def test_a_run_that_the_broker_ended_is_no_news_to_it() -> None:
    link = Mock()
    assert peer._live(link, 1.0, lambda: OVER) == "the run is finished"
    with pytest.raises(RunFailedError, match="client 1 is gone"):
        peer._live(link, 1.0, lambda: Finish(ok=False, sentence="client 1 is gone"))
    link.fault.assert_not_called()


def test_processes_that_are_terminated_say_so_and_end_well(processes: Processes) -> None:
    options = settings("broker.port=0", *QUICK, "schedule.clients=1", "run.rounds=100000")
    broker = processes.start("broker", *options, "--out", "out")
    address = broker.line("The broker listens at ").split()[4].rstrip(";")
    first, second = (processes.start("server", "--broker", address) for _ in range(2))
    names = [server.line("joined the run").split()[1] for server in (first, second)]
    second.process.send_signal(signal.SIGTERM)
    assert second.wait() == 0
    assert second.err[-1] == f"server {names[1]} left: stopped by SIGTERM"
    client = processes.start("client", "--broker", address)
    metrics: Path = processes.folder / "out" / "metrics.jsonl"
    until(metrics.exists)
    client.process.send_signal(signal.SIGTERM)
    assert client.wait() == 0
    assert client.err[-1] in {f"client 0 left{when}: stopped by SIGTERM" for when in ("", " after its step")}
    broker.process.send_signal(signal.SIGINT)
    assert (first.wait(), broker.wait()) == (1, 1)
