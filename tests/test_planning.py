"""From measurements to plans, in words; and what a round says about the speeds and links they were made with."""

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from conftest import QUICK, Ending, settings
from helpers import anything, config_of, unhurried
from hypothesis import given
from hypothesis import strategies as st
from situations import BATCH, a_client, a_link, a_profile, a_situation

from zsplit.errors import PlanError
from zsplit.plan import Machine, ServerSite, Situation, decide, evaluate
from zsplit.plan.cost import Timetable, pace
from zsplit.wire.messages import Flow, Plan, Prepared, Tally
from zsplit_broker.books import RoundBook
from zsplit_broker.drift import LEAST_BYTES, LEAST_STEPS, moved, observed, rate, slowed
from zsplit_broker.events import Decide, Joined
from zsplit_broker.planning import answer, limits_of, machine
from zsplit_broker.plans import Plans
from zsplit_broker.survey import Survey

STEPS = 2 * LEAST_STEPS


def conv2(micro_batches: int = 1) -> Plan:
    return Plan(cut="conv2", micro_batches=micro_batches, window=micro_batches)


def a_round(situation: Situation, plans: dict[int, Plan], client: float = 1.0, server: float = 1.0) -> RoundBook:
    """Return a round in which peers computed so many times as long as they measured, at the rates of their links."""
    book = RoundBook(0.0)
    for site in situation.clients:
        back = next(each for each in situation.servers if each.server == site.server)
        plan = plans[site.client]
        timetables = Timetable(site.profile), Timetable(back.profile)
        step = pace(*timetables, site.link, site.batch, plan.cut, plan.micro_batches, plan.window)
        done = {"steps": STEPS, "samples": STEPS * site.batch}
        came = Flow(LEAST_BYTES, LEAST_BYTES / site.link.down), Flow(LEAST_BYTES, LEAST_BYTES / site.link.up)
        book.clients[site.client] = Tally(**done, busy=client * STEPS * step.client_busy, flow=came[0])
        book.backs[site.client] = Tally(**done, busy=server * STEPS * step.server_busy, flow=came[1])
    return book


def relinked(situation: Situation, up: float, down: float) -> Situation:
    """Return the situation with other links, in Mbit/s."""
    link = msgspec.structs.replace(a_link(up), down=a_link(down).down)
    return msgspec.structs.replace(
        situation, clients=tuple(msgspec.structs.replace(site, link=link) for site in situation.clients)
    )


# What the planner is told


@pytest.mark.parametrize(
    ("keys", "slots"),
    [
        ({}, 1),
        ({"train__momentum": 0.0}, 0),
        ({"train__optimizer": "adam"}, 2),
        ({"train__optimizer": "adamw"}, 2),
    ],
)
def test_the_optimizers_buffers_are_counted(keys: dict[str, object], slots: int) -> None:
    assert limits_of(config_of(**keys), conv2()).slots == slots


def test_what_is_fixed_is_a_limit_and_what_is_auto_is_free() -> None:
    fixed = limits_of(config_of(train__micro_batches=4, plan__window=2, plan__min_cut="conv1"), conv2(4))
    assert (fixed.cut, fixed.micro_batches, fixed.window, fixed.min_cut) == ("conv2", 4, 2, "conv1")
    free = limits_of(config_of(model__cut="auto", train__micro_batches="auto", plan__min_cut=3), conv2())
    assert (free.cut, free.micro_batches, free.window, free.min_cut) == ("", 0, 0, "3")


def test_an_earliest_cut_is_a_limit_by_the_name_that_a_peer_knows_it_by() -> None:
    config = config_of(model__cut="auto", plan__min_cut="child:1")
    peers = {("server", n): Joined("server", n, Prepared(cut="conv2", earliest=f"conv{n}")) for n in (2, 1)}
    assert Plans(config, peers).ask(Survey(config), 0, {}).situation.limits.min_cut == "conv1"


