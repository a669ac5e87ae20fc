"""Who is who and what may pass: the broker's rules, played with routing ids in place of sockets."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from desk import RUN, Desk, Member, Stage
from helpers import (
    LINK,
    NO_SUCH_LEASE,
    PROFILE,
    Play,
    anything,
    configs,
    fingerprint,
    flat,
    sizes_for,
    through_the_journal,
    unhurried,
)
from hypothesis import given
from hypothesis import strategies as st

from zsplit.config import Config, from_json
from zsplit.errors import RemoteProtocolError
from zsplit.monitor.board import Board
from zsplit.wire.events import decode_event
from zsplit.wire.frames import MAX_HEADER, check_sizes, decode_control, encode
from zsplit.wire.manifest import digest_of
from zsplit.wire.messages import (
    PROTOCOL,
    Attach,
    Attached,
    Beat,
    Bye,
    Chunk,
    DataMessage,
    Detached,
    Evaluate,
    Fault,
    Finish,
    Held,
    Hello,
    Init,
    Job,
    Lease,
    Measure,
    Merge,
    Orders,
    Plan,
    Pull,
    Ref,
    Refused,
    Resend,
    Role,
    Step,
    Tally,
    Telemetry,
    TensorMeta,
    Turn,
    Welcome,
)
from zsplit_broker.bulletin import Bulletin
from zsplit_broker.events import Done, Entry, Event, Joined, Lost, Planned, Ready, Started
from zsplit_broker.relay import BROKER, Route, peer_of
from zsplit_broker.router import NEWCOMERS
from zsplit_broker.summary import summarise
from zsplit_broker.work import Peer, client_of

GRADIENTS = TensorMeta("gradients", "F32", (2, 3), "raw", 24)

# Hello


def test_a_welcome_tells_who_one_is_and_hands_the_config_out() -> None:
    desk = Desk(run__name="trial", run__seed=7)
    answer = desk.hello("client", 2)
    assert isinstance(answer, Welcome)
    assert (answer.run, answer.index, answer.data_port, answer.events_port) == (RUN, 2, 5758, 5759)
    assert from_json(answer.config) == desk.config


def test_who_leaves_the_index_to_the_broker_gets_the_lowest_that_is_free() -> None:
    desk = Desk(schedule__clients=3)
    desk.enter("client", 1)
    indexes = [desk.enter("client", instance=name).index for name in ("x", "y")]
    assert indexes == [0, 2]
    assert desk.hello("client", instance="z") == Refused(sentence="all 3 clients of this run are here", code=2)
    assert [desk.enter("server", instance=name).index for name in ("p", "q", "r")] == [0, 1, 2]


def test_a_monitor_is_welcome_and_holds_no_session() -> None:
    desk = Desk()
    answer = desk.hello("monitor")
    assert isinstance(answer, Welcome)
    assert (answer.index, desk.router.sessions) == (-1, {})


def test_an_index_out_of_range_is_refused() -> None:
    assert Desk(schedule__clients=4).hello("client", 4) == Refused(
        sentence="client index 4 is out of range: this run has 4 clients, 0 to 3 (schedule.clients)", code=2
    )


@pytest.mark.parametrize("role", ["client", "server", "monitor"])
def test_another_protocol_is_refused_with_both_numbers(role: Role) -> None:
    assert Desk().hello(role, protocol=PROTOCOL + 1) == Refused(
        sentence=f"this broker speaks protocol {PROTOCOL}, you speak {PROTOCOL + 1}: "
        "install the same version of zsplit on both machines",
        code=2,
    )


@pytest.mark.parametrize("role", ["client", "server"])
def test_a_run_that_is_over_refuses_everybody_who_would_work(role: Role) -> None:
    desk = Desk()
    desk.router.finish = Finish(ok=True, sentence="the run is finished")
    assert desk.hello(role) == Refused(sentence="this run is over: the run is finished", code=2)
    assert isinstance(desk.hello("monitor"), Welcome)


def test_a_second_process_with_the_same_index_is_sent_away_once_the_first_has_proved_alive() -> None:
    desk = Desk()
    first = desk.join("client", 1)
    assert desk.hello("client", 1, "second", host="here") is None
    assert desk.probed == [first.control]
    assert desk.hello("client", 1, "second", host="here") is None
    desk.beat(first)
    assert desk.hello("client", 1, "second", host="here") == Refused(
        sentence="client 1 is already running on another host", code=1
    )
    assert desk.session(first).instance == "client 1"


def test_it_is_told_where_the_first_one_runs() -> None:
    desk = Desk()
    control = desk.routing_id()
    answer = desk.hello("client", 0, control=control, host="gpu-7")
    assert isinstance(answer, Welcome)
    assert desk.hello("client", 0, "second", host="here") is None
    desk.router.control(Beat(session=answer.session, sent=1.0, revision=1), control, desk.now)
    refusal = desk.hello("client", 0, "second", host="here")
    assert isinstance(refusal, Refused)
    assert refusal.sentence == "client 0 is already running on gpu-7"


def test_a_server_that_wakes_and_finds_its_index_given_away_gets_another_one_and_keeps_that() -> None:
    desk = Desk()
    sleeper = desk.join("server", instance="sleeper")
    desk.after(desk.config.link.lease_seconds + 1.0)
    assert desk.router.session(sleeper.token) is None
    newcomer = desk.join("server", instance="newcomer")
    assert newcomer.index == sleeper.index == 0
    assert desk.hello("server", 0, "sleeper") is None
    desk.beat(newcomer)
    again = desk.join("server", 0, "sleeper")
    assert again.index == 1
    assert desk.session(newcomer).instance == "newcomer"
    desk.take(desk.router.control(Bye(session=newcomer.token), newcomer.control, desk.now))
    for index in (0, 1):  # an old hello that comes late changes nothing
        answer = desk.hello("server", index, "sleeper")
        assert isinstance(answer, Welcome)
        assert (answer.session, answer.index) == (again.token, 1)


def test_a_server_that_slept_takes_the_place_of_nobody() -> None:
    desk = Desk()
    sleeper = desk.join("server", instance="sleeper")
    desk.after(desk.config.link.lease_seconds + 1.0)
    newcomer, other = (desk.join("server", instance=name) for name in ("newcomer", "other"))
    desk.router.unreachable(other.control)  # for the moment in which it makes a new connection
    assert desk.hello("server", 0, "sleeper") is None
    desk.beat(newcomer)
    assert desk.join("server", sleeper.index, "sleeper").index == 2
    assert desk.session(other).instance == "other"


def test_who_asks_for_an_index_and_never_again_is_forgotten() -> None:
    desk = Desk()
    first = desk.join("client", 1)
    for number in range(3 * NEWCOMERS):
        assert desk.hello("client", 1, f"number {number}") is None
    assert len(desk.session(first).challenged) == NEWCOMERS
    desk.beat(first)
    assert isinstance(desk.hello("client", 1, f"number {3 * NEWCOMERS - 1}"), Refused)


def test_a_server_whose_welcome_was_lost_is_welcome_when_it_asks_again() -> None:
    desk = Desk()
    assert isinstance(desk.hello("server", instance="first"), Welcome)
    desk.now += 2 * desk.config.link.beat_seconds
    assert isinstance(desk.hello("server", instance="first"), Welcome)
    assert len(desk.router.sessions) == 1


def test_what_proved_the_first_one_alive_to_one_newcomer_proves_nothing_to_a_later_one() -> None:
    desk = Desk()
    first = desk.join("client", 1)
    assert desk.hello("client", 1, "second") is None  # and does not wait for the answer
    desk.now += 5.0
    desk.beat(first)
    desk.now += 1.0
    assert desk.hello("client", 1, "third") is None
    assert desk.probed == [first.control]


def test_newcomers_for_one_index_do_not_keep_each_other_from_their_answers() -> None:
    desk = Desk()
    first = desk.join("client", 1)
    newcomers = ("second", "third")
    assert [desk.hello("client", 1, instance) for instance in newcomers] == [None, None]
    desk.beat(first)
    assert all(isinstance(desk.hello("client", 1, instance), Refused) for instance in newcomers)


def test_what_a_dead_one_had_said_before_proves_nothing_however_late_it_comes() -> None:
    desk = Desk()
    first = desk.join("client", 1)
    before = desk.orders(first).revision
    assert desk.hello("client", 1, "second") is None
    desk.now += 5.0  # its connection holds that long what it had sent, and the broker stands still besides
    desk.router.tick(desk.now)
    desk.beat(first, revision=before)
    assert desk.hello("client", 1, "second") is None
    desk.router.unreachable(first.control)
    assert isinstance(desk.hello("client", 1, "second"), Welcome)


@pytest.mark.parametrize("beat_seconds", [1.0, 4.9])
def test_a_newcomer_waits_while_the_first_one_is_silent_and_takes_its_place_when_it_is_lost(
    beat_seconds: float,
) -> None:
    desk = Desk(link__lease_seconds=10.0, link__beat_seconds=beat_seconds)
    old = desk.join("client", 1)
    lost: list[Event] = []
    while not lost:
        assert desk.hello("client", 1, "second") is None
        lost = desk.after(0.5)
    assert lost == [Lost("client", 1, "no sign of life for 10 s (link.lease_seconds)")]
    assert 10.0 < desk.now < 10.0 + beat_seconds
    answer = desk.hello("client", 1, "second")
    assert isinstance(answer, Welcome)
    assert answer.session != old.token
    assert desk.router.session(old.token) is None


def test_a_newcomer_takes_the_place_of_one_whose_connection_closed_at_once() -> None:
    desk = Desk()
    old = desk.join("client", 1)
    assert desk.hello("client", 1, "second") is None
    desk.router.unreachable(desk.probed[0])
    answer = desk.hello("client", 1, "second")
    assert isinstance(answer, Welcome)
    assert answer.session != old.token
    assert desk.log[-1] == Lost("client", 1, "its connection closed, and another process took its place")
    assert desk.scheduler.peers == {}


def test_a_newcomer_that_wants_any_index_gets_that_of_one_that_cannot_be_reached() -> None:
    desk = Desk()
    gone = desk.join("server", instance="first")
    desk.now += 2 * desk.config.link.beat_seconds
    assert desk.hello("server", instance="second") is None, "it may be there: it is asked"
    desk.router.unreachable(gone.control)
    welcome = desk.hello("server", instance="second")
    assert isinstance(welcome, Welcome)
    assert welcome.index == 0
    assert ("server", 0) not in desk.scheduler.peers


def test_one_whose_connection_closed_and_who_came_back_is_not_replaced() -> None:
    desk = Desk()
    first = desk.join("client", 1)
    desk.router.unreachable(first.control)
    first.control = desk.routing_id()
    assert isinstance(desk.hello("client", 1, "client 1", control=first.control), Welcome)
    assert desk.hello("client", 1, "second") is None
    assert desk.probed == [first.control]


def test_one_process_that_says_hello_again_has_its_session_again_on_the_new_connection() -> None:
    desk = Desk()
    member = desk.join("client", 1)
    again = desk.routing_id()
    answer = desk.hello("client", 1, "client 1", control=again)
    assert isinstance(answer, Welcome)
    assert answer.session == member.token
    assert desk.beat(member) == []
    assert desk.router.dropped == 1
    member.control = again
    desk.beat(member)
    assert desk.router.dropped == 1


def test_a_process_that_left_its_index_to_the_broker_keeps_it_when_it_says_hello_again() -> None:
    desk = Desk()
    member = desk.enter("client", instance="me")
    assert desk.enter("client", instance="somebody else").index == 1
    answer = desk.hello("client", instance="me")
    assert isinstance(answer, Welcome)
    assert (answer.index, answer.session) == (member.index, member.token)


# Who speaks is what the socket says


def test_a_beat_with_somebody_elses_session_is_dropped() -> None:
    stage = Stage()
    thief, owner = stage.clients
    held = (Held(lease=stage.turns[1].lease, state="done", digest="d"),)
    for message in (Beat(session=owner.token, sent=0.0, held=held), Bye(session=owner.token)):
        assert stage.router.control(message, thief.control, stage.now) == []
    assert stage.router.dropped == 2
    assert stage.session(owner).beat.held == ()


@pytest.mark.parametrize("token", ["", "token 99"])
def test_a_beat_of_nobody_is_dropped(token: str) -> None:
    desk = Desk()
    assert desk.router.control(Beat(session=token, sent=0.0), b"id", desk.now) == []
    assert desk.router.dropped == 1


def test_a_beat_for_somebody_elses_lease_reports_nothing() -> None:
    stage = Stage(ready=False)
    for member in (stage.clients[0], stage.servers[0]):
        for state in ("ready", "running", "done"):
            assert stage.beat(member, Held(lease=stage.turns[1].lease, state=state)) == []


def test_a_client_is_not_done_with_a_turn_that_it_was_not_granted() -> None:
    stage = Stage(ready=False)
    assert stage.orders(stage.clients[0]).jobs == ()
    assert stage.done(stage.clients[0], stage.turns[0]) == []


def test_a_client_cannot_say_that_the_server_is_ready() -> None:
    stage = Stage(ready=False)
    assert stage.beat(stage.clients[0], Held(lease=stage.turns[0].lease, state="ready")) == []


# News


def test_news_is_news_once_however_often_it_is_told() -> None:
    stage = Stage(ready=False)
    server, client, turn = stage.servers[0], stage.clients[0], stage.turns[0]
    ready = Held(lease=turn.lease, state="ready")
    assert [stage.beat(server, ready) for _ in range(3)] == [[Ready(turn.lease)], [], []]
    told = [stage.done(client, turn) for _ in range(3)]
    assert [len(events) for events in told] == [1, 0, 0]
    (event,) = told[0]
    assert isinstance(event, Done)
    assert (event.lease, event.side, event.digest) == (turn.lease, "client", digest_of(b"client.0"))


def test_a_ready_that_was_lost_is_made_up_for_by_running() -> None:
    stage = Stage(ready=False)
    lease = stage.turns[0].lease
    assert stage.beat(stage.servers[0], Held(lease=lease, state="running", step=3)) == [Ready(lease)]


def test_a_turn_that_is_done_at_once_is_ready_as_well() -> None:
    stage = Stage(ready=False)
    turn = stage.turns[0]
    ready, done = stage.done(stage.servers[0], turn)
    assert ready == Ready(turn.lease)
    assert isinstance(done, Done)
    assert stage.job(stage.clients[0]) == turn, "the client's side is not done by that"


def test_a_peer_joins_once_it_is_prepared() -> None:
    desk = Desk()
    member = desk.enter("client", 0)
    assert desk.beat(member, prepared=None) == []
    assert desk.beat(member) == [Joined("client", 0, desk.shards[0], "client 0")]
    assert desk.beat(member) == []


def test_a_peer_that_leaves_or_fails_is_lost_with_its_own_words() -> None:
    desk = Desk()
    one, other = desk.join("client", 0), desk.join("client", 1)
    fault = Fault(session=one.token, sentence="the data folder is empty")
    assert desk.router.control(fault, one.control, 0.0) == [Lost("client", 0, "the data folder is empty")]
    assert desk.router.control(Bye(session=other.token), other.control, 0.0) == [Lost("client", 1, "it left")]
    assert desk.router.sessions == {}
    assert isinstance(desk.router.relay.route(one.data, desk.tensors(one, NO_SUCH_LEASE), 0), Route)


def test_a_peer_whose_connection_closed_has_its_lease_to_come_back() -> None:
    desk = Desk(link__lease_seconds=10.0)
    member = desk.join("client", 0)
    desk.router.unreachable(b"nobody's")
    desk.router.unreachable(member.control)
    assert desk.after(4.0) == []
    member.control = desk.routing_id()
    assert isinstance(desk.hello("client", 0, "client 0", control=member.control), Welcome)
    desk.beat(member)
    assert desk.after(9.0) == []


def test_before_the_run_begins_a_closed_connection_counts_as_lost_after_half_a_lease() -> None:
    desk = Desk(link__lease_seconds=10.0)
    member = desk.join("client", 0)
    desk.router.unreachable(member.control)
    assert desk.after(6.0) == [Lost("client", 0, "its connection closed")]


def test_telemetry_is_no_news_but_is_kept_for_the_monitor() -> None:
    desk = Desk()
    member = desk.join("client", 0)
    telemetry = Telemetry(session=member.token, losses=(2.0, 1.0), samples_per_second=9.0)
    assert desk.router.control(telemetry, member.control, 0.0) == []
    assert (desk.session(member).telemetry, desk.session(member).losses) == (telemetry, [2.0, 1.0])


# Signs of life


def test_a_peer_that_beats_lives_and_one_that_does_not_is_lost() -> None:
    desk = Desk(link__lease_seconds=10.0)
    quick, silent = desk.join("client", 0), desk.join("client", 1)
    for _ in range(9):
        assert desk.after(1.0) == []
        desk.beat(quick)
    assert desk.after(1.5) == [Lost("client", 1, "no sign of life for 10 s (link.lease_seconds)")]
    assert desk.router.session(silent.token) is None


def test_the_clock_is_looked_at_every_half_beat_and_when_a_lease_ends() -> None:
    desk = Desk(link__lease_seconds=10.0, link__beat_seconds=4.0)
    assert desk.router.next_tick(desk.now) == desk.now + 2.0
    quick, silent = desk.join("client", 0), desk.join("client", 1)
    end = desk.now + 10.0
    assert desk.after(9.0) == []
    desk.beat(quick)
    assert desk.router.next_tick(desk.now) == end
    desk.now = end
    assert desk.router.tick(desk.now) == []
    desk.now += 0.001
    assert [type(event) for event in desk.router.tick(desk.now)] == [Lost]
    assert desk.router.session(silent.token) is None
    assert desk.router.next_tick(desk.now) == desk.now + 2.0


def test_a_peer_that_beats_without_progress_is_lost_when_it_should_be_running() -> None:
    stage = Stage(link__progress_seconds=5.0)
    client, turn = stage.clients[0], stage.turns[0]
    lost: list[Event] = []
    for second in range(12):
        for member in (*stage.servers, stage.clients[1]):
            stage.beat(member)
        step = min(second, 4)
        stage.beat(client, Held(lease=turn.lease, state="running", step=step))
        lost = stage.after(1.0)
        assert not lost or second >= 8
        if lost:
            break
    assert lost == [Lost("client", 0, "it beats, but makes no progress for 5 s (link.progress_seconds)")]


def test_it_is_known_whose_turn_to_send_it_was_and_for_how_long() -> None:
    stage = Stage(link__lease_seconds=1e6)
    (waiting, _), (turn, _) = stage.clients, stage.turns
    stage.after(5.0)
    assert stage.router.relay.at_work() == {0: 1.0, 1: 1.0}
    stage.send(waiting, stage.tensors(waiting, turn.lease, scalars={"micros": 1.0}))
    stage.after(15.0)
    share = stage.router.relay.at_work()[0]
    assert share == pytest.approx(0.25, abs=0.03)
    stage.now += 3600.0  # the broker was stopped itself
    stage.router.tick(stage.now)
    assert stage.router.relay.at_work() == {0: share, 1: 1.0}


@pytest.mark.parametrize("state", ["opening", "ready", "done"])
def test_no_progress_is_asked_of_a_peer_that_waits(state: Any) -> None:
    stage = Stage(link__progress_seconds=5.0)
    for _ in range(20):
        for member in (*stage.servers, *stage.clients):
            stage.beat(member, Held(lease=NO_SUCH_LEASE, state=state))
        assert stage.after(1.0) == []


def test_a_pause_of_the_broker_itself_is_no_fault_of_its_peers() -> None:
    desk = Desk(link__lease_seconds=10.0)
    desk.join("client", 0)
    assert desk.after(1.0) == []
    desk.now += 3600.0
    assert desk.router.tick(desk.now) == []
    assert desk.after(8.0) == []
    assert [type(event) for event in desk.after(2.5)] == [Lost]


def test_after_the_brokers_pause_a_peer_has_one_lease_and_no_more() -> None:
    desk = Desk(link__lease_seconds=10.0)
    member = desk.join("client", 0)
    assert desk.after(1.0) == []
    desk.now += 3600.0
    desk.beat(member)  # was waiting in the socket, and is read before the clock
    assert desk.router.tick(desk.now) == []
    assert [type(event) for event in desk.after(11.0)] == [Lost]


# Attaching


def test_a_data_connection_without_a_session_is_told_so() -> None:
    desk = Desk()
    stranger = Member("client", 0, "token 99", b"c", b"d")
    assert desk.send(stranger, desk.tensors(stranger, NO_SUCH_LEASE)) == Route(b"d", Detached(RUN, ""))
    for token in ("token 99", "x" * (MAX_HEADER - 16)):  # nothing of what it says comes back, however long
        assert desk.send(stranger, Attach("", token)) == Route(b"d", Detached(RUN, ""))


def test_attaching_to_another_run_is_refused() -> None:
    desk = Desk()
    member = desk.enter("client", 0)
    assert desk.router.relay.route(b"new", Attach("old run", member.token), 0) == Route(b"new", Detached(RUN, ""))


def test_the_newest_data_connection_of_a_session_takes_the_place_of_the_one_before() -> None:
    stage = Stage()
    client, server, lease = stage.clients[0], stage.servers[0], stage.turns[0].lease
    old, client.data = client.data, b"new"
    assert stage.send(client, Attach(RUN, client.token)) == Route(b"new", Attached(RUN, client.token))
    assert stage.router.relay.route(old, stage.tensors(client, lease), 0) == Route(old, Detached(RUN, ""))
    assert stage.send(client, stage.tensors(client, lease)) == Route(server.data)
    assert stage.send(server, stage.tensors(server, lease, GRADIENTS)) == Route(b"new")


def test_when_a_data_connection_is_new_the_other_party_of_its_lease_is_told_to_send_again() -> None:
    stage = Stage()
    for turn, client, server in zip(stage.turns, stage.clients, stage.servers, strict=True):
        to_server = server.data, Resend(RUN, server.token, turn.lease)
        to_client = client.data, Resend(RUN, client.token, turn.lease)
        assert to_server in list(stage.router.relay.resends(("client", client.index)))
        assert to_client in list(stage.router.relay.resends(("server", server.index)))


def test_who_pulls_a_state_is_told_to_ask_again_when_its_holder_has_a_new_data_connection() -> None:
    stage = Stage()
    stage.end_turns()
    server, merge = stage.servers[0], stage.job(stage.servers[0])
    holders = {ref.holder for share in merge.inputs for ref in (share.front, share.back)}
    assert holders >= {"client.0", "client.1"}
    again = list(stage.router.relay.resends(("client", 1)))
    assert again == [(server.data, Resend(RUN, server.token, merge.lease))]


def test_a_data_connection_belongs_to_one_session_only() -> None:
    stage = Stage()
    one, other = stage.clients
    stage.router.relay.route(one.data, Attach(RUN, other.token), 0)
    server, lease = stage.servers[0], stage.turns[0].lease
    assert stage.send(server, stage.tensors(server, lease, GRADIENTS)) is None
    assert stage.router.relay.data_of("client.0") is None
    stage.take(stage.router.control(Bye(session=one.token), one.control, stage.now))
    assert stage.router.relay.route(one.data, Attach(RUN, other.token), 0) == Route(
        one.data, Attached(RUN, other.token)
    )


def test_a_data_connection_of_a_session_that_is_over_is_told_so() -> None:
    stage = Stage()
    client = stage.clients[0]
    stage.router.control(Bye(session=client.token), client.control, stage.now)
    assert stage.send(client, stage.tensors(client, stage.turns[0].lease)) == Route(client.data, Detached(RUN, ""))
    assert stage.send(client, Attach(RUN, client.token)) == Route(client.data, Detached(RUN, ""))


# Tensors


def test_tensors_pass_between_the_two_parties_of_a_granted_lease_and_nobody_else() -> None:
    stage = Stage()
    for client, server, turn in zip(stage.clients, stage.servers, stage.turns, strict=True):
        assert stage.send(client, stage.tensors(client, turn.lease)) == Route(server.data)
        assert stage.send(server, stage.tensors(server, turn.lease, GRADIENTS)) == Route(client.data)
        assert stage.send(client, Step(RUN, client.token, turn.lease, 0, 1.0)) == Route(server.data)
    for sender, turn in zip([*stage.clients, *stage.servers], [*stage.turns[::-1], *stage.turns[::-1]], strict=True):
        assert stage.send(sender, stage.tensors(sender, turn.lease)) is None
        assert stage.send(sender, Step(RUN, sender.token, turn.lease, 0, 1.0)) is None


def metas() -> st.SearchStrategy[TensorMeta]:
    sizes = st.sampled_from([-1, 0, 24, 25, 2**41])
    shapes = st.sampled_from([(2, 3), (2, -3), (2**20, 2**20)])
    dtypes, codecs = st.sampled_from(["F32", "F31"]), st.sampled_from(["raw", "lz4"])
    return st.builds(TensorMeta, st.just("smashed"), dtypes, shapes, codecs, sizes)


@unhurried
@given(st.lists(metas(), max_size=3).map(tuple), st.lists(st.integers(0, 30), max_size=3))
def test_a_lane_is_for_those_tensors_alone_whose_frames_are_what_they_declare(
    tensors: tuple[TensorMeta, ...], other: list[int]
) -> None:
    stage = Stage()
    client, lease = stage.clients[0], stage.turns[0].lease
    message = stage.tensors(client, lease)
    stage.send(client, message)
    message = msgspec.structs.replace(message, tensors=tensors)
    for sizes in ([meta.nbytes for meta in tensors], other):
        fits = True
        try:
            check_sizes(message, sizes)
        except RemoteProtocolError:
            fits = False
        if fits:
            stage.send(client, message)
        assert (stage.router.relay.lane(client.data, encode(message), sizes) is not None) == fits


@pytest.mark.parametrize("leg", [-1, 1, 2, 3, 4])
def test_tensors_on_a_leg_that_is_not_the_sender_s_are_dropped(leg: int) -> None:
    stage = Stage()
    client, server, lease = stage.clients[0], stage.servers[0], stage.turns[0].lease
    assert stage.send(client, stage.tensors(client, lease, leg=leg)) is None
    assert (stage.send(server, stage.tensors(server, lease, leg=leg)) is None) == (leg != 1)


def test_tensors_wait_for_the_grant_and_stop_with_the_lease() -> None:
    stage = Stage(ready=False)
    client, server, turn = stage.clients[0], stage.servers[0], stage.turns[0]
    assert stage.send(client, stage.tensors(client, turn.lease)) is None
    stage.beat(server, Held(lease=turn.lease, state="ready"))
    assert stage.send(client, stage.tensors(client, turn.lease)) == Route(server.data)
    stage.done(client, turn)
    stage.done(server, turn)
    assert stage.send(client, stage.tensors(client, turn.lease)) is None
    assert stage.send(server, stage.tensors(server, turn.lease, GRADIENTS)) is None


@pytest.mark.parametrize("change", [{"run": "old run"}, {"session": "token 0000000000"}, {"lease": NO_SUCH_LEASE}])
def test_tensors_of_another_run_session_or_lease_are_dropped(change: dict[str, Any]) -> None:
    stage = Stage()
    client = stage.clients[0]
    message = stage.tensors(client, stage.turns[0].lease)
    assert stage.send(client, message) is not None
    assert stage.send(client, msgspec.structs.replace(message, **change)) is None


def test_a_lease_from_an_earlier_life_of_the_broker_still_counts_while_it_is_open() -> None:
    stage = Stage()
    stage.take([Started(2)])
    client = stage.clients[0]
    assert stage.send(client, stage.tensors(client, stage.turns[0].lease)) == Route(stage.servers[0].data)


def test_nothing_that_only_the_broker_says_is_passed_on() -> None:
    stage = Stage()
    client = stage.clients[0]
    for message in (Attached(RUN, client.token), Detached(RUN, client.token)):
        assert stage.send(client, message) is None


# States


def pull(sender: Member, lease: Lease, ref: Ref, **more: Any) -> Pull:
    fields = {"source": ref.holder, "digest": ref.digest, "offset": -1, "length": 0, "what": "other"} | more
    return Pull(RUN, sender.token, lease, **fields)


def chunk(sender: Member, lease: Lease, origin: str, ref: Ref, **more: Any) -> Chunk:
    fields = {"origin": origin, "digest": ref.digest, "offset": 0, "nbytes": 8, "what": "weights"} | more
    return Chunk(RUN, sender.token, lease, **fields)


def test_a_pull_goes_to_the_holder_with_the_name_of_who_really_asks() -> None:
    stage = Stage()
    client, turn = stage.clients[1], stage.turns[1]
    asked = pull(client, turn.lease, turn.base, origin="client.0")
    assert turn.base.holder == "server.0"
    assert stage.send(client, asked) == Route(stage.servers[0].data, msgspec.structs.replace(asked, origin="client.1"))


def test_only_states_that_the_job_names_can_be_pulled_by_those_whose_job_it_is() -> None:
    stage = Stage()
    (one, other), turn = stage.clients, stage.turns[0]
    assert stage.send(one, pull(one, turn.lease, turn.base)) is not None
    assert stage.send(other, pull(other, turn.lease, turn.base)) is None
    assert stage.send(one, pull(one, NO_SUCH_LEASE, turn.base)) is None
    assert stage.send(one, pull(one, turn.lease, turn.base, digest="else")) is None
    assert stage.send(one, pull(one, turn.lease, turn.base, source="server.1")) is None
    assert stage.send(one, pull(one, turn.lease, turn.base, source="broker")) is None


def test_a_merge_pulls_every_contribution_from_whoever_made_it() -> None:
    stage = Stage()
    stage.end_turns()
    server = stage.servers[0]
    merge = stage.job(server)
    assert isinstance(merge, Merge)
    holders = {member.name: member for member in (*stage.clients, *stage.servers)}
    for ref in (ref for share in merge.inputs for ref in (share.front, share.back)):
        asked = pull(server, merge.lease, ref)
        assert stage.send(server, asked) == Route(
            holders[ref.holder].data, msgspec.structs.replace(asked, origin="server.0")
        )
        answer = chunk(holders[ref.holder], merge.lease, "server.0", ref)
        assert stage.send(holders[ref.holder], answer) == Route(server.data)
    assert stage.send(stage.servers[1], pull(stage.servers[1], merge.lease, merge.base)) is None


def test_who_pulls_from_a_holder_that_is_not_connected_is_told_so() -> None:
    stage = Stage()
    client, turn = stage.clients[0], stage.turns[0]
    stage.router.control(Bye(session=stage.servers[0].token), stage.servers[0].control, stage.now)
    asked = pull(client, turn.lease, turn.base, offset=8, length=16, what="weights")
    from_the_disk = Route(BROKER, msgspec.structs.replace(asked, origin="client.0"))
    assert stage.send(client, asked) == from_the_disk, "the version is stored as well"
    stage.scheduler.archive.remove(turn.base.digest)
    lacking = Chunk(RUN, "", turn.lease, "client.0", turn.base.digest, 8, 0, "weights")
    assert stage.send(client, asked) == Route(client.data, lacking)


def test_chunks_come_from_the_holder_and_go_to_a_party_of_the_job() -> None:
    stage = Stage()
    turn, (holder, stranger) = stage.turns[1], stage.servers
    assert stage.send(holder, chunk(holder, turn.lease, "client.1", turn.base)) == Route(stage.clients[1].data)
    assert stage.send(holder, chunk(holder, turn.lease, "server.1", turn.base)) == Route(stage.servers[1].data)
    assert stage.send(holder, chunk(holder, turn.lease, "client.0", turn.base)) is None
    assert stage.send(holder, chunk(holder, turn.lease, "client.1", turn.base, digest="else")) is None
    assert stage.send(holder, chunk(holder, NO_SUCH_LEASE, "client.1", turn.base)) is None
    assert stage.send(stranger, chunk(stranger, turn.lease, "client.1", turn.base)) is None


def test_chunks_for_the_broker_pass_while_that_version_is_being_stored() -> None:
    desk = Desk(schedule__clients=1)
    server, other = desk.join("server"), desk.join("server", instance="other")
    desk.join("client", 0)
    init = desk.job(server)
    assert isinstance(init, Init)
    desk.done(server, init)
    ref = Ref(digest=digest_of(b"server.0"), holder="server.0")
    assert desk.send(server, chunk(server, Lease(0, 0), "broker", ref)) == Route(BROKER)
    assert desk.send(other, chunk(other, Lease(0, 0), "broker", ref)) is None
    assert desk.send(server, chunk(server, Lease(0, 0), "broker", ref, digest="else")) is None
    desk.stored()
    assert desk.send(server, chunk(server, Lease(0, 0), "broker", ref)) is None


NOBODY = ["", ".", "client", "client.", "client.-1", "client.99", "client.1.0", "client. 1", "broker.0", "monitor.0"]
NOBODY += ["client.²", "client.٣", "client." + "9" * 5000]


@pytest.mark.parametrize("name", NOBODY)
def test_a_name_that_is_nobodys_leads_nowhere(name: str) -> None:
    stage = Stage()
    turn, holder = stage.turns[0], stage.servers[0]
    assert stage.send(holder, chunk(holder, turn.lease, name, turn.base)) is None
    assert stage.send(stage.clients[0], pull(stage.clients[0], turn.lease, turn.base, source=name)) is None
    assert stage.router.relay.data_of(name) is None


@unhurried
@given(st.text() | st.builds("{}.{}".format, st.sampled_from(["client", "server"]), st.integers() | st.text()))
def test_any_name_is_somebodys_or_nobodys(name: str) -> None:
    role, index = peer_of(name)
    assert index == -1 or int(name.partition(".")[2]) == index
    assert name.startswith(role)


@unhurried
@given(anything(DataMessage), st.integers(0, 4), st.booleans())
def test_whatever_a_peer_sends_is_routed_dropped_or_answered(message: DataMessage, who: int, own: bool) -> None:
    stage = Stage()
    member = [*stage.clients, *stage.servers, Member("client", 9, "?", b"?", b"?")][who]
    if own:
        message = msgspec.structs.replace(message, run=RUN, session=member.token)
    route = stage.send(member, message)
    assert route is None or (route.to == member.data and isinstance(route.message, Attached | Detached))


# Counting


def test_bytes_are_counted_by_kind_and_direction_and_reported_with_the_lease() -> None:
    stage = Stage()
    client, server, turn = stage.clients[0], stage.servers[0], stage.turns[0]
    stage.send(client, stage.tensors(client, turn.lease), 100)
    stage.send(client, stage.tensors(client, turn.lease, micro=1), 100)
    stage.send(server, stage.tensors(server, turn.lease, GRADIENTS), 70)
    stage.send(server, chunk(server, turn.lease, "client.0", turn.base), 500)
    stage.send(server, chunk(server, turn.lease, "client.0", turn.base, what="optimizer"), 300)
    (event,) = stage.done(client, turn)
    assert event.tally.traffic == {
        "smashed": (48, 0),
        "labels": (32, 0),
        "gradients": (0, 24),
        "headers": (120, 46),
        "weights": (0, 500),
        "optimizer": (0, 300),
    }
    sessions = stage.session(client), stage.session(server)
    assert [(session.up, session.down) for session in sessions] == [(200, 870), (870, 200)]


def test_what_codecs_save_is_counted_beside_what_was_sent() -> None:
    stage = Stage()
    client, server, turn = stage.clients[0], stage.servers[0], stage.turns[0]
    half = TensorMeta("smashed", "F32", (4, 3), "half", 24)
    mask = TensorMeta("gradients", "F32", (4, 3), "mask", 8)
    message = stage.tensors(client, turn.lease)
    stage.send(client, msgspec.structs.replace(message, tensors=(half, *message.tensors[1:])), 76)
    stage.send(server, msgspec.structs.replace(stage.tensors(server, turn.lease), tensors=(mask,)), 38)
    (event,) = stage.done(client, turn)
    assert event.tally.traffic == {"smashed": (24, 0), "labels": (16, 0), "gradients": (0, 8), "headers": (36, 30)}
    assert event.tally.traffic_raw == {"smashed": (48, 0), "labels": (16, 0), "gradients": (0, 48), "headers": (36, 30)}


def test_what_is_dropped_is_not_counted() -> None:
    stage = Stage(ready=False)
    client, turn = stage.clients[0], stage.turns[0]
    stage.send(client, stage.tensors(client, turn.lease), 100)
    assert stage.router.relay.traffic == {}
    assert stage.session(client).up == 0


def test_an_evaluation_is_counted_as_such() -> None:
    desk = Desk(schedule__clients=1, run__rounds=1)
    server, client = desk.join("server"), desk.join("client", 0)
    while not isinstance(job := desk.job(server), Evaluate):
        desk.beat(server, Held(lease=job.lease, state="ready"))
        if isinstance(job, Turn):
            desk.done(client, job)
        desk.done(server, job)
        desk.stored()
    desk.beat(server, Held(lease=job.lease, state="ready"))
    desk.send(client, desk.tensors(client, job.lease, kind="eval"), 100)
    desk.send(server, desk.tensors(server, job.lease, kind="eval"), 60)
    (event,) = desk.done(client, job)
    assert event.tally.traffic == event.tally.traffic_raw == {"evaluation": (100, 60)}


def test_a_merge_counts_what_the_clients_sent_for_it_and_not_what_servers_exchange() -> None:
    stage = Stage()
    stage.end_turns()
    server, merge = stage.servers[0], stage.job(stage.servers[0])
    fronts = [share.front for share in merge.inputs]
    for client, ref in zip(stage.clients, fronts, strict=True):
        stage.send(client, chunk(client, merge.lease, "server.0", ref), 200)
    stage.send(stage.servers[1], chunk(stage.servers[1], merge.lease, "server.0", merge.inputs[1].back), 1000)
    (event,) = stage.done(server, merge)
    assert event.tally.traffic == {"weights": (400, 0)}


@pytest.mark.parametrize("who", ["client", "server"])
def test_what_a_peer_claims_to_have_sent_is_not_believed(who: str) -> None:
    stage = Stage()
    member = stage.clients[0] if who == "client" else stage.servers[0]
    (event,) = stage.done(
        member, stage.turns[0], tally=Tally(samples=3, traffic={"smashed": (10**9, 0)}, traffic_raw={"labels": (1, 1)})
    )
    assert event.tally == Tally(samples=3)


def test_what_was_counted_for_a_lease_is_forgotten_with_it() -> None:
    stage = Stage()
    stage.send(stage.clients[0], stage.tensors(stage.clients[0], stage.turns[0].lease), 100)
    stage.end_turns()
    assert stage.router.relay.traffic == {}


# Measuring


class Survey(Desk):
    """A client and a server that measured itself, and now the link between the two."""

    def __init__(self, **keys: object) -> None:
        super().__init__(**{"schedule__clients": 1, "model__cut": "auto", "train__micro_batches": "auto"} | keys)
        self.server, self.client = self.join("server"), self.join("client", 0)
        self.alone: Measure = self.job(self.server)
        self.first = self.done(self.server, self.alone, profile=PROFILE)
        self.measure: Measure = self.job(self.server)

    def begin(self) -> None:
        self.beat(self.server, Held(lease=self.measure.lease, state="ready"))


def test_a_server_measures_itself_without_being_ready_first() -> None:
    survey = Survey()
    assert (survey.alone.client, survey.measure.client) == (-1, 0)
    assert survey.first == [Done(survey.alone.lease, "server", digest_of(b"server.0"), Tally(), PROFILE)]


def test_what_a_client_measured_is_reported_with_its_link() -> None:
    survey = Survey()
    assert survey.orders(survey.client).jobs == ()
    survey.begin()
    assert survey.orders(survey.client).jobs == (survey.measure,)
    (event,) = survey.done(survey.client, survey.measure, profile=PROFILE, link=LINK)
    assert (event.profile, event.link) == (PROFILE, LINK)
    assert through_the_journal(Entry(0.0, event)).event == event
    assert survey.scheduler.phase == "planning"


def test_probes_pass_between_a_client_that_measures_and_its_server_and_nothing_else_does() -> None:
    survey = Survey()
    server, client, lease = survey.server, survey.client, survey.measure.lease
    probe = {"kind": "probe"}
    assert survey.send(client, survey.tensors(client, lease, **probe)) is None
    survey.begin()
    assert survey.send(client, survey.tensors(client, lease, **probe)) == Route(server.data)
    assert survey.send(server, survey.tensors(server, lease, **probe)) == Route(client.data)
    for kind in ("train", "eval", "predict"):
        assert survey.send(client, survey.tensors(client, lease, kind=kind)) is None
    survey.done(client, survey.measure, profile=PROFILE, link=LINK)
    assert survey.send(client, survey.tensors(client, lease, **probe)) is None


def test_probes_do_not_pass_under_a_turn() -> None:
    stage = Stage()
    client = stage.clients[0]
    assert stage.send(client, stage.tensors(client, stage.turns[0].lease, kind="probe")) is None


def test_no_progress_is_asked_of_a_peer_that_measures() -> None:
    survey = Survey(link__progress_seconds=5.0)
    survey.begin()
    for _ in range(20):
        for member in (survey.server, survey.client):
            survey.beat(member, Held(lease=survey.measure.lease, state="running"))
        assert survey.after(1.0) == []


def states(desk: Desk) -> list[str]:
    """Return the states of the run and its peers, in the order in which they came, as they are published."""
    return [event.state for event in Bulletin(desk.scheduler, desk.router, RUN, "out").state(desk.now)]


def test_who_measures_is_published_and_that_a_plan_is_made() -> None:
    survey = Survey()
    survey.begin()
    survey.beat(survey.client, Held(lease=survey.measure.lease, state="running"))
    assert states(survey) == ["measuring", "measuring", "measuring"]
    survey.done(survey.client, survey.measure, profile=PROFILE, link=LINK)
    assert states(survey) == ["planning", "waiting", "waiting"]
    bulletin = Bulletin(survey.scheduler, survey.router, RUN, "out")
    assert bulletin.run_event().cut == "auto"
    survey.planned()
    assert bulletin.run_event().cut == "pool"
    assert states(survey) == ["storing", "initialising", "waiting"]


def test_the_round_that_is_worked_on_is_told_beside_those_that_are_over() -> None:
    stage = Stage(run__rounds=2, run__eval_every=0)
    bulletin = Bulletin(stage.scheduler, stage.router, RUN, "out")

    def told() -> tuple[int, int, str]:
        event = bulletin.run_event()
        return event.round, event.current, event.state

    def train(version: bytes) -> None:
        stage.turns = [stage.job(server) for server in stage.servers]
        for server, turn in zip(stage.servers, stage.turns, strict=True):
            stage.beat(server, Held(lease=turn.lease, state="ready"))
        stage.end_turns()
        merge = stage.job(stage.servers[0])
        stage.beat(stage.servers[0], Held(lease=merge.lease, state="done", digest=digest_of(version)))

    assert told() == (0, 1, "training")
    train(b"first")
    assert told() == (0, 2, "training"), "beside the storing of the first"
    stage.stored()
    assert told() == (1, 2, "training")
    train(b"second")
    assert told() == (1, 2, "evaluating")
    stage.stored()
    assert told() == (2, 2, "evaluating")


@pytest.mark.parametrize(("rounds", "patience"), [(1, 0), (2, 0), (9, 1)])
def test_the_bar_never_goes_back_and_the_round_is_none_that_never_begins(rounds: int, patience: int) -> None:
    stage = Stage(run__rounds=rounds, run__patience=patience)
    bulletin, board = Bulletin(stage.scheduler, stage.router, RUN, "out"), Board()
    bars, shown = [0.0], set()

    def look() -> None:
        stage.now += 1.0
        for event in bulletin.state(stage.now):
            board.take(decode_event(bulletin.stamp(event, stage.now)[1]), stage.now)
        bars.append(board.progress())
        shown.add(board.round())

    while stage.scheduler.outcome is None:
        look()
        for member in (*stage.servers, *stage.clients):
            for job in stage.orders(member).jobs:
                steps = range(job.count + 1) if isinstance(job, Turn) else (0,)
                for step in steps if member.role == "client" else ():
                    stage.beat(member, Held(lease=job.lease, state="running", step=step))
                    look()
                if member.role == "server" and not isinstance(job, Init | Merge):
                    stage.beat(member, Held(lease=job.lease, state="ready"))
                work = f"{member.name} {job}".encode()
                stage.beat(member, Held(lease=job.lease, state="done", digest=digest_of(work), tally=Tally(samples=1)))
                look()
        stage.stored()
    look()
    done = len(stage.scheduler.history)
    assert shown == set(range(1, done + 1))
    assert bars == sorted(bars)
    assert bars[-1] == 1.0
    assert max(bar for bar in bars if bar < 1.0) <= done / rounds


def test_what_a_plan_says_is_logged_and_one_that_stays_is_not() -> None:
    survey = Survey()
    bulletin = Bulletin(survey.scheduler, survey.router, RUN, "out")
    assert [log.text for log in bulletin.logs(Planned(0, {0: Plan(cut="relu")}, {}, "cut relu"))] == ["cut relu"]
    assert list(bulletin.logs(Planned(1))) == []


def test_the_plans_of_an_earlier_run_are_logged_as_such() -> None:
    desk = Desk(plan__file="plan.json")
    bulletin = Bulletin(desk.scheduler, desk.router, RUN, "out")
    (log,) = bulletin.logs(Planned(2, {}, {}, "the uplink fell"))
    assert log.text == "as planned before, from round 3 on: the uplink fell"


# Orders


def test_orders_are_what_the_scheduler_says_under_a_revision_that_grows() -> None:
    stage = Stage()
    seen: dict[str, int] = {}
    for _ in range(3):
        for member in (*stage.clients, *stage.servers):
            peer: Peer = (member.role, member.index)
            orders = stage.orders(member)
            assert orders.revision > seen.get(member.name, 0)
            seen[member.name] = orders.revision
            assert orders.jobs == tuple(stage.scheduler.jobs(peer))
            assert orders.keep == tuple(stage.scheduler.kept(peer))
            assert orders.finish is None
        stage.end_turns()


def test_orders_carry_the_clocks_and_at_the_end_the_outcome() -> None:
    desk = Desk()
    session = desk.session(desk.join("client", 0))
    assert desk.router.orders(session, echo=12.5, now=99.0).echo == 12.5
    assert desk.router.orders(session, echo=12.5, now=99.0).now == 99.0
    desk.router.finish = Finish(ok=False, sentence="stopped")
    assert list(desk.router.changed()) == [session]
    assert desk.router.orders(session).finish == Finish(ok=False, sentence="stopped")
    assert list(desk.router.changed()) == []


def test_only_those_whose_orders_changed_are_told() -> None:
    stage = Stage(ready=False)
    for member in (*stage.clients, *stage.servers):
        stage.orders(member)
    assert list(stage.router.changed()) == []
    stage.beat(stage.servers[0], Held(lease=stage.turns[0].lease, state="ready"))
    assert list(stage.router.changed()) == [stage.session(stage.clients[0])]
    assert list(stage.router.changed({("client", 1), ("client", 7)})) == []
    assert list(stage.router.changed({("client", 0)})) == [stage.session(stage.clients[0])]


# The whole conversation


class Actor:
    """A peer that knows nothing but its orders, and says in every beat all that it holds."""

    def __init__(self, desk: Desk, member: Member) -> None:
        self.desk, self.member = desk, member
        self.orders = Orders(revision=0)
        self.held: dict[Lease, Held] = {}

    def beat(self) -> list[Event]:
        return self.desk.beat(self.member, *self.held.values())

    def obey(self, orders: Orders) -> None:
        if orders.revision > self.orders.revision:
            self.orders = orders
            leases = {job.lease for job in orders.jobs}
            self.held = {lease: held for lease, held in self.held.items() if lease in leases}

    def work(self, clients: dict[int, "Actor"]) -> None:
        """Bring every job a step further. A server's side of a turn is done when its client's is."""
        for job in self.orders.jobs:
            state = self.held[job.lease].state if job.lease in self.held else ""
            if self.member.role == "client" or client_of(job) is None:
                self._hold(job, "done" if state else "opening")
            elif not state:
                self._hold(job, "ready")
            elif state != "done" and isinstance(job, Turn) and (theirs := clients[job.client].held.get(job.lease)):
                self._hold(job, "done" if theirs.state == "done" else "running")

    def _hold(self, job: Job, state: Any) -> None:
        digest = digest_of(f"{job.lease} {self.member.name}".encode()) if state == "done" else ""
        found = {"profile": PROFILE, "link": LINK} if isinstance(job, Measure) and state == "done" else {}
        self.held[job.lease] = Held(lease=job.lease, state=state, digest=digest, **found)


@st.composite
def casts(draw: st.DrawFn) -> tuple[Desk, list[Actor]]:
    """Return a run and its peers, in the order in which they came."""
    config: Config = draw(configs())
    desk = Desk(draw(sizes_for(config)), **flat(config))
    peers: list[Peer] = [("server", k) for k in range(draw(st.integers(1, 2)))]
    peers += [("client", i) for i in range(config.schedule.clients)]
    return desk, [Actor(desk, desk.enter(role, index)) for role, index in draw(st.permutations(peers))]


def conversation(desk: Desk, cast: list[Actor], random: Random) -> Iterator[list[Event]]:
    """Let the peers talk, messages being lost and doubled, until the run is over; yield each beat's news."""
    clients = {actor.member.index: actor for actor in cast if actor.member.role == "client"}
    while desk.scheduler.outcome is None:
        actor = random.choice(cast)
        match random.choice(["beat", "lost", "doubled", "unanswered", "work", "disk", "planner"]):
            case "beat":
                yield actor.beat()
                actor.obey(desk.orders(actor.member))
            case "doubled":
                yield actor.beat()
                late = desk.orders(actor.member)
                assert actor.beat() == []
                actor.obey(desk.orders(actor.member))
                actor.obey(late)
            case "unanswered":
                yield actor.beat()
            case "work":
                actor.work(clients)
            case "disk":
                desk.stored()
            case "planner":
                desk.planned()


