"""What a run that plans keeps in its folder.

`plan.json` holds the plans that it used, round by round, so that another run can use the same (`--plan FILE`);
`profile.json` what it measured.
"""

from collections.abc import Iterable
from pathlib import Path

import msgspec

from zsplit.errors import ConfigError
from zsplit.plan.records import Situation
from zsplit.wire.messages import Plan


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    """Each client's plan from a round on (counted from 0), what a step was predicted to take (s), and why."""

    round: int = 0
    plans: dict[int, Plan]
    predicted: dict[int, float] = {}
    sentence: str = ""


def encode_plans(planned: Iterable[Planned]) -> bytes:
    """Return the contents of `plan.json`: what was planned, in order of the rounds."""
    return msgspec.json.format(msgspec.json.encode(list(planned)), indent=1) + b"\n"


def read_plans(path: Path, clients: int) -> list[Planned]:
    """Return what the file of an earlier run says; the first entry holds from round 0 on.

    Raises ConfigError where there is no such file, it is none of a plan, it does not begin with round 0 or its
    rounds are not in order, or one of the `clients` lacks a plan.
    """
    try:
        planned = msgspec.json.decode(path.expanduser().read_bytes(), type=list[Planned])
    except OSError as error:
        raise ConfigError(f"The plan {path} cannot be read ({error.strerror}): name a run's plan.json.") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path} is no plan of this version ({error}): name a run's plan.json.") from error
    rounds = [each.round for each in planned]
    if rounds[:1] != [0] or rounds != sorted(set(rounds)):
        raise ConfigError(f"The plan {path} must begin with round 0 and go on in order: name a run's plan.json.")
    for each in planned:
        missing = [client for client in range(clients) if client not in each.plans]
        if missing:
            raise ConfigError(
                f"The plan {path} has none for client {missing[0]} in round {each.round}, and "
                f"schedule.clients = {clients}: name the plan of a run with as many clients."
            )
    return planned


def read_situation(path: Path) -> Situation:
    """Return what a run planned from: `profile.json`, or the one in a run's folder. Raises ConfigError without one."""
    file = path.expanduser()
    file = file / "profile.json" if file.is_dir() else file
    try:
        situation = msgspec.json.decode(file.read_bytes(), type=Situation)
    except FileNotFoundError as error:
        raise ConfigError(
            f"There is no {file}: a run writes it when it plans, with model.cut or train.micro_batches auto, "
            "or with plan.predict = true."
        ) from error
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}): name a run's folder.") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{file} is no profile of this version ({error}): name a run's folder.") from error
    if not (situation.clients and situation.servers):
        raise ConfigError(f"{file} holds no client or no server: name the folder of a run that has planned.")
    return situation
