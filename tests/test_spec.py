"""What a codec may be called, and how many bytes it takes: read and counted without torch."""

import subprocess
import sys
from decimal import Decimal
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsplit.errors import ConfigError
from zsplit.spec import LONGEST, Half, Ms, Quantize, RandTopK, Raw, TopK, bounds, kept, nbytes, parse
from zsplit.spec.stages import KINDS


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as refused:
        parse(text)
    return str(refused.value)


def test_a_spec_is_stages_with_options() -> None:
    spec = parse("ms:ratio=0.99,bits=2+lz4")
    assert isinstance(spec.values, Ms)
    assert (spec.values.bits, spec.values.scope, spec.values.round, spec.lz4) == (2, "tensor", "nearest", True)
    assert isinstance(parse("randtopk:ratio=.9,alpha=0.1,scope=sample").select, RandTopK)
    assert parse("topk:ratio=0.9+quantize:bits=4").values == Quantize(4)
    assert parse("mask+bf16+lz4").values == Half(brain=True)
    assert parse("mask+bf16+lz4").answers
    assert parse("lz4").values == Raw()


@pytest.mark.parametrize(("text", "lossless"), [("raw", True), ("lz4", True), ("half", False), ("topk:ratio=0", False)])
def test_a_spec_says_whether_it_loses_anything(text: str, lossless: bool) -> None:
    assert parse(text).lossless == lossless


@pytest.mark.parametrize("text", ["topk:ratio=.5", "randtopk:ratio=.5,alpha=.1+half", "ms:ratio=.5,bits=1+lz4"])
def test_what_selects_leaves_places_for_the_way_back(text: str) -> None:
    assert parse(text).keeps
    assert not parse("quantize:bits=2+lz4").keeps


@pytest.mark.parametrize(
    ("text", "at", "why"),
    [
        ("lz5", 1, '"lz5" is not a codec, the nearest is lz4'),
        ("", 1, '"" is not a codec, there are raw, half, bf16, quantize, topk, randtopk, ms, mask, lz4'),
        ("ms:ratio=0.99,bits=2+lz5", 22, '"lz5" is not a codec, the nearest is lz4'),
        ("ms:ratio=0.99,bitz=2", 15, '"bitz" is not an option of ms, it has ratio, bits, scope, round'),
        ("raw:bits=2", 5, '"bits" is not an option of raw, it has none'),
        ("ms:ratio=0.99", 14, "ms needs bits, such as ms:ratio=0.99,bits=2"),
        ("topk", 5, "topk needs ratio, such as topk:ratio=0.99"),
        ("ms:ratio=1,bits=2", 10, 'ratio must be a number from 0 to below 1, not "1"'),
        ("topk:ratio=1/3", 12, 'ratio must be a number from 0 to below 1, not "1/3"'),
        ("quantize:bits=9", 15, 'bits must be a whole number from 1 to 8, not "9"'),
        ("quantize:bits=0", 15, 'bits must be a whole number from 1 to 8, not "0"'),
        ("quantize:bits=", 15, "bits must be a whole number from 1 to 8, and nothing is there"),
        ("quantize:bits", 14, "bits must be a whole number from 1 to 8, and nothing is there"),
        ("quantize:bits=2,bits=3", 17, "bits is set twice"),
        ("topk:ratio=.9,scope=channel", 21, 'scope must be tensor or sample, not "channel"'),
        (
            "topk:ratio=.9+ms:ratio=.9,bits=2",
            15,
            "it needs the whole tensor, and what stands before it leaves single values",
        ),
        (
            "lz4+half",
            5,
            "the order is one of topk, randtopk and mask, then one of raw, half, bf16, quantize and ms, then lz4, "
            "each at most once",
        ),
    ],
)
def test_what_is_wrong_is_pointed_at(text: str, at: int, why: str) -> None:
    assert refusal(text) == f'The codec "{text}" is wrong at character {at}: {why}.'


def test_a_spec_that_would_not_fit_a_header_is_refused() -> None:
    text = "quantize:bits=" + "0" * LONGEST
    assert refusal(text) == f"The codec has {len(text)} characters: the longest codec that can be named has {LONGEST}."


