"""The planner: closed forms of the pipeline, properties of the search, its limits and what it says."""

import doctest
import math
from typing import Any

import msgspec
import pytest
from helpers import unhurried
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from situations import (
    BATCH,
    CUTS,
    KB,
    SIZES,
    a_client,
    a_link,
    a_profile,
    a_situation,
    on_the_wire,
    profiles,
    situations,
)

from zsplit.errors import PlanError
from zsplit.plan import (
    Decision,
    Limits,
    Machine,
    ServerSite,
    Situation,
    cost,
    decide,
    evaluate,
    explain,
    improve,
    words,
)
from zsplit.plan.cost import MIB, Pace, Timetable, interpolated, pace, slices
from zsplit.plan.crowd import COUNTED
from zsplit.plan.links import FASTEST, SLOWEST, assumed
from zsplit.plan.options import MICRO_BATCHES
from zsplit.plan.search import EFFORT, EFFORT_EACH, PASSES, Search, crowds_of
from zsplit.plan.simulate import WARM, Cores, Pipe, simulate, step_seconds
from zsplit.plan.whatif import crowded, freed, relinked
from zsplit.train.schedule import order
from zsplit.wire.messages import LinkSpeed, Plan

SIMPLER = 0.02


def near(expected: float) -> Any:
    return pytest.approx(expected, rel=1e-9)


def a_pace(**values: Any) -> Pace:
    """Return a pace of `micros` equal micro-batches, each so many seconds on each resource."""
    micros = values.pop("micros", 1)
    names = ("forward", "uplink", "server", "downlink", "backward")
    lists = {name: (float(values.pop(name, 1.0)),) * micros for name in names}
    return Pace(**lists, server_step=values.pop("server_step", 0.0), delay=values.pop("delay", 0.0), window=micros)


def step_of(*paces: Pace, shared: int = 0) -> float:
    """Return the longest step of clients at these paces, all with one server; `shared` cores are for all of them."""
    cores = Cores(pool=0) if shared else Cores()
    ends = simulate([Pipe(each, cores=cores) for each in paces], [cores], [shared] * bool(shared))
    return max(map(step_seconds, ends))


# Examples in the documentation


@pytest.mark.parametrize("module", [cost, words])
def test_the_examples_in_the_documentation_are_right(module: Any) -> None:
    tried = doctest.testmod(module)
    assert (tried.failed, tried.attempted > 0) == (0, True)


# Cost


def test_seconds_lie_on_straight_lines_between_the_sizes_and_beyond_them() -> None:
    sizes, measured = (4, 8, 16), (2.0, 3.0, 7.0)
    found = [interpolated(sizes, measured, size) for size in (4, 6, 8, 12, 16, 20, 2)]
    assert found == [2.0, 2.5, 3.0, 5.0, 7.0, 9.0, 1.5]


def test_seconds_are_never_below_zero_and_one_size_is_taken_for_proportional() -> None:
    assert interpolated((4, 8), (1.0, 9.0), 1) == 0.0
    assert interpolated((8,), (2.0,), 4) == 1.0


@given(st.integers(1, 40), st.integers(1, 40))
def test_slices_are_balanced_and_lose_no_sample(batch: int, micro_batches: int) -> None:
    sizes = slices(batch, micro_batches)
    assert sum(sizes) == batch
    assert len(sizes) == min(batch, micro_batches)
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


def test_a_pace_is_the_sum_of_the_stretches_on_either_side_of_the_cut_with_all_that_comes_on_top() -> None:
    profile = replace(a_profile((0.1, 0.2, 0.4, 0.8, 1.6), step=0.01), batch_seconds=0.5, message_seconds=0.02)
    table = Timetable(profile)
    found = pace(table, table, a_link(rtt=0.3), BATCH, "conv2", 2, 2)
    assert found.forward == (near(0.3 / 2 + 0.01 + 0.5), near(0.3 / 2 + 0.01))
    assert found.backward == (near(0.6 / 2 + 0.01), near(0.6 / 2 + 0.01 + 2 * 0.01))
    assert found.server == (near(3 * 2.8 / 2 + 0.02),) * 2
    assert found.server_step == near(3 * 0.01)
    assert sum(found.uplink) == near(on_the_wire(4 * KB, BATCH, 2, labels=True) / 1e6)
    assert sum(found.downlink) == near(on_the_wire(4 * KB, BATCH, 2, labels=False) / 1e6)
    assert (found.delay, found.window) == (0.15, 2)


