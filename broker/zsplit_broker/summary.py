"""What a run was, in figures: all from the tallies of the leases that count."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import msgspec

from zsplit.wire.messages import Tally
from zsplit_broker.books import RoundRecord
from zsplit_broker.scheduler import Scheduler
from zsplit_broker.tally import NOTHING, add, mean, quantile


def summarise(scheduler: Scheduler, run: str, folder: Path) -> dict[str, object]:
    """Return the figures of a run, as `summary.json` has them."""
    config, history = scheduler.config, scheduler.history
    train = add(record.train for record in history)
    server = add(record.server for record in history)
    last = next((r.validation for r in reversed(history) if r.validation.samples), NOTHING)
    tests = {"": scheduler.test, "_codec": scheduler.tested(True), "_raw": scheduler.tested(False)}
    everything = add([train, server, *(r.validation for r in history), *scheduler.books.tests.values()])
    outcome = scheduler.outcome
    return {
        "name": config.run.name,
        "run": run,
        "ok": outcome is not None and outcome.ok,
        "sentence": outcome.sentence if outcome else "",
        "policy": config.schedule.policy,
        "model": config.model.name,
        "data": config.data.name,
        "cut": scheduler.plans.cut,
        "plan": {str(client): msgspec.structs.asdict(plan) for client, plan in scheduler.plans.in_use().items()},
        "clients": config.schedule.clients,
        "rounds": len(history),
        "steps": train.steps,
        "samples": train.samples,
        "train_loss": mean(history[-1].train.loss_sum, history[-1].train.samples) if history else None,
        "val_loss": mean(last.loss_sum, last.samples),
        "val_accuracy": mean(last.top1, last.samples),
        "val_top5": mean(last.top5, last.samples),
        **{f"test_loss{by}": mean(tally.loss_sum, tally.samples) for by, tally in tests.items()},
        **{f"test_accuracy{by}": mean(tally.top1, tally.samples) for by, tally in tests.items()},
        **{f"test_top5{by}": mean(tally.top5, tally.samples) for by, tally in tests.items()},
        "seconds": scheduler.seconds,
        "step_seconds": {
            "median": quantile(train.step_seconds, 0.5),
            "p95": quantile(train.step_seconds, 0.95),
        },
        "predicted_step_seconds": median(scheduler.plans.predicted.values()) if scheduler.plans.predicted else None,
        "bytes": bytes_by_kind(everything.traffic),
        "bytes_raw": bytes_by_kind(everything.traffic_raw),
        "idle": idle(history, scheduler.members(), scheduler.servers()),
        "bubble": bubble(history, scheduler.members(), scheduler.servers()),
        "model_file": str(folder / "model.safetensors") if outcome and outcome.ok else "",
        "versions": [record.version for record in history],
        "stored": list(scheduler.stored),
    }


def idle(history: Sequence[RoundRecord], clients: Sequence[int], servers: Sequence[int]) -> dict[str, object]:
    """Return the share of the training's wall time in which a peer did not compute: on average, and of each.

    A server computes in turns and merges; what it does for evaluations beside them does not count.
    """
    wall = sum(record.training for record in history)
    computed_c = {c: sum(r.clients[c].busy for r in history if c in r.clients) for c in clients}
    computed_s = {k: sum(add(of[k] for of in (r.servers, r.merges) if k in of).busy for r in history) for k in servers}
    return {
        "client": _rest(sum(computed_c.values()), wall * len(clients)),
        "server": _rest(sum(computed_s.values()), wall * len(servers)),
        "clients": {str(c): _rest(busy, wall) for c, busy in computed_c.items()},
        "servers": {str(k): _rest(busy, wall) for k, busy in computed_s.items()},
    }


def bubble(history: Sequence[RoundRecord], clients: Sequence[int], servers: Sequence[int]) -> dict[str, object]:
    """Return the share of its turns that a peer waited for the other side: in all, and of each.

    A client waits within its own turns; a server while at least one turn is open at it and it does not compute.
    """
    turns = {c: add(r.clients[c] for r in history if c in r.clients) for c in clients}
    backs = {k: sum(r.servers[k].busy for r in history if k in r.servers) for k in servers}
    opened = {k: sum(r.open.get(k, 0.0) for r in history) for k in servers}
    return {
        "client": _share(add(turns.values())),
        "server": _rest(sum(backs.values()), sum(opened.values())),
        "clients": {str(c): _share(turn) for c, turn in turns.items()},
        "servers": {str(k): _rest(backs[k], opened[k]) for k in servers},
    }


def _share(turns: Tally) -> float | None:
    return turns.idle / turns.seconds if turns.seconds else None


def _rest(busy: float, wall: float) -> float | None:
    """Return the share of the wall time that is not busy, None of none."""
    return max(0.0, 1 - busy / wall) if wall else None


def bytes_by_kind(traffic: Mapping[str, tuple[int, int]]) -> dict[str, object]:
    """Return bytes up and down as seen from the clients: all, and by kind."""
    kinds = {kind: {"up": up, "down": down} for kind, (up, down) in sorted(traffic.items())}
    total = {way: sum(row[way] for row in kinds.values()) for way in ("up", "down")}
    return {**total, "kinds": kinds}
