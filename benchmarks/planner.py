"""Whether the planner's choice is the best one: against every cut and number of micro-batches, tried in turn.

For each combination of model, link and number of clients, a first run measures and plans. Then all that the planner
had to choose from is trained, a round each. Last, the planner's choice and the three that were fastest are measured
again, interleaved and with more steps, since the fastest of many noisy figures flatters itself.

A cut is hopeless where its bytes alone, at the measured rate of the link, take more than twice as long as the whole
step of the chosen plan is predicted to: no M can mend that. It is tried too, but only with the M that is best for it
by the prediction, and for one step.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import click
from common import json_option, machine, show, with_goal, write
from rich.box import SIMPLE
from rich.table import Table
from runs import Plans, Task, plan_of, say, speed_of, step_seconds

from zsplit.plan import Situation, decide, evaluate

MODELS = {"digits/cnn": ((1, 8, 8), 32), "splitnn/mlp": ((1, 28, 28), 64), "pipelearn/vgg5": ((3, 32, 32), 100)} | {
    "resnet18": ((3, 32, 32), 64)
}
"""Shape of a sample, and samples in a mini-batch."""

COMBINATIONS = (
    ("digits/cnn", "10/25", 1),
    ("digits/cnn", "50/50", 1),
    ("digits/cnn", "10/25", 4),
    ("splitnn/mlp", "10/25", 1),
    ("splitnn/mlp", "50/50", 2),
    ("splitnn/mlp", "200/200", 4),
    ("pipelearn/vgg5", "10/25", 1),
    ("pipelearn/vgg5", "50/50", 1),
    ("pipelearn/vgg5", "200/200", 1),
    ("pipelearn/vgg5", "50/50", 2),
    ("pipelearn/vgg5", "200/200", 4),
    ("resnet18", "200/200", 1),
    ("resnet18", "unlimited", 1),
)
"""Model, link and clients. resnet18's later fronts have megabytes of weights, which move whenever the cut does."""

MEDIAN_GOAL, WORST_GOAL = 1.05, 1.15
"""Step time of the choice ÷ that of the best: over all combinations."""

ERROR_GOAL = 0.1
"""How far the choice's step may be from the predicted one, as a share of it: the median over all combinations."""

HOPELESS = 2.0
"""A cut whose bytes take so many times as long as the chosen step is hopeless."""

BEST = 3
"""How many of the fastest are measured again."""

Key = tuple[str, int]
"""A cut and a number of micro-batches, the same for every client."""


class Effort(NamedTuple):
    """Steps of a round, first when all are tried and then when few are measured again, so many rounds each."""

    steps: int
    again: int
    repetitions: int


class Trial(NamedTuple):
    """Plans, and what a step was predicted and found to take (s)."""

    plans: Plans
    predicted: float
    actual: float


def measure(task: Task, effort: Effort) -> dict[str, Any]:
    """Try everything in one combination; return how the planner's choice compares."""
    situation, planned = plan_of(task)
    choice = median(planned.predicted.values())
    hopeless = {cut for cut in cuts_of(situation) if wire_seconds(situation, cut) > HOPELESS * choice}
    keys = considered(situation)
    hopeful = [key for key in keys if key[0] not in hopeless]
    say(f"  {len(hopeful)} to try, {len(hopeless)} cuts without hope")
    tried = try_all(task._replace(steps=effort.steps), situation, hopeful)
    tried |= try_all(task._replace(steps=1), situation, best_by_prediction(task, situation, keys, hopeless))
    finalists = [planned.plans, *others(planned.plans, tried)]
    again = measure_again(task._replace(steps=effort.again), finalists, effort.repetitions)
    return figures_of(task, situation, list(zip(finalists, again, strict=True)), tried)


def considered(situation: Situation) -> list[Key]:
    """Return what the planner has to choose from, in the model's order."""
    candidates = decide(situation, full=True).ranking
    keys = {(each.cut, each.micro_batches) for each in candidates if not each.excluded}
    cuts = cuts_of(situation)
    return sorted(keys, key=lambda key: (cuts.index(key[0]), key[1]))


