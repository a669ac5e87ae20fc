"""From what was measured to a plan for each client, in the planner's terms and in words. Pure.

The scheduler asks (`Decide`), the shell answers with what `answer` makes of it (`Planned`): the search takes its time,
and the journal keeps its result, so that nothing is decided anew when a run is replayed or resumed.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Literal

from zsplit.config import Config
from zsplit.plan import ClientSite, Limits, Machine, ServerSite, Situation, decide, evaluate, improve
from zsplit.wire.messages import Plan, Prepared
from zsplit_broker.events import Decide, Joined, Planned
from zsplit_broker.survey import Survey

NAMED = 3
"""Plans that a sentence names; it counts the others."""

SLOTS = {"sgd": 1, "adam": 2, "adamw": 2}
"""Buffers that an optimizer keeps for each parameter (`sgd` with momentum)."""


# The first plan


def situation_of(
    config: Config, peers: Mapping[tuple[str, int], Joined], survey: Survey, limits: Limits, steps: Mapping[int, int]
) -> Situation:
    """Return what was measured, as the planner takes it. `steps` is the number of steps of each client in a round."""
    clients = [
        ClientSite(
            client=client,
            machine=machine(peers["client", client].prepared),
            profile=measured.profile,
            link=measured.link,
            steps=steps[client],
            batch=min(config.train.batch_size, peers["client", client].prepared.train),
            server=measured.server,
            turns=turns_of(config, steps[client]),
        )
        for client, measured in sorted(survey.clients.items())
    ]
    servers = [
        ServerSite(server, machine(peers["server", server].prepared), profile)
        for server, profile in sorted(survey.servers.items())
    ]
    return Situation(policy_of(config), tuple(clients), tuple(servers), limits)


def policy_of(config: Config) -> Literal["parallel", "round_robin"]:
    """Return whether clients train one after the other; whether they wait for each other at the end changes no step."""
    return "round_robin" if config.schedule.policy == "round_robin" else "parallel"


def turns_of(config: Config, steps: int) -> int:
    """Return in how many turns a client takes the steps of a round."""
    every = config.schedule.aggregate_every
    return -(-steps // every) if every > 0 else 1


def machine(prepared: Prepared) -> Machine:
    """Return where a peer computes."""
    return Machine(prepared.host, prepared.cores, prepared.threads, prepared.device)


def limits_of(config: Config, configured: Plan, earliest: str = "") -> Limits:
    """Return what the config fixes; `configured` is the plan that it would be without a planner.

    `earliest` is the place that `plan.min_cut` means, by a peer's word; the config's own without one.
    """
    micros = config.train.micro_batches
    optimizer = config.train.optimizer
    slots = SLOTS[optimizer] if optimizer != "sgd" or config.train.momentum else 0
    return Limits(
        cut="" if config.model.cut == "auto" else configured.cut,
        micro_batches=micros if isinstance(micros, int) else 0,
        window=config.plan.window,
        min_cut=earliest or str(config.plan.min_cut),
        client_memory_mb=config.plan.client_memory_mb,
        slots=slots,
        carried=0 if config.schedule.optimizer_state == "reset" else slots,
        up=configured.up,
        down=configured.down,
    )


# The answer


def answer(asked: Decide) -> Planned:
    """Return the plans for a situation: the fastest, what is fixed as it is, or the current ones where none gains.

    Raises PlanError where there is none.
    """
    limits = asked.situation.limits
    if limits.cut and limits.micro_batches:
        forecasts = evaluate(asked.situation, asked.current)
        predicted = {client: forecast.step_seconds for client, forecast in forecasts.items()}
        return Planned(asked.round, asked.current, predicted, _sentence(asked.current, predicted))
    if not asked.current:
        first = decide(asked.situation)
        sentence = ". ".join([_sentence(first.plans, first.predicted), *first.notes])
        return Planned(asked.round, first.plans, first.predicted, sentence)
    better = improve(asked.situation, asked.current, asked.gain)
    if better is None:
        return Planned(asked.round)
    return Planned(asked.round, better.plans, better.predicted, _changes(asked, better.plans, better.predicted))


def _sentence(plans: Mapping[int, Plan], predicted: Mapping[int, float]) -> str:
    """Say what the clients were told to use, those that are alike together with their median step."""
    alike: defaultdict[Plan, list[int]] = defaultdict(list)
    for client, plan in sorted(plans.items()):
        alike[plan].append(client)
    said = [
        f"{_clients(clients)}: cut {plan.cut}, {_count(plan.micro_batches)}, "
        f"predicted {_step(predicted, clients)} s a step"
        for plan, clients in alike.items()
    ]
    return _listed(said)


def _changes(asked: Decide, plans: Mapping[int, Plan], predicted: Mapping[int, float]) -> str:
    """Say which clients' plans changed and how, what that is to gain, and why; those that are alike together."""
    forecasts = evaluate(asked.situation, asked.current)
    before = {client: forecast.step_seconds for client, forecast in forecasts.items()}
    alike: defaultdict[tuple[Plan, Plan, str], list[int]] = defaultdict(list)
    for client, plan in sorted(plans.items()):
        if plan != asked.current[client]:
            alike[asked.current[client], plan, asked.why.get(client, "")].append(client)
    said = []
    for (old, new, why), clients in alike.items():
        gain = f"predicted {_step(before, clients)} → {_step(predicted, clients)} s a step"
        said.append(f"{_clients(clients)}: {', '.join([*_differences(old, new), gain])}" + (f": {why}" if why else ""))
    return _listed(said)


def _differences(old: Plan, new: Plan) -> Iterator[str]:
    if new.cut != old.cut:
        yield f"cut {old.cut} → {new.cut}"
    if new.micro_batches != old.micro_batches:
        yield f"{old.micro_batches} → {_count(new.micro_batches)}"


def _step(seconds: Mapping[int, float], clients: list[int]) -> str:
    return f"{median(seconds[client] for client in clients):.3g}"


def _count(micro_batches: int) -> str:
    return f"{micro_batches} micro-batch" + ("es" if micro_batches > 1 else "")


def _clients(indexes: list[int]) -> str:
    if len(indexes) == 1:
        return f"client {indexes[0]}"
    if indexes == list(range(indexes[0], indexes[-1] + 1)):
        return f"clients {indexes[0]} to {indexes[-1]}"
    return "clients " + ", ".join(map(str, indexes))


def _listed(said: list[str]) -> str:
    more = len(said) - NAMED
    return "; ".join(said[:NAMED]) + (f"; and {more} more" if more > 0 else "")