def test_a_peers_machine_is_what_it_said_when_it_joined() -> None:
    prepared = Prepared(host="attic", cores=8, threads=2, device="cuda:0")
    assert machine(prepared) == Machine("attic", 8, 2, "cuda:0")


# The answer


def test_the_first_plan_is_the_fastest_one_with_its_prediction_and_a_sentence() -> None:
    situation = a_situation(a_client(0), a_client(1), a_client(2))
    planned, best = answer(Decide(0, situation)), decide(situation)
    assert (planned.round, planned.plans, planned.predicted) == (0, best.plans, best.predicted)
    plan = best.plans[0]
    assert planned.sentence == (
        f"clients 0 to 2: cut {plan.cut}, {plan.micro_batches} micro-batches, "
        f"predicted {best.predicted[1]:.3g} s a step"
    )


def test_what_there_is_to_know_about_the_measurements_follows() -> None:
    situation = a_situation(a_client(link=a_link(spread=0.9)))
    (note,) = decide(situation).notes
    assert answer(Decide(0, situation)).sentence.endswith(f". {note}")


def test_fixed_plans_are_only_predicted() -> None:
    situation = a_situation(a_client(0), cut="conv2", micro_batches=1)
    planned = answer(Decide(0, situation, {0: conv2()}))
    forecast = evaluate(situation, {0: conv2()})[0].step_seconds
    assert (planned.plans, planned.predicted) == ({0: conv2()}, {0: forecast})
    assert planned.sentence == f"client 0: cut conv2, 1 micro-batch, predicted {forecast:.3g} s a step"


def test_a_plan_that_cannot_be_is_an_error() -> None:
    with pytest.raises(PlanError, match=r"plan.min_cut = 'conv9' is no cut of the model"):
        answer(Decide(0, a_situation(min_cut="conv9")))


def test_plans_stay_where_the_best_gains_too_little() -> None:
    situation = a_situation()
    current = decide(situation).plans
    planned = answer(Decide(3, situation, current, 0.1))
    assert (planned.round, planned.plans, planned.sentence) == (3, {}, "")


def test_better_plans_say_what_changes_what_it_gains_and_why() -> None:
    quick, slow = a_link(800), a_link(0.8)
    current = decide(a_situation(a_client(0, link=quick))).plans
    situation = a_situation(a_client(0, link=slow))
    why = "the uplink fell to 0.8 Mbit/s"
    planned = answer(Decide(2, situation, current, 0.1, {0: why}))
    before = evaluate(situation, current)[0].step_seconds
    old, new = current[0], planned.plans[0]
    assert (planned.round, new.cut != old.cut) == (2, True)
    assert planned.predicted[0] < 0.9 * before
    assert planned.sentence.startswith(f"client 0: cut {old.cut} → {new.cut}, ")
    assert planned.sentence.endswith(f"predicted {before:.3g} → {planned.predicted[0]:.3g} s a step: {why}")


def test_clients_whose_plans_change_alike_are_named_together() -> None:
    slow = tuple(a_client(number, link=a_link(0.8)) for number in range(4))
    current = dict.fromkeys(range(4), Plan(cut="conv1"))
    why = {0: "it rains", 2: "it rains", 3: "it rains"}
    sentence = answer(Decide(1, a_situation(*slow), current, 0.1, why)).sentence
    first, second = sentence.split("; ")
    assert (first[:20], first[-10:]) == ("clients 0, 2, 3: cut", ": it rains")
    assert second.startswith("client 1: cut")
    assert second.endswith(" s a step")


def test_a_sentence_names_three_plans_and_counts_the_others() -> None:
    slow = tuple(a_client(number, link=a_link(0.8)) for number in range(5))
    current = dict.fromkeys(range(5), Plan(cut="conv1"))
    why = {number: f"reason {number}" for number in range(5)}
    sentence = answer(Decide(1, a_situation(*slow), current, 0.1, why)).sentence
    assert sentence.count("client ") == 3
    assert sentence.endswith(": reason 2; and 2 more")