def cuts_of(situation: Situation) -> tuple[str, ...]:
    """Return the model's cuts, in its order."""
    return situation.clients[0].profile.cuts


def wire_seconds(situation: Situation, cut: str) -> float:
    """Return what the bytes of a mini-batch take at the measured rate, the slower way of the median client (s)."""
    place = cuts_of(situation).index(cut)
    return median(
        site.batch * max(site.profile.up[place] / site.link.up, site.profile.down[place] / site.link.down)
        for site in situation.clients
    )


def predicted(situation: Situation, plans: Plans) -> float:
    """Return the step that the planner expects, in seconds: the median over clients."""
    return median(forecast.step_seconds for forecast in evaluate(situation, plans).values())


def best_by_prediction(task: Task, situation: Situation, keys: Sequence[Key], cuts: set[str]) -> list[Key]:
    """Return each of the cuts with the M that is best for it by the prediction."""
    by_cut = {cut: [key for key in keys if key[0] == cut] for cut in cuts_of(situation) if cut in cuts}
    return [min(each, key=lambda key: predicted(situation, task.plans(*key))) for each in by_cut.values() if each]


def try_all(task: Task, situation: Situation, keys: Sequence[Key]) -> dict[Key, Trial]:
    """Train a round with each; return what was predicted and what it took."""
    plans = [task.plans(*key) for key in keys]
    taken = step_seconds(task, plans) if plans else []
    each = zip(keys, plans, taken, strict=True)
    return {key: Trial(plan, predicted(situation, plan), seconds) for key, plan, seconds in each}


def others(chosen: Plans, tried: Mapping[Key, Trial]) -> list[Plans]:
    """Return the fastest plans of those tried, the chosen one left out."""
    fastest = sorted(tried, key=lambda key: tried[key].actual)
    return [tried[key].plans for key in fastest if keys_of(chosen) != {key}][:BEST]


def keys_of(plans: Plans) -> set[Key]:
    """Return the cuts and numbers of micro-batches that the clients have."""
    return {(plan.cut, plan.micro_batches) for plan in plans.values()}


def measure_again(task: Task, finalists: Sequence[Plans], repetitions: int) -> list[float]:
    """Train rounds with each of these in turn, forwards and backwards by turns; return the median step of each."""
    order = list(range(len(finalists)))
    course = [place for number in range(repetitions) for place in (order[::-1] if number % 2 else order)]
    taken = step_seconds(task, [finalists[place] for place in course])
    return [median(seconds for place, seconds in zip(course, taken, strict=True) if place == each) for each in order]


def figures_of(
    task: Task, situation: Situation, again: Sequence[tuple[Plans, float]], tried: Mapping[Key, Trial]
) -> dict[str, Any]:
    """Return the figures of a combination. `again`: plans and their steps as measured again, the chosen one first."""
    chosen, actual = again[0]
    best, best_seconds = min(again, key=lambda pair: pair[1])
    expected = predicted(situation, chosen)
    return {
        "model": task.model,
        "link": str(task.speed),
        "clients": task.clients,
        "batch": task.batch,
        "chosen": sorted(keys_of(chosen)),
        "chosen_seconds": actual,
        "best": sorted(keys_of(best)),
        "best_seconds": best_seconds,
        "over_best": actual / best_seconds,
        "predicted_seconds": expected,
        "error": actual / expected - 1,
        "error_of_all": median(abs(trial.actual / trial.predicted - 1) for trial in tried.values()),
        "again": [[sorted(keys_of(plans)), seconds] for plans, seconds in again],
        "tried": [[*key, trial.predicted, trial.actual] for key, trial in tried.items()],
    }


