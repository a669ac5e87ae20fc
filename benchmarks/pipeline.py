"""What micro-batches gain on a slow link: a step with several numbers of them, and that of a stop-and-wait loop.

    M        the product, the mini-batch cut into M micro-batches that are computed and sent at the same time
    pickle   a client and a server with the same two parts, over one REQ/REP pair and pickle, and nothing else

The link is the product's own shaping, and the loop waits by the same computation of when a message would be
through. One run has all M, a round each, in another order in each repetition; the loop runs before it and after it.

A run before that measures both ends and the link, and plans: the table shows which M it chose, and below every step how
far the measured time is from what the planner predicts for that M out of the same measurement.
"""

import pickle
import random
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import click
import torch
import zmq
from common import child, json_option, machine, show, with_goal, write
from rich.box import SIMPLE
from rich.table import Table
from runs import CLASSES, UNLIMITED, Pass, Plans, Speed, Task, list_of, plan_of, say, shown, speed_of, step_seconds
from trainers import Setting, build, example, optimizer_of, serve_pickle

import zsplit
from zsplit.plan import Situation, evaluate

LINKS = "10/25,50/50,200/200,unlimited"
MICRO_BATCHES = "1,2,4,8,16,32"

SPEEDUP_GOALS = {("pipelearn/vgg5", "10/25"): 1.4, ("pipelearn/vgg5", "50/50"): 1.9}
"""How much faster than M = 1 and than the loop the best M is to be, by model and link."""

PLANNED_GOAL = 1.02
"""Step time of the planned M ÷ that of M = 1 at most."""

ERROR_GOAL = 0.1
"""How far a step may be from the predicted one, as a share of it."""

PIPELEARN_SECONDS = {("pipelearn/vgg5", "50/50"): 0.414}
"""A step of PipeLearn at its best, by model and link: its VGG5 with the same cut, batch and round trip."""

WARM_UP = 2
"""Steps of the loop that do not count."""


class Case(NamedTuple):
    """A model, the shape of its samples, and where it is cut."""

    model: str
    shape: tuple[int, ...]
    cut: str


CASES = {
    "vgg5": Case("pipelearn/vgg5", (3, 32, 32), "block2.pool"),
    "resnet18": Case("resnet18", (3, 32, 32), "layer1.1.relu_1"),
    "digits": Case("digits/cnn", (1, 8, 8), "pool"),
}


def measure(case: Case, task: Task, micro_batches: Sequence[int], repetitions: int) -> dict[str, Any]:
    """Measure every M and the loop over one link; return medians, predictions and what they are compared with."""
    situation, planned = plan_of(task, case.cut)
    plan = planned.plans[0]
    plans: dict[int, Plans] = {each: task.plans(plan.cut, each) for each in sorted({1, *micro_batches})}
    plans[plan.micro_batches] = planned.plans
    order = random.Random(0)
    course = [each for _ in range(repetitions) for each in order.sample([*plans], len(plans))]
    setting = Setting(case.model, plan.cut, case.shape, task.batch, 1, 1, WARM_UP + task.steps)
    before = pickle_seconds(setting, task.speed)
    taken = step_seconds(task, [plans[each] for each in course])
    after = pickle_seconds(setting, task.speed)
    return figures_of(task, situation, plans, plan.micro_batches, list(zip(course, taken, strict=True)), before + after)


def figures_of(
    task: Task,
    situation: Situation,
    plans: dict[int, Plans],
    planned: int,
    taken: Sequence[tuple[int, float]],
    pickled: Sequence[float],
) -> dict[str, Any]:
    """Return the figures of one link; `taken` has a median step for each round, with its M."""
    seconds = {each: median(second for m, second in taken if m == each) for each in plans}
    predicted = {each: evaluate(situation, plan)[0].step_seconds for each, plan in plans.items()}
    best = min(seconds, key=lambda each: seconds[each])
    place = task.model, str(task.speed)
    return {
        "model": task.model,
        "cut": plans[1][0].cut,
        "link": str(task.speed),
        "rtt_ms": task.speed.rtt,
        "batch": task.batch,
        "step_seconds": {**seconds, "pickle": median(pickled)},
        "predicted_seconds": predicted,
        "errors": {each: seconds[each] / predicted[each] - 1 for each in plans},
        "best": best,
        "planned": planned,
        "ratios": {
            "one": seconds[1] / seconds[best],
            "pickle": median(pickled) / seconds[best],
            "planned": seconds[planned] / seconds[1],
            "pipelearn": PIPELEARN_SECONDS[place] / seconds[best] if place in PIPELEARN_SECONDS else None,
        },
        "goals": {"speedup": SPEEDUP_GOALS.get(place), "planned": PLANNED_GOAL, "error": ERROR_GOAL},
        "taken": taken,
        "pickled": pickled,
    }


# The stop-and-wait loop


