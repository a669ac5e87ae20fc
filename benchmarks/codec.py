"""How fast codecs are: a tensor encoded and decoded on this machine, and what is left of its bytes.

The tensor has the shape of smashed data (batch 64, 64 channels, 32×32: four million float32) and is of two kinds:
normal values, and the same after a ReLU. Codecs take turns, one pass over all of them in each round; freed memory is
kept as the product keeps it. The rate is the tensor's bytes divided by the time to encode and decode it, medians over
the rounds.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from common import json_option, machine, show, with_goal, write
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor

import zsplit
from zsplit.codec import Context
from zsplit.memory import keep_freed

SHAPE = (64, 64, 32, 32)

SPECS = (
    "raw",
    "half",
    "bf16",
    "quantize:bits=8",
    "quantize:bits=4",
    "quantize:bits=3",
    "quantize:bits=4,scope=channel",
    "quantize:bits=4,round=stochastic",
    "topk:ratio=0.9",
    "topk:ratio=0.99",
    "randtopk:ratio=0.99,alpha=0.1",
    "ms:ratio=0.99,bits=2",
    "ms:ratio=0.97,bits=3",
    "ms:ratio=0.99,bits=2,scope=sample",
    "lz4",
    "ms:ratio=0.99,bits=2+lz4",
    "mask",
)

GOALS = {"quantize:bits=8": 1500.0, "quantize:bits=4": 1500.0, "ms:ratio=0.99,bits=2": 600.0}
"""MB of float32 a second, encoded and decoded, that are to be reached."""

KEEPS = "topk:ratio=0.99"
"""What went up before where a codec needs to know what was kept."""


def tensors() -> dict[str, Tensor]:
    """Return the tensors by kind."""
    normal = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    return {"normal": normal, "ReLU": normal.relu()}


def pass_once(spec: str, tensor: Tensor) -> dict[str, float]:
    """Return seconds to encode and to decode a tensor, and its bytes on the wire."""
    codec, ours, theirs = zsplit.codec(spec), Context(), Context()
    if codec.spec.answers:
        before = zsplit.codec(KEEPS)
        before.decode(*before.encode(tensor, ours), theirs)
    began = time.perf_counter()
    meta, frames = codec.encode(tensor, ours, seed=1)
    encoded = time.perf_counter()
    codec.decode(meta, frames, theirs)
    return {"encode": encoded - began, "decode": time.perf_counter() - encoded, "nbytes": meta.nbytes}


def measure(specs: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Take every codec over every tensor in turn; return the medians. The first round is not counted."""
    kinds = tensors()
    taken: dict[tuple[str, str], list[dict[str, float]]] = {(spec, kind): [] for spec in specs for kind in kinds}
    for _ in range(rounds + 1):
        for spec, kind in taken:
            taken[spec, kind].append(pass_once(spec, kinds[kind]))
    return [row_of(spec, kind, kinds[kind].nbytes, passes[1:]) for (spec, kind), passes in taken.items()]


def row_of(spec: str, kind: str, raw: int, passes: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return the figures of a codec on a tensor: seconds, MB a second, and how many times less than raw it is."""
    encode, decode = (median(each[way] for each in passes) for way in ("encode", "decode"))
    nbytes = passes[0]["nbytes"]
    return {
        "codec": spec,
        "kind": kind,
        "encode": encode,
        "decode": decode,
        "rate": raw / (encode + decode) / 1e6,
        "less": raw / nbytes,
        "goal": GOALS.get(spec),
        "passes": list(passes),
    }


def table_of(rows: Sequence[dict[str, Any]], threads: int) -> Table:
    """Return the figures as a table."""
    table = Table(title=f"Codecs: 4 M float32, {threads} threads", box=SIMPLE)
    for column in ("codec", "values", "encode ms", "decode ms", "MB/s (to reach)", "times less"):
        table.add_column(column, justify="left" if column in ("codec", "values") else "right")
    for row in rows:
        # A raw tensor is not touched: a rate would say nothing.
        rate = "no copy" if row["codec"] == "raw" else f"{row['rate']:.0f}"
        figure = with_goal(rate, f"{row['goal']:.0f}") if row["goal"] else rate
        times = [f"{1e3 * row[way]:.1f}" for way in ("encode", "decode")]
        table.add_row(row["codec"], row["kind"], *times, figure, f"{row['less']:.2f}")
    return table


@click.command(context_settings={"show_default": True})
@click.option("--rounds", default=11, type=click.IntRange(min=1), help="How often every codec is measured.")
@click.option("--threads", default=0, type=click.IntRange(min=0), help="Threads that compute; 0: torch's default.")
@click.option("--codec", "specs", multiple=True, help="A codec to measure; may be given more than once.")
@json_option
def main(rounds: int, threads: int, specs: tuple[str, ...], file: Path | None) -> None:
    """Measure how fast codecs are."""
    keep_freed()
    if threads:
        torch.set_num_threads(threads)
    rows = measure(specs or SPECS, rounds)
    show(table_of(rows, torch.get_num_threads()))
    write(file, {"machine": machine("torch", "lz4"), "threads": torch.get_num_threads(), "rows": rows})


if __name__ == "__main__":
    main()