@given(st.text(st.sampled_from("mstopkraw:=,+.0189bitzl4 é")) | st.sampled_from(sorted(KINDS)))
def test_any_text_is_a_spec_or_refused_with_a_sentence(text: str) -> None:
    try:
        spec = parse(text)
    except ConfigError:
        assert refusal(text).endswith(".")
    else:
        assert spec.text == text


@given(st.integers(0, 10**9), st.integers(0, 10**6 - 1))
def test_ratios_are_decimal(d: int, millionths: int) -> None:
    ratio = f"0.{millionths:06d}"
    assert kept(parse(f"topk:ratio={ratio}"), (d,)) == int((1 - Decimal(ratio)) * d)


def test_a_ratio_that_binary_numbers_miss_keeps_what_it_says() -> None:
    assert int((1 - 0.9) * 10) == 0  # what floats make of it
    assert kept(parse("topk:ratio=0.9"), (10,)) == 1


def test_the_bytes_of_ms_are_those_of_the_paper() -> None:
    d = 64 * 64 * 16 * 16
    bits = 8 * nbytes(parse("ms:ratio=0.99,bits=2"), (64, 64, 16, 16), 4) / d
    assert 2.32 <= bits < 2.3205
    assert round(32 / bits, 2) == 13.79
    assert round(32 * d / 8 / nbytes(parse("quantize:bits=3"), (d,), 4), 2) == 10.67


@pytest.mark.parametrize(
    ("text", "shape", "size"),
    [
        ("raw", (3, 5), 60),
        ("half", (3, 5), 30),
        ("quantize:bits=3", (3, 5), 5 + 6),
        ("quantize:bits=3,scope=channel", (2, 4, 5), 4 * 5 + 15),
        ("topk:ratio=0.9", (10, 100), 125 + 400),  # 100 positions of 10 bits are as many: the bitmap is taken
        ("topk:ratio=0.99", (10, 100), 13 + 40),
        ("topk:ratio=0.99,scope=sample", (10, 100), 9 + 40),
        ("topk:ratio=0.99+half", (10, 100), 13 + 20),
        ("ms:ratio=0.9,bits=2", (10, 100), 5 + 250 + 400),
        ("ms:ratio=0.9,bits=2,scope=sample", (10, 100), 50 + 250 + 400),
        ("ms:ratio=0.9,bits=2", (0, 100), 0),
    ],
)
def test_bytes_are_a_formula_of_spec_and_shape(text: str, shape: tuple[int, ...], size: int) -> None:
    assert nbytes(parse(text), shape, 4) == size
    assert bounds(parse(text), shape, 4) == (size, size)


def test_what_lz4_and_mask_take_is_bounded() -> None:
    assert bounds(parse("lz4"), (10,), 4) == (1, 41)
    assert bounds(parse("lz4"), (0,), 4) == (0, 0)
    assert bounds(parse("mask"), (10,), 4) == (0, 40)
    assert nbytes(parse("mask+quantize:bits=4"), (10,), 4, count=3) == 5 + 4


@given(st.lists(st.integers(0, 50), max_size=4).map(tuple), st.sampled_from([2, 4, 8]), st.integers(1, 8))
def test_no_codec_takes_much_more_than_raw_and_each_code_has_its_bits(
    shape: tuple[int, ...], itemsize: int, bits: int
) -> None:
    size = nbytes(parse(f"quantize:bits={bits}"), shape, itemsize)
    d = prod(shape)
    assert 0 <= size <= d + 16 + 9
    assert size * 8 >= d * bits


def test_reading_specs_loads_no_torch() -> None:
    code = "import sys, zsplit.spec; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_top_k_has_its_places_in_whichever_way_is_shorter() -> None:
    for ratio in ("0.5", "0.9", "0.95", "0.99", "0.999"):
        spec = parse(f"topk:ratio={ratio}")
        assert isinstance(spec.select, TopK)
        k = kept(spec, (4096,))
        assert nbytes(spec, (4096,), 4) == min(512, -(-k * 12 // 8)) + 4 * k