@unhurried
@given(casts(), st.randoms(use_true_random=True))
def test_a_run_gets_to_its_end_over_beats_that_are_lost_doubled_and_late(
    cast: tuple[Desk, list[Actor]], random: Random
) -> None:
    desk, actors = cast
    for _ in conversation(desk, actors, random):
        pass
    assert desk.scheduler.outcome is not None
    assert desk.scheduler.outcome.ok
    assert len(desk.scheduler.history) == desk.config.run.rounds
    told = Counter(
        (type(event), event.lease, event.side if isinstance(event, Done) else "server")
        for event in desk.log
        if isinstance(event, Ready | Done)
    )
    assert set(told.values()) == {1}
    assert sum(isinstance(event, Joined) for event in desk.log) == len(actors)
    play = Play(desk.config, desk.shards, clock=0.0)
    for event in desk.log:
        play.tell(event)
    assert fingerprint(play.scheduler) == fingerprint(desk.scheduler)


# What peers say cannot harm the broker

STRANGE = [
    Tally(samples=3, loss_sum=math.nan),
    Tally(samples=3, loss_sum=math.inf),
    Tally(samples=3, loss_sum=-math.inf),
    Tally(samples=3, seconds=math.nan, idle=math.inf),
    Tally(samples=2**64 - 1, steps=2**64 - 1),
    Tally(samples=-3, steps=-(2**63)),
    Tally(steps=1, step_seconds={10**6: 1}),
    Tally(steps=1, step_seconds={-(10**6): 2**64 - 1}),
]


