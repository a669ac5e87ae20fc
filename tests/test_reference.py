"""The reference measures everything else; here it is held against hand-written loops and its own rules."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from reference import Reference, Settings, State, average, deal, derive, permutation, weights
from torch import Tensor, nn

from zsplit import seeds

FRONT = ("0.weight", "0.bias", "1.weight", "1.bias")
MOMENTUM = Settings(rounds=2, batch_size=8, momentum=0.9, weight_decay=1e-3, client_lr=0.05, server_lr=0.05)
ADAM = Settings(rounds=2, batch_size=8, optimizer="adam", client_lr=1e-2, server_lr=1e-2)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 7))


def smooth() -> nn.Module:
    """A model whose loss is a plain mean over samples: no BatchNorm, no dropout."""
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 7))


def blobs(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    """Return one pair (inputs, labels) for each size: seven clouds of points, one for each label."""
    generator = torch.Generator().manual_seed(1)
    centres = 2 * torch.randn(7, 6, generator=generator)
    labels = [torch.randint(7, (size,), generator=generator) for size in sizes]
    return [(centres[y] + torch.randn(len(y), 6, generator=generator), y) for y in labels]


def trained(
    settings: Settings, *sizes: int, front: tuple[str, ...] = FRONT, random_modules: tuple[str, ...] = ("3",)
) -> State:
    return Reference(plain, blobs(*sizes), settings, front, random_modules).train()[0][-1]


def loop(settings: Settings, visits: list[tuple[int, int]], *sizes: int) -> tuple[State, dict[str, dict]]:
    """Train `plain` the way any PyTorch tutorial does, over visits (client, round), with one optimizer."""
    torch.manual_seed(derive(settings.seed, "init"))
    model, data = plain(), blobs(*sizes)
    options = {"lr": settings.client_lr, "weight_decay": settings.weight_decay, "foreach": False}
    if settings.optimizer == "sgd":
        options |= {"momentum": settings.momentum, "nesterov": settings.nesterov}
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    optimizer = kinds[settings.optimizer](model.parameters(), **options)
    for client, round_ in visits:
        x, y = data[client]
        order = permutation(len(y), derive(settings.seed, "order", client, round_, 0))
        for step, batch in enumerate(order.split(settings.batch_size)):
            optimizer.zero_grad()
            hidden = model[:3](x[batch])
            torch.manual_seed(derive(settings.seed, "dropout", client, round_, step, 0, "3"))
            F.cross_entropy(model[3:](hidden), y[batch]).backward()
            optimizer.step()
    return model.state_dict(), {name: optimizer.state[p] for name, p in model.named_parameters()}


def assert_same(left: State, right: State) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def differ(left: State, right: State) -> bool:
    return any(not torch.equal(left[name], right[name]) for name in weights(left))


def named(version: State, prefix: str) -> set[str]:
    return {name for name in version if name.startswith(prefix)}


def test_it_imports_nothing_of_zsplit() -> None:
    tree = ast.parse(Path(__file__).with_name("reference.py").read_text("utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {node.module for node in imports if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    assert "torch" in modules
    assert not [name for name in modules if name is None or name.startswith("zsplit")]


def test_it_derives_the_seeds_that_zsplit_derives() -> None:
    for parts in [(0, "init"), (7, "order", 2, 11, 0), (-1, "dropout", 0, 0, 3, 1, "layer1.0.relu_1")]:
        assert derive(*parts) == seeds.derive(*parts)


@pytest.mark.parametrize(
    "settings",
    [
        MOMENTUM,
        replace(MOMENTUM, nesterov=True),
        ADAM,
        replace(ADAM, weight_decay=0.1),
        replace(ADAM, optimizer="adamw", weight_decay=0.1),
    ],
    ids=["sgd", "nesterov", "adam", "adam with decay", "adamw"],
)
def test_one_client_is_plain_training_bit_for_bit(settings: Settings) -> None:
    version = trained(settings, 30)
    state, buffers = loop(settings, [(0, 0), (0, 1)], 30)
    assert_same(weights(version), state)
    for name, held in buffers.items():
        for buffer, tensor in held.items():
            assert torch.equal(version[f"optimizer/{buffer}/{name}"], tensor)


def test_round_robin_is_plain_training_on_the_data_of_one_client_after_another() -> None:
    state, _ = loop(MOMENTUM, [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)], 20, 10, 13)
    assert_same(weights(trained(MOMENTUM, 20, 10, 13)), state)


@pytest.mark.parametrize("every", [-1, 1, 3])
def test_parallel_with_one_client_is_plain_training_however_often_it_aggregates(every: int) -> None:
    parallel = replace(MOMENTUM, policy="parallel", aggregate_every=every, local_epochs=2)
    assert_same(trained(parallel, 30), trained(replace(MOMENTUM, local_epochs=2), 30))


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_parallel_averages_what_each_client_alone_would_have_reached(weighting: str) -> None:
    sizes, settings = (8, 20), replace(MOMENTUM, rounds=1, policy="parallel", weighting=weighting)
    clients = Reference(plain, blobs(*sizes), settings, FRONT, ("3",))
    start = clients.train()[0][0]
    alone = [clients.turn(start, client, 0, clients.steps(client, 0)).state for client in (0, 1)]
    first, second = (state["0.weight"].double() for state in alone)
    expected = (8 * first + 20 * second) / 28 if weighting == "samples" else (first + second) / 2
    assert torch.equal(trained(settings, *sizes)["0.weight"], expected.float())


def test_weighting_makes_a_difference_where_shards_differ_and_none_where_they_do_not() -> None:
    samples = replace(MOMENTUM, policy="parallel")
    uniform = replace(samples, weighting="uniform")
    assert differ(trained(samples, 8, 40), trained(uniform, 8, 40))
    assert_same(trained(samples, 24, 24), trained(uniform, 24, 24))


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_a_client_whose_shard_is_used_up_weighs_nothing_until_the_round_ends(weighting: str) -> None:
    settings = replace(MOMENTUM, rounds=1, policy="parallel", aggregate_every=1, weighting=weighting)
    clients = Reference(plain, blobs(8, 16), settings, FRONT, ("3",))
    versions, _ = clients.train()
    short, long = clients.steps(0, 0), clients.steps(1, 0)
    first = [(clients.turn(versions[0], i, 0, steps[:1]).state, 8) for i, steps in enumerate((short, long))]
    assert_same(versions[1], clients.turn(average(first), 1, 0, long[1:]).state)


def test_sgd_momentum_is_absent_until_a_step_makes_it_and_without_momentum() -> None:
    versions, _ = Reference(plain, blobs(16), MOMENTUM).train()
    assert named(versions[0], "optimizer/") == set()
    assert len(named(versions[1], "optimizer/momentum_buffer/")) == 6
    assert named(trained(replace(MOMENTUM, momentum=0.0), 16), "optimizer/") == set()


def test_steps_are_counted_along_in_turn_and_by_the_maximum_in_parallel() -> None:
    def steps(settings: Settings) -> tuple[float, int]:
        version = trained(settings, 8, 24)
        return version["optimizer/step/4.bias"].item(), version["1.num_batches_tracked"].item()

    assert steps(ADAM) == (8, 8)
    assert steps(replace(ADAM, policy="parallel")) == (6, 6)
    assert steps(replace(ADAM, policy="parallel", aggregate_every=1)) == (6, 6)


@pytest.mark.parametrize("policy", ["round_robin", "parallel"])
def test_reset_starts_every_turn_with_a_fresh_optimizer(policy: str) -> None:
    reset = replace(MOMENTUM, policy=policy, optimizer_state="reset")
    assert named(trained(reset, 8, 8), "optimizer/") == set()
    without = replace(reset, momentum=0.0)
    assert_same(trained(reset, 8, 8), trained(without, 8, 8))  # a turn is one step: no momentum yet
    assert differ(trained(reset, 24, 24), trained(without, 24, 24))


def test_local_buffers_of_the_front_stay_with_the_client_and_round_robin_has_one_back() -> None:
    version = trained(replace(ADAM, optimizer_state="local"), 8, 24)
    assert named(version, "local/1/step/") == {f"local/1/step/{name}" for name in FRONT}
    assert [version[f"local/{client}/step/0.weight"].item() for client in (0, 1)] == [2, 6]
    assert named(version, "optimizer/step/") == {"optimizer/step/4.weight", "optimizer/step/4.bias"}
    assert version["optimizer/step/4.weight"] == 8


def test_local_buffers_of_both_parts_stay_with_the_client_in_parallel() -> None:
    version = trained(replace(ADAM, policy="parallel", optimizer_state="local"), 8, 24)
    assert named(version, "optimizer/") == set()
    assert [version[f"local/{client}/step/4.weight"].item() for client in (0, 1)] == [2, 6]


def test_local_buffers_survive_the_rounds_in_which_their_client_is_not_sampled() -> None:
    settings = replace(ADAM, rounds=4, policy="parallel", optimizer_state="local", clients_per_round=1)
    reference = Reference(plain, blobs(8, 8, 8), settings, FRONT, ("3",))
    sampled = [client for round_ in range(4) for client in reference.sampled(round_)]
    version = reference.train()[0][-1]
    counts = {client: version[f"local/{client}/step/0.bias"].item() for client in set(sampled)}
    assert counts == {client: sampled.count(client) for client in sampled}
    assert len(named(version, "local/")) == len(counts) * 3 * 6


def test_sampled_clients_are_distinct_in_order_and_change_from_round_to_round() -> None:
    reference = Reference(plain, blobs(*[4] * 10), Settings(clients_per_round=4))
    rounds = [reference.sampled(round_) for round_ in range(5)]
    assert all(clients == sorted(set(clients)) and len(clients) == 4 for clients in rounds)
    assert len({tuple(clients) for clients in rounds}) > 1
    assert rounds == [reference.sampled(round_) for round_ in range(5)]


def test_dropout_depends_on_the_run_s_seed_alone() -> None:
    first = trained(MOMENTUM, 16)
    torch.manual_seed(99)
    assert_same(trained(MOMENTUM, 16), first)
    assert differ(trained(MOMENTUM, 16, random_modules=()), first)
    assert differ(trained(replace(MOMENTUM, seed=1), 16), first)


def test_a_random_module_that_is_called_twice_draws_anew() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout()

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.drop(x), self.drop(x)])

    reference = Reference(Twice, [], Settings(), random_modules=("drop",))
    with reference.seeded(0, 0, 0, 0):
        first, second = reference.model(torch.ones(64))
    torch.manual_seed(derive(0, "dropout", 0, 0, 0, 0, "drop_1"))
    assert not torch.equal(first, second)
    assert torch.equal(second, F.dropout(torch.ones(64)))


@pytest.mark.parametrize("slices", [3, 7, 50])
def test_micro_batches_give_loss_and_gradient_of_the_whole_batch_to_rounding(slices: int) -> None:
    settings = replace(MOMENTUM, batch_size=7)
    versions, losses = Reference(smooth, blobs(17), settings).train()
    sliced, sliced_losses = Reference(smooth, blobs(17), replace(settings, micro_batches=slices)).train()
    torch.testing.assert_close(sliced, versions)
    assert sliced_losses == pytest.approx(losses)


STATISTICS = ("1.running_mean", "1.running_var", "1.num_batches_tracked")


def test_deferred_batch_norm_moves_as_if_the_mini_batch_were_whole() -> None:
    still = Settings(batch_size=12, client_lr=0.0, server_lr=0.0, rounds=2)  # BatchNorm's input stays the same
    whole, deferred, micro = (
        trained(settings, 30, 24)
        for settings in (still, replace(still, micro_batches=3), replace(still, micro_batches=3, batch_norm="micro"))
    )
    torch.testing.assert_close(deferred, whole, rtol=1e-5, atol=1e-6)
    assert [version["1.num_batches_tracked"].item() for version in (whole, deferred, micro)] == [10, 10, 30]
    assert not torch.allclose(micro["1.running_mean"], whole["1.running_mean"], rtol=0.01)


@pytest.mark.parametrize("slices", [1, 3])
def test_when_running_statistics_move_changes_nothing_else(slices: int) -> None:
    settings = replace(MOMENTUM, micro_batches=slices)
    deferred, micro = (trained(replace(settings, batch_norm=mode), 22) for mode in ("deferred", "micro"))
    changed = [name for name in deferred if not torch.equal(deferred[name], micro[name])]
    assert changed == ([] if slices == 1 else list(STATISTICS))


def test_every_local_epoch_goes_through_all_samples_in_an_order_of_its_own() -> None:
    steps = Reference(plain, blobs(20), Settings(local_epochs=2, batch_size=8)).steps(0, 5)
    assert [(step, len(batch)) for step, batch in steps] == [(0, 8), (1, 8), (2, 4), (3, 8), (4, 8), (5, 4)]
    for epoch in (0, 1):
        order = torch.cat([batch for _, batch in steps[3 * epoch : 3 * epoch + 3]])
        assert torch.equal(order, permutation(20, derive(0, "order", 0, 5, epoch)))


def test_the_loss_of_a_round_is_the_mean_over_its_samples() -> None:
    still = Settings(batch_size=7, client_lr=0.0, server_lr=0.0)
    reference = Reference(smooth, blobs(17, 4), still)
    x, y = (torch.cat(parts) for parts in zip(*reference.data, strict=True))
    assert reference.train()[1] == pytest.approx([F.cross_entropy(reference.model(x), y).item()])


def test_clipping_bounds_the_norm_of_a_step_over_both_parts() -> None:
    settings = Settings(batch_size=16, clip_norm=0.01, client_lr=1.0, server_lr=1.0)
    (before, after), _ = Reference(smooth, blobs(16), settings).train()
    moved = torch.cat([(after[name] - before[name]).flatten() for name in before]).norm().item()
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_each_part_has_its_learning_rate() -> None:
    front, back = {"0.weight", "0.bias"}, {"2.weight", "2.bias"}
    for settings, moving in ((Settings(server_lr=0.0), front), (Settings(client_lr=0.0), back)):
        (before, after), _ = Reference(smooth, blobs(16), settings, front).train()
        assert {name for name in before if not torch.equal(before[name], after[name])} == moving


def test_frozen_parameters_stay_and_get_no_buffers() -> None:
    def frozen() -> nn.Module:
        model = plain()
        model[0].requires_grad_(False)
        return model

    settings = replace(ADAM, policy="parallel", clip_norm=1.0)
    versions, _ = Reference(frozen, blobs(16, 10), settings).train()
    assert torch.equal(versions[0]["0.weight"], versions[-1]["0.weight"])
    assert not [name for name in versions[-1] if name.startswith("optimizer/") and "/0." in name]


def test_averages_are_summed_in_float64_and_divided_once() -> None:
    shares = [({"w": torch.tensor(value)}, n) for value, n in ((1e8, 3), (1.0, 5), (-1e8, 3))]
    assert torch.equal(average(shares)["w"], torch.tensor(5 / 11))


def test_averages_are_summed_in_client_order() -> None:
    huge, one, minus = (({"w": torch.tensor(value)}, 1) for value in (1e17, 1.0, -1e17))
    assert average([huge, one, minus])["w"] == 0
    assert torch.equal(average([huge, minus, one])["w"], torch.tensor(1 / 3))


def test_integers_and_step_counts_are_joined_by_the_maximum() -> None:
    states = [{"n": torch.tensor(n), "optimizer/step/w": torch.tensor(n / 2)} for n in (4, 9, 2)]
    joined = average([(state, 1) for state in states])
    assert (joined["n"].item(), joined["optimizer/step/w"].item()) == (9, 4.5)


def test_a_name_is_averaged_over_those_who_hold_it_and_taken_as_it_is_from_one() -> None:
    shares = [({"a": torch.tensor(1.0)}, 1), ({"a": torch.tensor(4.0), "b": torch.tensor(-0.0)}, 2), ({}, 50)]
    joined = average(shares)
    assert joined["a"].item() == 3.0
    assert torch.signbit(joined["b"])


def test_the_deal_is_complete_disjoint_and_holds_back_what_was_asked() -> None:
    dealt = deal(3, 100, 3, val_fraction=0.1)
    shards = permutation(100, derive(3, "partition")).tensor_split(3)
    for client, (shard, (train, held_out)) in enumerate(zip(shards, dealt, strict=True)):
        order = permutation(len(shard), derive(3, "validation", client))
        assert torch.equal(torch.cat([held_out, train]), shard[order])
    assert [(len(train), len(held_out)) for train, held_out in dealt] == [(31, 3), (30, 3), (30, 3)]
    assert sorted(torch.cat([part for pair in dealt for part in pair]).tolist()) == list(range(100))


@pytest.mark.parametrize("policy", ["round_robin", "parallel"])
def test_it_learns(policy: str) -> None:
    data, rate = blobs(100, 60, 90), 0.01
    settings = Settings(
        policy=policy, rounds=6, local_epochs=2, batch_size=10, momentum=0.9, client_lr=rate, server_lr=rate
    )
    reference = Reference(plain, data, settings, FRONT, ("3",))
    versions, losses = reference.train()
    before, after = (reference.evaluate(version, *data[0]) for version in (versions[0], versions[-1]))
    assert losses[-1] < losses[0] / 2
    assert before.top1 < 50
    assert after.top1 > 90
    assert after.loss < before.loss / 3


def test_an_evaluation_counts_every_sample_whatever_the_batch_size_and_trains_nothing() -> None:
    x, y = blobs(50)[0]
    scores = []
    for batch_size in (50, 7):
        reference = Reference(plain, [], Settings(batch_size=batch_size))
        version = {name: tensor.clone() for name, tensor in reference.model.state_dict().items()}
        scores.append(reference.evaluate(version, x, y))
        assert_same(reference.model.state_dict(), version)
    logits = reference.model(x)
    ranks = (logits > logits.gather(1, y[:, None])).sum(1)
    assert (scores[0].top1, scores[0].top5) == ((ranks < 1).sum().item(), (ranks < 5).sum().item())
    assert (scores[0].samples, scores[0].top1, scores[0].top5) == (50, scores[1].top1, scores[1].top5)
    assert scores[0].loss == pytest.approx(F.cross_entropy(logits, y, reduction="sum").item())
    assert scores[1].loss == pytest.approx(scores[0].loss)


def test_an_evaluation_between_rounds_changes_nothing() -> None:
    reference = Reference(plain, blobs(16), MOMENTUM, FRONT, ("3",))
    (version, *_), _ = reference.train()
    reference.evaluate(version, *reference.data[0])
    for round_ in range(MOMENTUM.rounds):
        version, _ = reference.round_robin(version, round_)
    assert_same(version, trained(MOMENTUM, 16))
