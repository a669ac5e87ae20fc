"""The stages that a spec may be made of, each with its options and their limits."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from re import fullmatch
from typing import Any, Literal, NamedTuple, Protocol

Scope = Literal["tensor", "sample", "channel"]


@dataclass(frozen=True)
class TopK:
    """Keep the values of largest magnitude: a share of 1 − `ratio` of the tensor, or of each sample."""

    ratio: Fraction
    scope: Scope = "tensor"


@dataclass(frozen=True)
class RandTopK:
    """As many as `TopK`, each of them with probability `alpha` one of the others: while training.

    After Zheng et al., "Reducing Communication for Split Learning by Randomized Top-k Sparsification" (IJCAI 2023).
    """

    ratio: Fraction
    alpha: Fraction
    scope: Scope = "tensor"


@dataclass(frozen=True)
class Mask:
    """Keep what was kept of the tensor that this one answers. Positions need not travel."""


@dataclass(frozen=True)
class Raw:
    """Values as they are."""


@dataclass(frozen=True)
class Half:
    """Values in 16 bits: IEEE's half precision, or bfloat16."""

    brain: bool = False


@dataclass(frozen=True)
class Quantize:
    """Values as codes of `bits` bits on an even grid that has zero on it, for the tensor or for each channel."""

    bits: int
    scope: Scope = "tensor"
    round: Literal["nearest", "stochastic"] = "nearest"


@dataclass(frozen=True)
class Ms:
    """Mask-encoded sparsification: the largest values exactly, all others as codes of `bits` bits that also mark them.

    After "Mask-Encoded Sparsification: Mitigating Biased Gradients in Communication-Efficient Split Learning" (ECAI
    2024). `floor` is the paper's Algorithm 1, `nearest` its code.
    """

    ratio: Fraction
    bits: int
    scope: Scope = "tensor"
    round: Literal["nearest", "floor"] = "nearest"


@dataclass(frozen=True)
class Lz4:
    """The bytes of all that goes before, compressed without loss where that helps."""


Select = TopK | RandTopK | Mask
Values = Raw | Half | Quantize | Ms
Stage = Select | Values | Lz4


@dataclass(frozen=True)
class Spec:
    """A spec as it was read: which values, how each is written, and whether the bytes are compressed."""

    text: str
    select: Select | None
    values: Values
    lz4: bool

    @property
    def lossless(self) -> bool:
        """Whether every tensor comes back bit for bit."""
        return self.select is None and isinstance(self.values, Raw)

    @property
    def keeps(self) -> bool:
        """Whether it leaves positions that `mask` can use on the way back."""
        return isinstance(self.select, TopK | RandTopK) or isinstance(self.values, Ms)

    @property
    def answers(self) -> bool:
        """Whether it needs the positions that were kept on the way there."""
        return isinstance(self.select, Mask)


class Option(Protocol):
    """What may stand behind the `=`: `read` returns the value, None for what is none; `words` says what it must be."""

    @property
    def words(self) -> str: ...

    def read(self, text: str) -> object: ...


class Whole(NamedTuple):
    """A whole number within limits."""

    least: int
    most: int

    @property
    def words(self) -> str:
        return f"a whole number from {self.least} to {self.most}"

    def read(self, text: str) -> object:
        value = int(text) if fullmatch(r"[0-9]{1,6}", text) else -1
        return value if self.least <= value <= self.most else None


class Share(NamedTuple):
    """A number from 0 to below 1, in decimal arithmetic: 1 − 0.99 is 0.01."""

    @property
    def words(self) -> str:
        return "a number from 0 to below 1"

    def read(self, text: str) -> object:
        value = Fraction(text) if fullmatch(r"[0-9]{0,3}(\.[0-9]{1,12})?", text) and text else Fraction(1)
        return value if value < 1 else None


class Choice(NamedTuple):
    """One of some words."""

    among: tuple[str, ...]

    @property
    def words(self) -> str:
        return " or ".join(self.among)

    def read(self, text: str) -> object:
        return text if text in self.among else None


class Kind(NamedTuple):
    """What a name in a spec stands for: the stage, its options, an example, and which of them must be given."""

    make: Any
    options: Mapping[str, Option]
    needs: tuple[str, ...] = ()
    example: str = ""


BITS = Whole(1, 8)
ROWS = Choice(("tensor", "sample"))
KINDS: dict[str, Kind] = {
    "raw": Kind(Raw, {}),
    "half": Kind(Half, {}),
    "bf16": Kind(lambda: Half(brain=True), {}),
    "quantize": Kind(
        Quantize,
        {"bits": BITS, "scope": Choice(("tensor", "channel")), "round": Choice(("nearest", "stochastic"))},
        ("bits",),
        "quantize:bits=4",
    ),
    "topk": Kind(TopK, {"ratio": Share(), "scope": ROWS}, ("ratio",), "topk:ratio=0.99"),
    "randtopk": Kind(
        RandTopK,
        {"ratio": Share(), "alpha": Share(), "scope": ROWS},
        ("ratio", "alpha"),
        "randtopk:ratio=0.99,alpha=0.1",
    ),
    "ms": Kind(
        Ms,
        {"ratio": Share(), "bits": BITS, "scope": ROWS, "round": Choice(("nearest", "floor"))},
        ("ratio", "bits"),
        "ms:ratio=0.99,bits=2",
    ),
    "mask": Kind(Mask, {}),
    "lz4": Kind(Lz4, {}),
}  # fmt: skip
"""Every codec by name."""