# What a round showed


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_round_that_went_as_measured_moves_nothing(micro_batches: int) -> None:
    situation = a_situation(a_client(0), a_client(1))
    plans = dict.fromkeys((0, 1), conv2(micro_batches))
    seen = observed(situation, plans, a_round(situation, plans))
    assert moved(situation, seen, {}, 0.01) == {}
    assert seen.clients[0].link.up == pytest.approx(situation.clients[0].link.up)
    assert seen.servers[0].profile.stretches[0].forward == pytest.approx(a_profile((0.01,) * 5).stretches[0].forward)


def test_a_peer_that_computes_longer_has_its_profile_scaled() -> None:
    situation = a_situation(a_client(0), a_client(1))
    plans = dict.fromkeys((0, 1), conv2())
    book = a_round(situation, plans, client=1.0, server=2.0)
    book.clients[1] = msgspec.structs.replace(book.clients[1], busy=3 * book.clients[1].busy)
    seen = observed(situation, plans, book)
    before = situation.clients[0].profile.stretches[0].forward[-1]
    assert [site.profile.stretches[0].forward[-1] for site in seen.clients] == pytest.approx([before, 3 * before])
    assert moved(situation, seen, {0: 1.0, 1: 1.0}, 0.1) == {
        0: "server 0 computes 2 times as long",
        1: "it computes 3 times as long, server 0 computes 2 times as long",
    }


def test_a_link_that_fell_or_rose_is_named_with_its_rate() -> None:
    situation = relinked(a_situation(), 50, 50)
    plans = {0: conv2()}
    seen = observed(situation, plans, a_round(relinked(situation, 12, 100), plans))
    assert moved(situation, seen, {0: 0.1}, 0.1) == {0: "the uplink fell to 12 Mbit/s, the downlink rose to 100 Mbit/s"}


def test_a_link_whose_time_is_nothing_beside_the_step_may_vary() -> None:
    situation = relinked(a_situation(), 50_000, 50_000)
    seen = relinked(situation, 20_000, 20_000)
    assert moved(situation, seen, {0: 1.0}, 0.1) == {}


def test_a_link_that_measured_as_zero_is_mended_by_what_came() -> None:
    situation = relinked(a_situation(), 0, 8)
    plans = {0: conv2()}
    seen = observed(situation, plans, a_round(relinked(situation, 8, 8), plans))
    assert moved(situation, seen, {0: 1.0}, 0.1) == {0: "the uplink rose to 8 Mbit/s"}