@pytest.mark.parametrize("tally", STRANGE)
def test_a_tally_that_cannot_be_is_refused_or_does_no_harm(tally: Tally) -> None:
    desk = Desk(schedule__clients=2, run__rounds=1)
    server, *clients = desk.join("server"), desk.join("client", 0), desk.join("client", 1)
    while desk.scheduler.outcome is None:
        job = desk.job(server) if len(desk.orders(server).jobs) == 1 else desk.orders(server).jobs[0]
        desk.beat(server, *[Held(lease=each.lease, state="ready") for each in desk.orders(server).jobs])
        if isinstance(job, Turn | Evaluate):
            held = Held(lease=job.lease, state="done", digest="d", tally=tally)
            beat = Beat(session=clients[job.client].token, sent=0.0, held=(held,))
            try:
                received = decode_control(msgspec.msgpack.encode(beat))  # `encode` refuses to send some
            except RemoteProtocolError:
                return
            events = desk.router.control(received, clients[job.client].control, desk.now)
            assert [through_the_journal(Entry(0.0, event)).event for event in events] == events
            desk.take(events)
        desk.done(server, job)
        desk.stored()
    bulletin = Bulletin(desk.scheduler, desk.router, RUN, "out")
    for record in desk.scheduler.history:
        decode_event(bulletin.stamp(bulletin.round_event(record), 0.0)[1])
    json.dumps(summarise(desk.scheduler, RUN, Path("out")), allow_nan=False)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_telemetry_that_cannot_be_is_refused_or_can_be_published_and_read(number: float) -> None:
    desk = Desk()
    member = desk.join("client", 0)
    telemetry = Telemetry(
        session=member.token, losses=(1.0, number), samples_per_second=number, idle_share=number, note="?"
    )
    try:
        received = decode_control(msgspec.msgpack.encode(telemetry))
    except RemoteProtocolError:
        return
    desk.router.control(received, member.control, desk.now)
    bulletin = Bulletin(desk.scheduler, desk.router, RUN, "out")
    for event in bulletin.state(desk.now):
        assert type(decode_event(bulletin.stamp(event, 0.0)[1])) is type(event)


@unhurried
@given(anything(Beat | Telemetry | Fault | Bye | Hello), st.integers(0, 4), st.booleans())
def test_whatever_a_peer_says_the_broker_goes_on(message: Any, who: int, own: bool) -> None:
    stage = Stage()
    member = [*stage.clients, *stage.servers, Member("client", 9, "?", b"?", b"?")][who]
    if isinstance(message, Hello):
        list(stage.router.hello(member.control, message, stage.now))
    else:
        message = msgspec.structs.replace(message, session=member.token) if own else message
        stage.take(stage.router.control(message, member.control, stage.now))
    for event in stage.log:
        assert through_the_journal(Entry(0.0, event)).event == event
    bulletin = Bulletin(stage.scheduler, stage.router, RUN, "out")
    for event in bulletin.state(stage.now):
        bulletin.stamp(event, 0.0)


def test_a_plan_in_a_turn_is_the_one_in_the_config() -> None:
    assert Stage().turns[0].plan == Plan(cut="relu")