def summary_of(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures over all combinations, and what they are to reach."""
    return {
        "over_best": {
            "median": median(point["over_best"] for point in points),
            "worst": max(point["over_best"] for point in points),
        },
        "error": median(abs(point["error"]) for point in points),
        "goals": {"median": MEDIAN_GOAL, "worst": WORST_GOAL, "error": ERROR_GOAL},
    }


# The command


def table_of(points: Sequence[dict[str, Any]], summary: dict[str, Any]) -> Table:
    """Return the figures as a table; below it those over all combinations, in brackets what they are to reach."""
    table = Table(title="The planner's choice beside the best of all: seconds a step", box=SIMPLE)
    table.caption = "\n".join(_words(summary))
    table.add_column("model, Mbit/s, clients", overflow="fold")
    table.add_column("tried", justify="right")
    for column in ("chosen", "best"):
        table.add_column(column)
        table.add_column("s", justify="right")
    for column in ("chosen ÷ best", "predicted", "off by", "all off by"):
        table.add_column(column, justify="right")
    for point in points:
        table.add_row(
            f"{point['model']}\n{point['link']} ×{point['clients']}",
            str(len(point["tried"])),
            *(_places(point["chosen"]), f"{point['chosen_seconds']:.3f}"),
            *(_places(point["best"]), f"{point['best_seconds']:.3f}"),
            f"{point['over_best']:.3f}",
            *(f"{point['predicted_seconds']:.3f}", f"{point['error']:+.0%}", f"{point['error_of_all']:.0%}"),
        )
    return table


def _places(keys: Sequence[Key]) -> str:
    return "\n".join(f"{cut}\nM = {micro_batches}" for cut, micro_batches in keys)


def _words(summary: dict[str, Any]) -> Iterator[str]:
    over, goals = summary["over_best"], summary["goals"]
    middle, worst = (with_goal(f"{over[each]:.3f}", f"{goals[each]:g}") for each in ("median", "worst"))
    yield f"chosen ÷ best: median {middle}, worst {worst}"
    yield "predicted off by: median " + with_goal(f"{summary['error']:.1%}", f"{goals['error']:.0%}")


def tasks(only: Sequence[str], batch: int) -> dict[str, Task]:
    """Return the combinations by name: all, or those with one of the texts in it. A batch of 0 is the usual one."""
    named = {}
    for model, link, clients in COMBINATIONS:
        shape, usual = MODELS[model]
        named[f"{model} {link} x{clients}"] = Task(model, shape, batch or usual, speed_of(link), clients, 1)
    chosen = {name: task for name, task in named.items() if not only or any(text in name for text in only)}
    if not chosen:
        raise click.BadParameter(f"no combination has that in its name: they are {', '.join(named)}")
    return chosen


count = click.IntRange(min=1)


@click.command(context_settings={"show_default": True})
@click.option("--only", multiple=True, help="Only combinations with this in their name, such as `vgg5` or `10/25 x4`.")
@click.option("--batch", default=0, type=click.IntRange(min=0), help="Samples in a mini-batch; 0: each model's own.")
@click.option("--steps", default=2, type=count, help="Steps of each plan when all are tried.")
@click.option("--again", default=6, type=count, help="Steps of a round when the best are measured again.")
@click.option("--repetitions", default=3, type=count, help="Rounds of each when the best are measured again.")
@json_option
def main(only: tuple[str, ...], batch: int, steps: int, again: int, repetitions: int, file: Path | None) -> None:
    """Compare the planner's choices with everything that it could have chosen."""
    points = []
    for name, task in tasks(only, batch).items():
        say(f"{name} …")
        points.append(measure(task, Effort(steps, again, repetitions)))
        say(f"  chosen ÷ best {points[-1]['over_best']:.3f}, predicted off by {points[-1]['error']:+.0%}")
    summary = summary_of(points)
    show(table_of(points, summary))
    write(file, {"machine": machine("torch", "pyzmq"), **summary, "points": points})


if __name__ == "__main__":
    main()