def test_memory_of_a_front_is_weights_gradients_optimizer_and_what_waits_for_the_backward_pass() -> None:
    table = Timetable(a_profile(weights=1000, saved=10))
    assert table.front_memory("conv2", samples=24, slots=2) == 2 * 1000 * (1 + 1 + 2) + 2 * 10 * 24


# The pipeline, in closed form


def test_a_whole_mini_batch_passes_one_resource_after_the_other() -> None:
    assert step_of(a_pace(forward=1, uplink=2, server=3, downlink=4, backward=5, delay=0.5)) == near(16)


@pytest.mark.parametrize("slowest", ["uplink", "server", "downlink"])
@pytest.mark.parametrize("micros", [1, 4, 32])
def test_with_many_micro_batches_the_slowest_resource_never_waits_between_fill_and_drain(
    slowest: str, micros: int
) -> None:
    each = {"forward": 1.0, "uplink": 2.0, "server": 3.0, "downlink": 2.0, "backward": 1.0, slowest: 5.0}
    split = {name: seconds / micros for name, seconds in each.items()}
    fill_and_drain = sum(each.values()) - each[slowest]
    assert step_of(a_pace(micros=micros, delay=0.25, **split)) == near(each[slowest] + fill_and_drain / micros + 0.5)


def test_a_slow_client_never_waits_with_many_micro_batches() -> None:
    split = {"forward": 4.0, "uplink": 0.1, "server": 0.1, "downlink": 0.1, "backward": 8.0}
    assert step_of(a_pace(micros=16, **{name: value / 16 for name, value in split.items()})) == near(12.0)


def test_packing_is_part_of_each_micro_batch_on_the_side_that_does_it() -> None:
    plain = a_profile()
    sites = Timetable(replace(plain, encode=(0.01,) * 4, decode=(0.02,) * 4)), Timetable(plain)
    for client, server in (sites, sites[::-1]):
        without = pace(Timetable(plain), Timetable(plain), a_link(), 32, "conv2", 2, 2)
        own = pace(client, server, a_link(), 32, "conv2", 2, 2)
        packs = client is sites[0]
        more = [16 * 0.01, 16 * 0.02] if packs else [0.0, 0.0]
        assert own.forward == pytest.approx([each + more[0] for each in without.forward])
        assert own.backward == pytest.approx([each + more[1] for each in without.backward])
        assert own.server == pytest.approx([each + (0.0 if packs else 16 * 0.03) for each in without.server])


def test_the_optimizers_step_of_the_server_delays_what_comes_next_but_not_the_last_gradient() -> None:
    shared = {"forward": 1, "uplink": 1, "server": 1, "downlink": 1, "backward": 1}
    assert step_of(a_pace(server_step=3, **shared)) == near(5)
    assert step_of(a_pace(server_step=6, **shared)) == near(1 + 6)


def test_a_full_server_serves_its_clients_in_turn() -> None:
    paces = [a_pace(forward=1, uplink=1, server=3, downlink=1, backward=1, server_step=0.5)] * 4
    assert step_of(*paces) == near(4 * 3.5)


def test_an_idle_server_is_not_felt() -> None:
    apart = a_pace(forward=5, uplink=1, server=0.5, downlink=1, backward=5)
    assert step_of(apart, apart) == near(12.5)


def test_peers_that_share_one_core_compute_one_after_the_other() -> None:
    split = a_pace(micros=8, forward=0.5, uplink=0.01, server=1, downlink=0.01, backward=0.5)
    assert step_of(split) < 1.2 * 8
    crowded_ = step_of(split, shared=1)
    assert 16 <= crowded_ < 16.1
    assert step_of(split, shared=2) == step_of(split)


@given(st.integers(1, 12), st.integers(1, 12))
def test_a_client_of_the_simulation_keeps_the_order_of_the_schedule(micros: int, window: int) -> None:
    """With a link that takes no time, a step lasts as long as the schedule's actions one after the other."""
    own = a_pace(micros=micros, forward=1, uplink=0, server=0.25, downlink=0, backward=2)._replace(window=window)
    now, free, replies = 0.0, 0.0, {}
    for action in order(micros, window):
        if action.what == "forward":
            now += 1
            free = replies[action.micro] = max(free, now) + 0.25
        else:
            now = max(now, replies[action.micro]) + 2
    assert step_of(own) == near(now)


# Properties of the simulation


