"""Policies as data: a round is a list of stages, and a stage is the turns that may run side by side.

After each stage the contributions of its turns are merged into the next version: one is joined to it
(round-robin hands the front on), several are averaged (parallel split learning). Where one back goes from client to
client (`shared_order = "turn"`), a merge follows the last of them. A round can be printed:

    >>> print(picture(stages_of(config, [0, 1], {0: 3, 1: 2})))
    stage 0   client 0: steps 0 to 2
    stage 1   client 1: steps 0 to 1
"""

from collections.abc import Mapping, Sequence
from random import Random

from zsplit.config import Config
from zsplit.seeds import derive
from zsplit.wire.messages import Share

Stage = tuple[Share, ...]


def participants(config: Config, round_: int, clients: Sequence[int] | None = None) -> list[int]:
    """Return the clients of this round, in order: all of these, or a sample drawn for the round (SplitFed, FedAvg).

    Without `clients` those of the config.
    """
    everyone = list(range(config.schedule.clients)) if clients is None else list(clients)
    size = config.schedule.clients_per_round
    if not size or size >= len(everyone):
        return everyone
    return sorted(Random(derive(config.run.seed, "sample", round_)).sample(everyone, size))  # noqa: S311


def stages_of(config: Config, clients: Sequence[int], steps: Mapping[int, int]) -> list[Stage]:
    """Return the stages of these clients' round. `steps` is the number of steps that each client has in a round."""
    if config.schedule.policy == "round_robin":
        return [(Share(client, 0, steps[client]),) for client in clients]
    longest = max(steps[client] for client in clients)
    length = config.schedule.aggregate_every if config.schedule.aggregate_every > 0 else longest
    segments = [
        tuple(Share(client, first, min(length, steps[client] - first)) for client in clients if steps[client] > first)
        for first in range(0, longest, length)
    ]
    return [(share,) for segment in segments for share in segment] if hands_back_on(config) else segments


def hands_back_on(config: Config) -> bool:
    """Whether the one back of all clients goes from turn to turn between two merges."""
    return config.schedule.server_model == "shared" and config.schedule.shared_order == "turn"


def shares_back(config: Config) -> bool:
    """Whether the turns of a stage train one back together."""
    return config.schedule.server_model != "replica" and not hands_back_on(config)


def segment_of(config: Config, stages: Sequence[Stage], number: int) -> int:
    """Return the first stage since the merge before this one: where one back is handed on, several have none between.

    What they left belongs together.
    """
    while hands_back_on(config) and number and stages[number - 1][0].first == stages[number][0].first:
        number -= 1
    return number


def merges_after(config: Config, stages: Sequence[Stage], number: int) -> bool:
    """Whether a merge follows a stage: always, except between turns that hand their back on."""
    last = number + 1 == len(stages)
    return last or not hands_back_on(config) or stages[number + 1][0].first != stages[number][0].first


def picture(stages: Sequence[Stage]) -> str:
    """Return the stages as text, one line each."""
    return "\n".join(
        f"stage {number}   "
        + "   ".join(f"client {s.client}: steps {s.first} to {s.first + s.steps - 1}" for s in stage)
        for number, stage in enumerate(stages)
    )