def test_a_short_last_batch_is_no_sign_of_speed() -> None:
    situation = a_situation()
    plans = {0: conv2()}
    book = a_round(situation, plans)
    half = {"samples": STEPS * BATCH // 2}
    for side in (book.clients, book.backs):
        side[0] = msgspec.structs.replace(side[0], **half, busy=side[0].busy / 2)
    assert moved(situation, observed(situation, plans, book), {0: 1.0}, 0.01) == {}


def test_a_client_that_did_not_train_or_hardly_says_nothing_about_speeds() -> None:
    situation = a_situation(a_client(0), a_client(1))
    plans = dict.fromkeys((0, 1), conv2())
    book = a_round(situation, plans, client=5.0, server=5.0)
    del book.clients[0], book.backs[0]
    book.clients[1] = msgspec.structs.replace(book.clients[1], steps=LEAST_STEPS - 1)
    seen = observed(situation, plans, book)
    assert [site.profile for site in seen.clients] == [site.profile for site in situation.clients]
    assert seen.servers == situation.servers


@pytest.mark.parametrize(("policy", "judged"), [("parallel", False), ("round_robin", True)])
def test_peers_that_share_too_few_cores_are_not_judged_by_how_long_they_compute(policy: str, judged: bool) -> None:
    place = Machine("here", 2, 1)
    clients = a_client(0, machine=place), a_client(1, machine=place)
    situation = a_situation(*clients, policy=policy)
    servers = tuple(ServerSite(site.server, place, site.profile) for site in situation.servers)
    situation = msgspec.structs.replace(situation, servers=servers)
    plans = dict.fromkeys((0, 1), conv2())
    seen = observed(situation, plans, a_round(situation, plans, client=2.0, server=2.0))
    assert (seen.clients[0].profile != situation.clients[0].profile) == judged
    assert bool(moved(situation, seen, {0: 1.0, 1: 1.0}, 0.1)) == judged


def test_a_rate_is_bytes_over_time_on_the_way_without_the_delay() -> None:
    assert rate(Flow(10 * LEAST_BYTES, 2.0, 0), 0.1) == 5 * LEAST_BYTES
    assert rate(Flow(10 * LEAST_BYTES, 2.0, 20), 0.1) == 10 * LEAST_BYTES


@pytest.mark.parametrize(
    "flow", [Flow(), Flow(LEAST_BYTES - 1, 1.0, 1), Flow(2 * LEAST_BYTES, 1.5, 20), Flow(2 * LEAST_BYTES, 0.0, 0)]
)
def test_few_bytes_or_mostly_delay_say_nothing(flow: Flow) -> None:
    assert rate(flow, 0.1) is None


@unhurried
@given(anything(Flow), st.floats(0, 10))
def test_any_flow_has_a_rate_above_zero_or_none(flow: Flow, rtt: float) -> None:
    found = rate(flow, rtt)
    assert found is None or found > 0


def test_all_seconds_of_a_profile_are_scaled_and_nothing_else() -> None:
    profile = msgspec.structs.replace(a_profile(step=0.5), batch_seconds=0.1, message_seconds=0.01)
    twice = slowed(profile, 2.0)
    assert (twice.batch_seconds, twice.message_seconds) == (0.2, 0.02)
    assert twice.stretches[0].forward == tuple(2 * seconds for seconds in profile.stretches[0].forward)
    assert (twice.stretches[0].step, twice.up, twice.sizes) == (1.0, profile.up, profile.sizes)
    assert slowed(twice, 0.5) == profile


# Real processes


def test_a_run_that_plans_keeps_what_it_saw_and_said_and_its_plan_repeats_it_bit_for_bit(
    here: Callable[..., Ending], tmp_path: Path
) -> None:
    quick = (*QUICK, "broker.port=0", "train.batch_size=64", "plan.profile_seconds=1")
    auto = ("model.cut=auto", "train.micro_batches=auto")
    ended = here("run", "--no-monitor", *settings(*quick, *auto), "--out", "first")
    assert ended.code == 0
    assert " ms (median), predicted were " in ended.out
    first, again = tmp_path / "first", tmp_path / "again"
    situation = msgspec.json.decode((first / "profile.json").read_bytes(), type=Situation)
    assert [site.client for site in situation.clients] == [0, 1]
    summary = json.loads((first / "summary.json").read_text())
    (planned, *_) = json.loads((first / "plan.json").read_text())
    assert planned["sentence"].count(" s a step") >= 1
    assert summary["predicted_step_seconds"] > 0
    plan = ("--plan", str(first / "plan.json"))
    assert here("run", "--no-monitor", *settings(*quick, *auto), *plan, "--out", "again").code == 0
    repeated = json.loads((again / "summary.json").read_text())
    assert (repeated["plan"], repeated["versions"]) == (summary["plan"], summary["versions"])
    assert (again / "plan.json").read_bytes() == (first / "plan.json").read_bytes()
    assert not (again / "profile.json").exists()


def test_a_plan_that_is_not_there_ends_a_command_with_its_sentence(here: Callable[..., Ending]) -> None:
    for command in ("run", "broker"):
        ended = here(command, "--plan", "nowhere/plan.json")
        assert (ended.code, ended.out) == (2, "")
        assert "The plan nowhere/plan.json cannot be read (No such file or directory)" in ended.err
