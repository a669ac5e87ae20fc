"""What `data.partition` says: who has which training samples, in one line of text. No torch."""

import json
from dataclasses import dataclass
from typing import Any

from zsplit.config.spec import Stretch, unknown

KEY = "data.partition"


@dataclass(frozen=True)
class Iid:
    """Random samples, equally many for each client."""


@dataclass(frozen=True)
class Replicate:
    """All samples for every client."""


@dataclass(frozen=True)
class Dirichlet:
    """A mix of labels for each client, drawn from a Dirichlet distribution around the mix of all samples."""

    alpha: float


@dataclass(frozen=True)
class Shards:
    """`k` random pieces for each client of the samples sorted by label."""

    k: int


@dataclass(frozen=True)
class Quantity:
    """Random samples; how many is drawn from a Dirichlet distribution over the clients."""

    alpha: float


@dataclass(frozen=True)
class ByLabel:
    """The samples of the listed labels, one list for each client."""

    labels: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class FromFile:
    """The samples whose positions a file lists, one list for each client."""

    path: str


Partition = Iid | Replicate | Dirichlet | Shards | Quantity | ByLabel | FromFile

NEEDS_LABELS = (Dirichlet, Shards, ByLabel)
"""Partitions that nobody can compute without the labels."""

FORMS = {
    "iid": "iid",
    "replicate": "replicate",
    "dirichlet": "dirichlet:alpha=A with A above 0, such as dirichlet:alpha=0.5",
    "shards": "shards:k=K with a whole number above 0, such as shards:k=2",
    "quantity": "quantity:alpha=A with A above 0, such as quantity:alpha=0.5",
    "labels": "labels: and a list of labels for each client, such as labels:[[0,1],[2,3]]",
    "file": "file: and the path of a file with the samples of each client, such as file:parts.json",
}


def parse_partition(text: str) -> Partition:
    """Return what a partition's text means. Raises `ConfigError`, which points at what cannot be read."""
    name, _, rest = text.partition(":")
    if name not in FORMS:
        raise unknown(KEY, text, name, FORMS)
    return _parsed(name, Stretch(KEY, text, len(name) + 1, rest, FORMS[name]))


def labels_missing(text: str) -> str:
    """Return the refusal of a partition by label where clients have no labels."""
    return (
        f'{KEY} = "{text}" needs labels, which clients do not have under train.labels = "server": '
        "take iid, replicate, quantity or file."
    )


def _parsed(name: str, stretch: Stretch) -> Partition:
    match name:
        case "dirichlet":
            return Dirichlet(stretch.parameter("alpha", float))
        case "shards":
            return Shards(int(stretch.parameter("k", int)))
        case "quantity":
            return Quantity(stretch.parameter("alpha", float))
        case "labels":
            return ByLabel(_lists(stretch))
        case "file":
            if not stretch.rest:
                raise stretch.refusal()
            return FromFile(stretch.rest)
        case _:
            stretch.nothing()
            return Iid() if name == "iid" else Replicate()


def _lists(stretch: Stretch) -> tuple[tuple[int, ...], ...]:
    try:
        lists = json.loads(stretch.rest)
    except json.JSONDecodeError as error:
        raise stretch.refusal(error.pos) from error
    if not (isinstance(lists, list) and lists and all(map(_is_labels, lists))):
        raise stretch.refusal()
    return tuple(map(tuple, lists))


def _is_labels(found: Any) -> bool:
    return (
        isinstance(found, list)
        and all(type(label) is int and label >= 0 for label in found)
        and len(set(found)) == len(found) > 0
    )