@st.composite
def paces(draw: st.DrawFn) -> Pace:
    profile, server = Timetable(draw(profiles())), Timetable(draw(profiles()))
    link = LinkSpeed(draw(st.floats(1e4, 1e8)), draw(st.floats(1e4, 1e8)), draw(st.floats(0, 0.1)))
    micros = draw(st.integers(1, 8))
    return pace(profile, server, link, BATCH, draw(st.sampled_from(CUTS)), micros, draw(st.integers(1, micros)))


@unhurried
@given(paces(), st.floats(1, 20), st.floats(1, 20))
def test_more_bandwidth_is_never_slower(own: Pace, up: float, down: float) -> None:
    faster = own._replace(
        uplink=tuple(each / up for each in own.uplink), downlink=tuple(each / down for each in own.downlink)
    )
    for after, before in zip(simulate([Pipe(faster)], [Cores()])[0], simulate([Pipe(own)], [Cores()])[0], strict=True):
        assert after <= before * (1 + 1e-9)


@unhurried
@given(st.lists(paces(), min_size=2, max_size=4))
def test_another_client_never_makes_one_faster(each: list[Pace]) -> None:
    alone = simulate([Pipe(each[0])], [Cores()])[0]
    together = simulate([Pipe(own) for own in each], [Cores()])[0]
    for before, after in zip(alone, together, strict=True):
        assert before <= after * (1 + 1e-9)


@unhurried
@given(paces())
def test_no_step_is_shorter_than_the_bound_that_prunes(own: Pace) -> None:
    assert step_of(own) >= own.shortest() * (1 - 1e-9)


@unhurried
@given(st.lists(paces(), min_size=1, max_size=3), st.floats(0.5, 1.5))
def test_a_simulation_breaks_off_only_where_a_step_exceeds_its_limit(each: list[Pace], share: float) -> None:
    whole = [step_seconds(ends) for ends in simulate([Pipe(own) for own in each], [Cores()])]
    limit = max(whole) * share
    ends = simulate([Pipe(own, limit=limit) for own in each], [Cores()])
    broken = any(len(times) < 2 * WARM for times in ends)
    assert broken == (share < 1 - 1e-9) or math.isclose(share, 1)


# The search


def test_a_slow_link_is_met_with_a_late_cut_and_micro_batches() -> None:
    decision = decide(a_situation(a_client(link=a_link(1), profile=a_profile((0.01,) * 5))))
    assert decision.plans[0].cut == CUTS[-1]
    assert decision.plans[0].micro_batches > 1


def test_a_fast_link_and_a_fast_server_are_met_with_an_early_cut() -> None:
    assert decide(a_situation(a_client(link=a_link(10_000)))).plans[0].cut == CUTS[0]


def test_the_window_is_open_unless_the_config_closes_it() -> None:
    slow = a_client(link=a_link(1))
    opened, closed = (decide(a_situation(slow, micro_batches=8, window=window)).plans[0] for window in (0, 3))
    assert (opened.window, closed.window) == (8, 3)


@settings(unhurried, max_examples=60, derandomize=True)
@given(situations())
def test_what_is_left_out_of_the_search_costs_two_percent_at_most(situation: Situation) -> None:
    for crowd in crowds_of(situation):
        quick, full = (crowd.score(Search(crowd, each).run()[0]) for each in (False, True))
        assert quick is not None
        assert full is not None
        assert quick.slowest <= full.slowest * (1 + SIMPLER) * (1 + 1e-9)


@settings(unhurried, max_examples=15, derandomize=True)
@given(profiles(), st.integers(1, 8), st.floats(1, 300))
def test_clients_that_are_alike_lose_nothing_to_a_search_that_leaves_out(own: Any, count: int, mbps: float) -> None:
    sites = [a_client(client, profile=own, link=a_link(mbps)) for client in range(count)]
    (crowd,) = crowds_of(a_situation(*sites))
    quick, full = (crowd.score(Search(crowd, each).run()[0]) for each in (False, True))
    assert quick is not None
    assert full is not None
    assert quick.slowest <= full.slowest * (1 + SIMPLER) * (1 + 1e-9)


