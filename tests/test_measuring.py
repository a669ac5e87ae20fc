"""What peers tell of themselves while they measure."""

from typing import cast
from unittest.mock import Mock

import pytest
from helpers import LINK, PROFILE, config_of

from zsplit.train import client as client_module
from zsplit.train import server as server_module
from zsplit.train.client import Client
from zsplit.train.link import Incoming, Link
from zsplit.train.server import Server
from zsplit.wire.messages import Finish, Held, Kind, Lease, Measure, Orders, TensorMeta, Tensors

LEASE = Lease(1, 7)


def test_a_client_says_that_it_measures_before_it_begins_to(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def reported(held: Held) -> None:
        assert held.lease == LEASE
        said.append(held.state)

    link = Mock(welcome=Mock(index=0), report=reported)
    link.next.side_effect = [
        Orders(revision=1, jobs=(Measure(lease=LEASE, server=0, client=0),)),
        Orders(revision=2, finish=Finish(ok=True, sentence="the run is finished")),
    ]
    monkeypatch.setattr(client_module, "describe", Mock())
    monkeypatch.setattr(client_module, "measure", lambda *_: said.append("measured") or PROFILE)
    monkeypatch.setattr(client_module, "measure_link", lambda _: LINK)
    assert Client(cast("Link", link), config_of(), Mock(), Mock()).serve().sentence == "the run is finished"
    assert said == ["running", "measured", "done"]


@pytest.mark.parametrize(("kind", "samples"), [("train", 32), ("eval", 32), ("probe", 0)])
def test_the_bytes_of_a_probe_do_not_pass_for_samples(
    monkeypatch: pytest.MonkeyPatch, kind: Kind, samples: int
) -> None:
    meta = TensorMeta("other", "U8", (32,), "raw", 32)
    message = Tensors("run", "session", LEASE, kind, 0, (meta,), 0, 0)
    link = Mock()
    link.next.side_effect = [
        Incoming(message, {}, 0.0),
        Orders(revision=1, finish=Finish(ok=True, sentence="the run is finished")),
    ]
    monkeypatch.setattr(server_module, "describe", Mock())
    monkeypatch.setattr(server_module, "TELEMETRY_SECONDS", 0.0)
    server = Server(cast("Link", link), config_of(), Mock())
    server.jobs[LEASE] = Mock()
    server.serve()
    (_, per_second, _) = link.telemetry.call_args.args
    assert bool(per_second) == bool(samples)