def pickle_seconds(setting: Setting, speed: Speed) -> list[float]:
    """Return the duration of each step of the loop over such a link, the first ones left out."""
    with (
        child(serve_pickle, setting) as (_, endpoint),
        child(train_pickle, setting, speed, endpoint) as (_, durations),
    ):
        return list(durations[WARM_UP:])


def train_pickle(report: Connection, setting: Setting, speed: Speed, endpoint: str) -> None:
    """Train the front: send smashed data and labels, wait for the gradient, step; report how long each step took."""
    torch.set_num_threads(setting.threads)
    front, _ = zsplit.split(build(setting), example(setting), setting.cut)
    optimizer = optimizer_of(front.train())
    inputs = torch.randn(setting.batch, *setting.shape)
    labels = torch.randint(CLASSES, (setting.batch,))
    socket = zmq.Context().socket(zmq.REQ)
    socket.connect(endpoint)
    link, durations = Pass(speed), []
    for _ in range(setting.steps):
        began = time.perf_counter()
        optimizer.zero_grad()
        smashed = front(inputs)
        socket.send(link.up(pickle.dumps((smashed.detach(), labels), pickle.HIGHEST_PROTOCOL)))
        gradient, _ = pickle.loads(link.down(socket.recv()))
        smashed.backward(gradient)
        optimizer.step()
        durations.append(time.perf_counter() - began)
    report.send(durations)


# The command


def table_of(points: Sequence[dict[str, Any]], shape: Sequence[int]) -> Table:
    """Return one model's figures as a table; in brackets what a ratio is to reach."""
    first = points[0]
    columns = [m for m in first["step_seconds"] if all(m in point["step_seconds"] for point in points)]
    title = (
        f"A step of {first['model']}, {first['batch']} samples of {shown(shape)}, cut at {first['cut']}: seconds, "
        f"and below by how much they miss the prediction (to be within {ERROR_GOAL:.0%})"
    )
    table = Table(title=title, caption="\n".join(_beside_pipelearn(points)), box=SIMPLE)
    table.add_column("Mbit/s", min_width=len(str(UNLIMITED)))
    for column in (*columns, "M = 1 ÷ best", "pickle ÷ best", "planned, ÷ M = 1"):
        table.add_column(f"M = {column}" if isinstance(column, int) else column, justify="right")
    for point in points:
        goals, ratios = point["goals"], point["ratios"]
        table.add_row(
            point["link"],
            *(_cell(point, column) for column in columns),
            *(_speedup(ratios[each], goals["speedup"]) for each in ("one", "pickle")),
            f"M = {point['planned']}\n" + with_goal(f"{ratios['planned']:.2f}", f"{goals['planned']:g}"),
        )
    return table


def _cell(point: dict[str, Any], column: Any) -> str:
    error = f"{point['errors'][column]:+.0%}" if column in point["errors"] else ""
    return f"{point['step_seconds'][column]:.3f}\n{error}"


def _speedup(ratio: float, goal: float | None) -> str:
    return f"{ratio:.2f}" if goal is None else with_goal(f"{ratio:.2f}", f"{goal:g}")


def _beside_pipelearn(points: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"PipeLearn at {point['link']}, at its best: {PIPELEARN_SECONDS[point['model'], point['link']]:.3f} s, "
        f"{point['ratios']['pipelearn']:.2f} times as long"
        for point in points
        if point["ratios"]["pipelearn"]
    ]


def _case(name: str) -> Case:
    if name not in CASES:
        raise ValueError(name)
    return CASES[name]


def _micro_batches(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise ValueError(text)
    return int(text)


count = click.IntRange(min=1)


@click.command(context_settings={"show_default": True})
@click.option("--models", default="vgg5,resnet18", callback=list_of(_case, "vgg5,resnet18"), help="Or `digits`.")
@click.option("--links", default=LINKS, callback=list_of(speed_of, LINKS), help="Mbit/s up and down.")
@click.option("--micro-batches", default=MICRO_BATCHES, callback=list_of(_micro_batches, MICRO_BATCHES), help="The M.")
@click.option("--batch", default=100, type=count, help="Samples in a mini-batch.")
@click.option("--steps", default=4, type=count, help="Steps in a round.")
@click.option("--repetitions", default=3, type=count, help="Rounds of each M.")
@json_option
def main(
    models: list[Case],
    links: list[Speed],
    micro_batches: list[int],
    batch: int,
    steps: int,
    repetitions: int,
    file: Path | None,
) -> None:
    """Compare a step at several numbers of micro-batches with what was predicted, and with a stop-and-wait loop."""
    points = []
    for case in models:
        rows = []
        for speed in links:
            say(f"{case.model} at {speed} …")
            rows.append(measure(case, Task(case.model, case.shape, batch, speed, 1, steps), micro_batches, repetitions))
        show(table_of(rows, case.shape))
        points += rows
    write(file, {"machine": machine("torch", "pyzmq"), "points": points})


if __name__ == "__main__":
    main()