def a_throng(clients: int) -> Situation:
    """Return so many clients on five different links at one server that is slower than they are; 40 cuts."""
    cuts = [f"cut{number}" for number in range(40)]
    wire = [20 * KB * 0.93**number for number in range(40)]
    own, slow = (a_profile((second,) * 41, wire, cuts, fixed=1e-4) for second in (0.01, 0.04))
    links = [a_link(mbps, rtt=0.01) for mbps in (10, 20, 50, 200, 1000)]
    sites = [a_client(client, profile=own, link=links[client % 5]) for client in range(clients)]
    return replace(a_situation(*sites), servers=(ServerSite(0, Machine("", 1, 1), slow),))


@pytest.mark.parametrize("clients", [1, 4, 16, 100])
def test_however_many_clients_and_cuts_there_are_only_so_much_is_simulated(clients: int) -> None:
    (crowd,) = crowds_of(a_throng(clients))
    search = Search(crowd)
    search.run()
    # The last simulation of a search for a kind's best may exceed what is allowed.
    largest = clients * (WARM + COUNTED) * max(MICRO_BATCHES)
    assert 0 < crowd.effort <= (PASSES + 1) * (EFFORT + clients * EFFORT_EACH + len(search.kinds) * largest)
    assert crowd.effort < 200_000 + 2_000 * clients


@settings(unhurried, max_examples=30)
@given(situations())
def test_a_decision_is_a_function_of_the_situation(situation: Situation) -> None:
    again = msgspec.json.decode(msgspec.json.encode(situation), type=Situation)
    assert again == situation
    decision = decide(situation)
    assert decide(again) == decision
    assert msgspec.json.decode(msgspec.json.encode(decision), type=Decision) == decision


@settings(unhurried, max_examples=30)
@given(situations())
def test_what_is_predicted_is_what_an_evaluation_of_the_plans_finds(situation: Situation) -> None:
    decision = decide(situation)
    found = evaluate(situation, decision.plans)
    assert {client: forecast.step_seconds for client, forecast in found.items()} == decision.predicted


@settings(unhurried, max_examples=40)
@given(situations(most=1))
def test_nothing_that_was_tried_is_faster_by_more_than_simplicity_is_worth(situation: Situation) -> None:
    decision = decide(situation, full=True)
    tried = [candidate.slowest.step_seconds for candidate in decision.ranking]
    assert decision.predicted[0] <= min(tried) * (1 + SIMPLER) * (1 + 1e-9)
    whole = {0: replace(decision.plans[0], micro_batches=1, window=1)}
    assert decision.predicted[0] <= evaluate(situation, whole)[0].step_seconds * (1 + SIMPLER) * (1 + 1e-9)


def test_fewer_micro_batches_are_taken_where_more_gain_little() -> None:
    profile = a_profile((5,) * 5, wire=(100, 100, 100, 100))
    decision = decide(a_situation(a_client(profile=profile, link=a_link(1000)), cut="conv1"), full=True)
    fastest = min(decision.ranking, key=lambda candidate: candidate.slowest.step_seconds)
    assert fastest.micro_batches > decision.plans[0].micro_batches == decision.ranking[0].micro_batches


def test_alike_clients_share_a_plan_and_others_get_their_own() -> None:
    clients = [a_client(0, link=a_link(400)), a_client(1, link=a_link(420)), a_client(2, link=a_link(1))]
    plans = decide(a_situation(*clients)).plans
    assert plans[0] == plans[1] != plans[2]


def test_clients_that_take_turns_are_planned_as_if_alone() -> None:
    sites = [a_client(client, profile=a_profile((0.1 + client / 5,) * 5)) for client in range(3)]
    together = decide(a_situation(*sites, policy="round_robin"))
    alone = [decide(a_situation(site)) for site in sites]
    assert together.plans == {client: one.plans[client] for client, one in enumerate(alone)}
    assert together.predicted == {client: one.predicted[client] for client, one in enumerate(alone)}


def test_a_busy_server_drives_clients_that_train_at_once_to_later_cuts() -> None:
    even = a_profile((0.02,) * 5)
    site = a_client(link=a_link(800), profile=even)
    situation = a_situation(*(replace(site, client=client) for client in range(6)))
    situation = replace(situation, servers=(ServerSite(0, Machine("", 1, 1), even),))
    at_once, in_turn = decide(situation), decide(replace(situation, policy="round_robin"))
    assert CUTS.index(at_once.plans[0].cut) > CUTS.index(in_turn.plans[0].cut)


def test_clients_of_different_servers_do_not_feel_each_other() -> None:
    slow = a_client(1, link=a_link(1), server=1)
    one, both = decide(a_situation(a_client())), decide(a_situation(a_client(), slow))
    assert both.plans[0] == one.plans[0]
    assert both.predicted[0] == one.predicted[0]


