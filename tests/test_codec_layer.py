"""A codec as a layer: the bits of the codec itself, and graphs of it that take batches of any size."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import unhurried
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.export import Dim

from zsplit.codec import codec
from zsplit.codec.layer import CodecLayer
from zsplit.errors import ConfigError
from zsplit.spec import kept, parse

SPECS = [
    "raw+lz4",
    "half",
    "bf16+lz4",
    "quantize:bits=3",
    "quantize:bits=4,scope=channel,round=stochastic",
    "topk:ratio=0.8",
    "topk:ratio=0.7,scope=sample+half",
    "topk:ratio=0.6+quantize:bits=4",
    "randtopk:ratio=0.8,alpha=0.3",
    "ms:ratio=0.9,bits=2",
    "ms:ratio=0.9,bits=3,scope=sample",
    "ms:ratio=0.8,bits=2,round=floor",
    "ms:ratio=0.999,bits=1",
    "ms:ratio=0,bits=4",
]

LARGEST = [spec for spec in SPECS if "ratio" in spec]

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

Model = Callable[[Tensor], Tensor]


def through(spec: str, x: Tensor) -> Tensor:
    """Return what comes out of the codec at the other end, where nothing is random."""
    one = codec(spec)
    meta, frames = one.encode(x)
    return one.decode(meta, frames)[0]


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spec", SPECS)
@settings(unhurried, max_examples=25)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.0, 1e-30, 1.0, 1e5]),
    positive=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_layer_gives_the_bits_of_the_codec(
    spec: str, shape: list[int], dtype: torch.dtype, scale: float, positive: bool, seed: int
) -> None:
    x = (sample(*shape, seed=seed) * scale).to(dtype)
    x = x.nan_to_num().relu() if positive else x.nan_to_num()
    found, expected = CodecLayer(spec)(x), through(spec, x)
    assert (found.dtype, found.shape) == (dtype, x.shape)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("spec", LARGEST)
@settings(unhurried, max_examples=25)
@given(values=st.lists(st.integers(-2, 2), min_size=1, max_size=40), rows=st.integers(1, 3))
def test_of_equal_values_the_layer_keeps_those_that_the_codec_keeps(spec: str, values: list[int], rows: int) -> None:
    x = torch.tensor(values, dtype=torch.float32).repeat(rows, 1)
    assert torch.equal(CodecLayer(spec)(x), through(spec, x))


@pytest.mark.parametrize("spec", ["topk:ratio=0.99", "ms:ratio=0.99,bits=2"])
def test_a_tensor_that_the_codec_searches_by_a_sample_comes_out_the_same(spec: str) -> None:
    x = sample(4, 64, 32, 40)
    assert kept(parse(spec), x.shape) == 3276
    assert torch.equal(CodecLayer(spec)(x), through(spec, x))


@pytest.mark.parametrize("spec", ["topk:ratio=0.99", "ms:ratio=0.99,bits=2"])
def test_a_batch_too_small_for_one_value_keeps_none(spec: str) -> None:
    x = sample(1, 99)
    assert kept(parse(spec), x.shape) == 0
    assert torch.equal(CodecLayer(spec)(x), through(spec, x))


def test_mask_is_no_layer() -> None:
    with pytest.raises(ConfigError) as error:
        CodecLayer("mask+half")
    assert str(error.value) == (
        'The codec "mask+half" cannot be a layer, since mask needs the tensor that this one answers: '
        "take the codec of the smashed data."
    )


# Graphs


def exported(layer: CodecLayer, _: Path) -> Model:
    file = BytesIO()
    torch.export.save(torch.export.export(layer, (sample(2, 3, 5),), dynamic_shapes=({0: Dim("batch")},)), file)
    file.seek(0)
    model: Model = torch.export.load(file).module()
    return model


def scripted(layer: CodecLayer, _: Path) -> Model:
    file = BytesIO()
    torch.jit.save(torch.jit.trace(layer, sample(2, 3, 5)), file)  # type: ignore[no-untyped-call]
    file.seek(0)
    model: Model = torch.jit.load(file)  # type: ignore[no-untyped-call]
    return model


def in_onnx(layer: CodecLayer, folder: Path) -> Model:
    onnx = pytest.importorskip("onnx", reason="zsplit[onnx] is not installed")
    pytest.importorskip("onnxscript", reason="zsplit[onnx] is not installed")
    from onnx.reference import ReferenceEvaluator

    program = torch.export.export(layer, (sample(2, 3, 5),), dynamic_shapes=({0: Dim("batch")},))
    torch.onnx.export(program, (), folder / "it.onnx", input_names=["x"], external_data=False, verbose=False)
    evaluator = ReferenceEvaluator(onnx.load(folder / "it.onnx"))
    return lambda x: torch.tensor(np.asarray(evaluator.run(None, {"x": x.numpy()})[0]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [exported, scripted, in_onnx])
@pytest.mark.parametrize("spec", SPECS)
def test_a_graph_of_the_layer_gives_the_same_bits_for_any_batch(
    spec: str, kind: Callable[[CodecLayer, Path], Model], tmp_path: Path
) -> None:
    layer = CodecLayer(spec).eval()
    graph = kind(layer, tmp_path)
    for batch in (1, 2, 7):  # of 15 elements nothing is kept at a ratio of 0.999, and 1, 3 and 10 at 0.9
        x = sample(batch, 3, 5, seed=batch)
        assert torch.equal(graph(x), through(spec, x))