# Limits


def test_what_the_config_fixes_is_kept() -> None:
    plan = decide(a_situation(cut="conv2", micro_batches=4, up="raw")).plans[0]
    assert (plan.cut, plan.micro_batches, plan.window) == ("conv2", 4, 4)


def test_a_place_may_be_an_index_or_a_module() -> None:
    assert decide(a_situation(cut="1")).plans[0].cut == "conv2"
    assert decide(a_situation(cut="block")).plans[0].cut == "block.fc2"


def test_no_cut_before_the_first_allowed_is_considered() -> None:
    decision = decide(a_situation(a_client(link=a_link(10_000)), min_cut="block.fc1"), full=True)
    assert {candidate.cut for candidate in decision.ranking} == {"block.fc1", "block.fc2"}


def test_slices_have_sixteen_samples_where_the_model_has_batch_norm() -> None:
    profile = a_profile(batch_norm=True)
    found = decide(a_situation(a_client(profile=profile, link=a_link(1))), full=True).ranking
    assert {candidate.micro_batches for candidate in found} == {1, 2}
    assert {c.micro_batches for c in decide(a_situation(a_client(profile=profile), micro_batches=8)).ranking} == {8}
    large = replace(profile, sizes=tuple(size * 100 // BATCH for size in SIZES))
    situation = a_situation(a_client(profile=large, link=a_link(1), batch=100))
    situation = replace(situation, servers=(replace(situation.servers[0], profile=large),))
    assert {candidate.micro_batches for candidate in decide(situation, full=True).ranking} == {1, 2, 4, 6}


def test_no_slice_is_without_a_sample() -> None:
    found = decide(a_situation(a_client(batch=5)), full=True).ranking
    assert {candidate.micro_batches for candidate in found} == {1, 2, 4}


def test_little_memory_closes_the_window_first_and_then_excludes() -> None:
    client = a_client(profile=a_profile(weights=MIB, saved=MIB))

    def with_memory(megabytes: float, cut: str = "") -> Decision:
        limits: dict[str, Any] = {"micro_batches": 8, "slots": 1, "client_memory_mb": megabytes, "cut": cut}
        return decide(a_situation(client, **limits), full=True)

    windows = [with_memory(megabytes, "conv2").plans[0].window for megabytes in (70, 69, 20, 14)]
    assert windows == [8, 7, 1, 1]
    tight = with_memory(20)
    excluded = {candidate.cut: candidate.excluded for candidate in tight.ranking if candidate.excluded}
    assert excluded == {
        "block.fc1": "takes 21.0 MiB at client 0",
        "block.fc2": "takes 28.0 MiB at client 0",
    }


def test_cuts_that_a_client_could_not_measure_are_excluded_with_a_note() -> None:
    profile = a_profile((0.1, 0.1), note="Out of memory: 'conv2' is the last cut whose front fits.")
    decision = decide(a_situation(a_client(profile=profile, link=a_link(1))), full=True)
    assert {candidate.cut for candidate in decision.ranking if not candidate.excluded} == {"conv1", "conv2"}
    assert {c.cut: c.excluded for c in decision.ranking if c.excluded} == {
        "block.fc1": "client 0 ran out of memory there",
        "block.fc2": "client 0 ran out of memory there",
    }
    assert decision.notes == (
        "Client 0 ran out of memory on the way to 'block.fc1', so no cut from there on is planned",
    )


def test_slices_that_a_server_could_not_measure_are_excluded_with_a_note() -> None:
    situation = a_situation(a_client(link=a_link(1)))
    fast = a_profile((0.01,) * 5)
    few = replace(fast, sizes=SIZES[:2], stretches=tuple(_first(each, 2) for each in fast.stretches))
    situation = replace(situation, servers=(ServerSite(0, Machine("", 1, 1), few),))
    decision = decide(situation, full=True)
    assert min(candidate.micro_batches for candidate in decision.ranking if not candidate.excluded) == 8
    assert "server 0 ran out of memory with slices of 32 samples" in {each.excluded for each in decision.ranking}
    assert decision.notes == (
        "Server 0 had no memory for slices of more than 4 samples, so larger ones are not planned",
    )
    with pytest.raises(PlanError) as caught:
        evaluate(situation, {0: Plan("conv1", 4, 4)})
    assert str(caught.value) == (
        "The plan of client 0 has M = 4, but server 0 ran out of memory with slices of 8 samples when it measured "
        "itself: plan again, or with more micro-batches"
    )


def _first(stretch: Any, count: int) -> Any:
    return replace(stretch, forward=stretch.forward[:count], backward=stretch.backward[:count])


# Errors

NOTHING_LEFT = {
    "memory": (
        a_situation(a_client(profile=a_profile(weights=MIB, saved=MIB)), client_memory_mb=2),
        "plan.client_memory_mb = 2 is too little for client 0: the smallest front, up to 'conv1', takes 3.0 MiB; "
        "set at least 3, or lower train.batch_size",
    ),
    "measured": (
        a_situation(a_client(profile=a_profile(()))),
        "Client 0 ran out of memory at every cut that is allowed: lower train.batch_size, or use a smaller model",
    ),
    "late": (
        a_situation(a_client(profile=a_profile((0.1,))), min_cut="conv2"),
        "Client 0 ran out of memory at every cut that is allowed: lower train.batch_size, or use an earlier "
        "model.cut or plan.min_cut",
    ),
    "forbidden": (
        a_situation(cut="conv1", min_cut="conv2"),
        "model.cut = 'conv1' comes before plan.min_cut = 'conv2', where the model may not be cut: move one of them, "
        "or set model.cut to auto",
    ),
    "end": (
        a_situation(cut="output"),
        "model.cut = 'output' is an end of the model, which leaves nothing to plan: name a place inside it, or set "
        "model.cut to auto",
    ),
    "unknown": (
        a_situation(min_cut="conv3"),
        "plan.min_cut = 'conv3' is no cut of the model: the nearest are 'conv2', 'conv1', 'block.fc2'",
    ),
    "other model": (
        replace(a_situation(), servers=(ServerSite(0, Machine("", 1, 1), a_profile(cuts="abcd")),)),
        "Client 0 and server 0 have no cut in common: give both the same model",
    ),
    "no cut": (
        a_situation(a_client(profile=a_profile((0.1,), wire=(), cuts=()))),
        "The model has no place where it can be cut for client 0: use another model",
    ),
    "no server": (
        replace(a_situation(), servers=()),
        "Client 0 is to be planned on server 0, which was not measured: measure it, or plan with another",
    ),
}


@pytest.mark.parametrize("case", NOTHING_LEFT)
def test_where_nothing_is_left_a_sentence_says_which_limit_to_relax(case: str) -> None:
    situation, sentence = NOTHING_LEFT[case]
    with pytest.raises(PlanError) as caught:
        decide(situation)
    assert str(caught.value) == sentence


def test_a_server_that_has_memory_for_no_slice_is_named() -> None:
    few = replace(a_profile((0.01,) * 5, note="Out of memory."), sizes=SIZES[:1])
    few = replace(few, stretches=tuple(_first(each, 1) for each in few.stretches))
    situation = replace(a_situation(micro_batches=8), servers=(ServerSite(0, Machine("", 1, 1), few),))
    with pytest.raises(PlanError) as caught:
        decide(situation)
    assert str(caught.value) == (
        "Server 0 ran out of memory with slices of 4 samples: raise train.micro_batches, or lower train.batch_size"
    )


GIVEN = {
    "missing": ({}, "The plan has nothing for client 0: plan again, or use one for all clients"),
    "unknown": (
        {0: Plan("conv3")},
        "The plan of client 0 cuts at 'conv3', which the model of client 0 does not have: "
        "the nearest are 'conv2', 'conv1', 'block.fc2'",
    ),
    "unmeasured": (
        {0: Plan("block.fc2")},
        "The plan of client 0 cuts at 'block.fc2', for which the memory of client 0 or server 0 was not enough when it "
        "measured itself: plan again",
    ),
}


@pytest.mark.parametrize("case", GIVEN)
def test_plans_that_do_not_fit_are_refused_with_a_sentence(case: str) -> None:
    plans, sentence = GIVEN[case]
    with pytest.raises(PlanError) as caught:
        evaluate(a_situation(a_client(profile=a_profile((0.1, 0.1)))), plans)
    assert str(caught.value) == sentence


# Links


def test_a_stable_link_is_taken_as_measured() -> None:
    assert assumed(a_link(50, 0.01, 0.2)) == (a_link(50, 0.01, 0.2), "")


def test_an_unstable_link_is_taken_at_its_slower_end_with_a_note() -> None:
    situation = a_situation(a_client(link=a_link(10, spread=1.0)))
    steady = a_situation(a_client(link=a_link(5)))
    assert decide(situation).predicted == decide(steady).predicted
    assert decide(situation).notes == (
        "Client 0's link is unstable (its rate varies by 100 %): planned with 5 Mbit/s up and 5 Mbit/s down",
    )


@pytest.mark.parametrize(
    ("rate", "taken", "why"),
    [(0.0, SLOWEST, "measures as zero"), (1e300, FASTEST, "measures as faster than any link is")],
)
def test_a_rate_that_cannot_be_is_replaced_by_one_that_can(rate: float, taken: float, why: str) -> None:
    link, reason = assumed(LinkSpeed(rate, rate, 0.0))
    assert (link.up, link.down, reason) == (taken, taken, why)


def test_a_link_that_measures_as_zero_makes_the_plan_send_as_little_as_it_can() -> None:
    decision = decide(a_situation(a_client(link=LinkSpeed(0, 0, 0))))
    assert decision.plans[0].cut == CUTS[-1]
    assert decision.notes == ("Client 0's link measures as zero: planned with 0.1 Mbit/s up and 0.1 Mbit/s down",)


# Shared cores


def test_peers_that_share_too_few_cores_are_told_so_and_their_cores_are_the_bottleneck() -> None:
    host = Machine("one", 1, 1)
    situation = a_situation(a_client(machine=host, link=a_link(10_000)))
    apart = decide(situation)
    situation = replace(situation, servers=(replace(situation.servers[0], machine=host, profile=a_profile()),))
    shared = decide(situation, full=True)
    assert shared.plans[0].micro_batches == 1
    assert shared.notes == (
        "Client 0 and server 0 share 1 core of one host, which are too few for all at once: micro-batches gain less",
    )
    pipelined = next(each for each in shared.ranking if each.micro_batches == 8)
    assert pipelined.slowest.bottleneck == "cores"
    assert apart.notes == ()


@pytest.mark.parametrize(("cores", "threads", "noted"), [(4, 2, False), (3, 2, True), (2, 1, False), (8, 2, False)])
def test_cores_are_shared_only_where_there_are_too_few(cores: int, threads: int, noted: bool) -> None:
    host = Machine("one", cores, threads)
    situation = a_situation(a_client(machine=host))
    situation = replace(situation, servers=(replace(situation.servers[0], machine=host),))
    assert bool(decide(situation).notes) == noted


def test_in_turn_only_those_that_compute_at_once_have_to_fit() -> None:
    host = Machine("one", 2, 1)
    sites = [a_client(client, machine=host) for client in range(3)]
    situation = replace(a_situation(*sites), servers=(ServerSite(0, host, a_profile()),))
    assert decide(situation).notes == (
        "Clients 0 to 2 and server 0 share 2 cores of one host, which are too few for all at once: "
        "micro-batches gain less",
    )
    in_turn = replace(situation, policy="round_robin")
    assert decide(in_turn).notes == ()
    greedy = tuple(replace(site, machine=Machine("one", 2, 2)) for site in sites)
    assert decide(replace(in_turn, clients=greedy)).notes == (
        "Clients 0 to 2 and server 0 share 2 cores of one host, which are too few for a client and its server at once: "
        "micro-batches gain less",
    )


def test_a_gpu_computes_for_one_after_the_other() -> None:
    host = Machine("one", 8, 1, "cuda")
    situation = a_situation(a_client(machine=host))
    situation = replace(situation, servers=(replace(situation.servers[0], machine=host),))
    assert decide(situation).notes[0].startswith("Client 0 and server 0 share a GPU of one host")


# Planning again


def test_a_plan_is_changed_only_for_enough() -> None:
    situation = a_situation(a_client(link=a_link(1)))
    best = decide(situation)
    worse = {0: Plan("conv1")}
    gain = 1 - best.predicted[0] / evaluate(situation, worse)[0].step_seconds
    better = improve(situation, worse, gain - 0.01)
    assert better is not None
    assert (better.plans, better.predicted) == (best.plans, best.predicted)
    assert improve(situation, worse, gain + 0.01) is None
    assert improve(situation, best.plans, 0.0) is None


def test_in_turn_the_sum_of_the_rounds_counts() -> None:
    sites = [a_client(0, link=a_link(1)), a_client(1, link=a_link(1), steps=1)]
    situation = a_situation(*sites, policy="round_robin")
    current = dict(decide(situation).plans) | {1: Plan("conv1")}
    assert improve(situation, current, 0.3) is None
    assert improve(situation, current, 0.01) is not None
    assert improve(replace(situation, policy="parallel"), current, 0.01) is None, "the slowest round stays as it is"


# What if


def test_other_links_and_numbers_of_clients_can_be_tried() -> None:
    situation = a_situation(a_client(0), a_client(1, link=a_link(1, rtt=0.5, spread=2.0)), cut="conv1", micro_batches=2)
    links = [site.link for site in relinked(situation, 16, 80, None).clients]
    assert [(link.up, link.down, link.rtt, link.spread) for link in links] == [(2e6, 1e7, 0, 0), (2e6, 1e7, 0.5, 0)]
    assert relinked(situation, None, None, 20).clients[1].link == replace(a_link(1, spread=2.0), rtt=0.02)
    assert [site.client for site in crowded(situation, 5).clients] == [0, 1, 2, 3, 4]
    assert crowded(situation, 5).clients[3].link == situation.clients[1].link
    assert crowded(situation, 1).clients == situation.clients[:1]
    assert freed(situation).limits == Limits()


# Words


def test_a_decision_is_explained_with_figures() -> None:
    wire = on_the_wire(1 * KB, BATCH, 1, labels=True) / 1e6
    profile = a_profile((0.001,) * 5)
    decision = decide(a_situation(a_client(link=a_link(8), profile=profile), cut="block.fc2"), full=True)
    micros = decision.plans[0].micro_batches
    (said,) = explain(decision)
    assert said.startswith(f"A cut after 'block.fc2' with M = {micros} takes ")
    assert " a step, and the uplink is busy for " in said
    alone = evaluate(a_situation(a_client(link=a_link(8), profile=profile)), {0: Plan("block.fc2")})[0].step_seconds
    assert alone > 2 * wire
    ratio = f"{alone / decision.predicted[0]:.2f}"
    assert f"M = 1 there would take {words.milliseconds(alone)}, {ratio} times as long, where the uplink" in said


def test_clients_with_different_plans_are_explained_apart() -> None:
    clients = [a_client(0, link=a_link(400)), a_client(1, link=a_link(400)), a_client(2, link=a_link(1))]
    said = explain(decide(a_situation(*clients)))
    assert [sentence.partition(":")[0] for sentence in said] == ["Clients 0 to 1", "Client 2"]


def test_a_server_that_is_the_bottleneck_is_named_with_its_load_by_all() -> None:
    sites = [a_client(client, link=a_link(10_000), profile=a_profile((0.01,) * 5)) for client in range(4)]
    situation = replace(a_situation(*sites), servers=(ServerSite(0, Machine("", 1, 1), a_profile()),))
    forecasts = evaluate(situation, {client: Plan("conv1", 4, 4) for client in range(4)})
    assert {forecast.bottleneck for forecast in forecasts.values()} == {"server"}
    slowest = max(forecasts.values(), key=lambda forecast: forecast.step_seconds)
    assert slowest.server_busy == pytest.approx(4 * 1.2, rel=0.05)
    assert slowest.step_seconds == pytest.approx(4 * 1.2, rel=0.05)


def test_a_front_that_is_long_on_its_way_is_cut_earlier_where_rounds_are_short() -> None:
    """The last cut has the fastest step, and nearly all of the weights in front of it."""
    heavy = a_profile(seconds=(0.01,) * 5, weights=2e6)
    short, long = (decide(a_situation(a_client(profile=heavy, steps=steps))) for steps in (1, 10_000))
    assert CUTS.index(short.plans[0].cut) < CUTS.index(long.plans[0].cut)
    kept = decide(a_situation(a_client(profile=heavy, steps=1), carried=2))
    assert CUTS.index(kept.plans[0].cut) <= CUTS.index(short.plans[0].cut)
    assert "the front is on the link for another" in " ".join(explain(kept))


def test_a_turn_begins_and_ends_with_the_front_on_the_link() -> None:
    profile = a_profile(weights=1e6)
    situation = a_situation(a_client(profile=profile, link=a_link(8.0, rtt=0.1)), carried=1)
    forecast = evaluate(situation, {0: Plan("conv2")})[0]
    assert forecast.turn_seconds == pytest.approx(2 * 2e6 * 2 / 1e6 + 0.2)
