"""Every codec keeps one contract; what each does to a tensor is compared with a slow implementation of it."""

import importlib
import json
import math
import struct
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from helpers import unhurried
from hypothesis import example, given, settings
from hypothesis import strategies as st
from slow_codec import keeps, largest, ms, ms_frame, quantize_frame
from torch import Tensor

import zsplit
from zsplit.codec import DTYPES, NAMES, Codec, Context, codec, decode, encode, is_view
from zsplit.codec.bits import empty_codes, pack, pack_whole, unpack, unpack_whole
from zsplit.codec.largest import LONG, Largest
from zsplit.errors import LocalProtocolError, RemoteProtocolError, RunFailedError
from zsplit.spec import bounds, kept, nbytes
from zsplit.wire.messages import TensorMeta

LOSSLESS = ["raw", "lz4"]
NARROW = ["half", "bf16", "half+lz4"]
GRIDS = [
    "quantize:bits=1",
    "quantize:bits=3",
    "quantize:bits=8",
    "quantize:bits=4,scope=channel",
    "quantize:bits=4,round=stochastic",
    "quantize:bits=5+lz4",
]
SPARSE = [
    "topk:ratio=0.7",
    "topk:ratio=0.97",
    "topk:ratio=0.9,scope=sample+half",
    "topk:ratio=0.8+quantize:bits=6+lz4",
    "randtopk:ratio=0.8,alpha=0.3",
    "randtopk:ratio=0.8,alpha=0.3,scope=sample",
    "ms:ratio=0.9,bits=2",
    "ms:ratio=0.9,bits=3,scope=sample",
    "ms:ratio=0.9,bits=2,round=floor",
    "ms:ratio=0,bits=1",
    "ms:ratio=0.99,bits=8+lz4",
]
few = settings(unhurried, max_examples=15)

MASKS = ["mask", "mask+half", "mask+quantize:bits=4+lz4"]
ALL = [*LOSSLESS, *NARROW, *GRIDS, *SPARSE, *MASKS]
COMPARING = [*GRIDS, *SPARSE]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(), (1,), (7,), (4, 3), (5, 3, 4, 2), (0, 3), (2, 0), (3, 1000)]

NAN = "The smashed data or their gradients have values that are infinite or not numbers, which this codec cannot carry"


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Ends:
    """A codec between two ends, each with what it knows of the tensor that this one answers."""

    def __init__(self, spec: str) -> None:
        self.codec = codec(spec)
        self.ours, self.theirs = Context(), Context()

    def answering(self, tensor: Tensor) -> "Ends":
        """Have a tensor of this shape gone the other way before, where the codec needs one."""
        if self.codec.spec.answers:
            first = Ends("topk:ratio=0.5")
            first.send(tensor.abs() if tensor.is_floating_point() else tensor)
            self.ours, self.theirs = first.ours, first.theirs
        return self

    def send(self, tensor: Tensor, seed: int | None = None) -> Tensor:
        self.meta, self.frames = self.codec.encode(tensor, self.ours, seed)
        return self.codec.decode(self.meta, self.frames, self.theirs)[0]


def through(spec: str, tensor: Tensor, seed: int | None = None) -> Tensor:
    """Return what becomes of a tensor."""
    return Ends(spec).answering(random(*tensor.shape, dtype=tensor.dtype)).send(tensor, seed)


def error_bound(ends: Ends, x: Tensor) -> float:
    """Return how far from where it was any value that is not dropped may come back."""
    spec, span = ends.codec.spec, float(x.abs().max())
    step = {"Raw": 0.0, "Half": span * 2**-8}.get(type(spec.values).__name__, 0.0)
    bits = getattr(spec.values, "bits", 0)
    return max(step, (2 * span / (2**bits - 1)) * 1.01 if bits else 0.0) + 1e-6 * span


@pytest.mark.parametrize("spec", ALL)
class TestEveryCodec:
    """The contract."""

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_shape_and_type_come_back_in_the_bytes_that_the_formula_says(
        self, spec: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        x = random(*shape, dtype=dtype)
        ends = Ends(spec).answering(x)
        y = ends.send(x, seed=3)
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        assert (ends.meta.shape, ends.meta.dtype, ends.meta.codec) == (tuple(shape), NAMES[dtype], spec)
        (frame,) = ends.frames
        assert frame.nbytes == ends.meta.nbytes
        least, most = bounds(ends.codec.spec, shape, dtype.itemsize)
        assert least <= frame.nbytes <= most
        if not ends.codec.spec.lz4:
            count = 0 if ends.ours.kept is None else len(ends.ours.kept)
            assert frame.nbytes == nbytes(ends.codec.spec, shape, dtype.itemsize, count)

    def test_values_come_back_near_where_they_were_or_as_zero(self, spec: str) -> None:
        x = random(4, 5, 30)
        ends = Ends(spec).answering(x)
        y = ends.send(x)
        away = (y - x).abs()
        assert bool(((away <= error_bound(ends, x)) | (y == 0)).all())
        assert not ends.codec.spec.lossless or torch.equal(x, y)

    def test_zeros_come_back_as_zeros(self, spec: str) -> None:
        assert torch.equal(through(spec, torch.zeros(3, 50), seed=1), torch.zeros(3, 50))

    @pytest.mark.parametrize("value", [1.0, -2.5, 3e38, -3e38, 1e-40])
    def test_a_constant_comes_back_as_itself_or_zero(self, spec: str, value: float) -> None:
        x = torch.full((3, 50), value)
        ends = Ends(spec).answering(random(3, 50))
        y = ends.send(x)
        narrow = 65504.0 if "half" in spec else 3.3895e38
        wanted = max(-narrow, min(value, narrow))
        steps = 2 ** getattr(ends.codec.spec.values, "bits", 7) - 1 if "ms" in spec else 100
        near = (y / 2 - wanted / 2).abs() <= abs(wanted) / steps / 2 * 1.01 + 1e-38
        assert bool((near | (y == 0)).all())

    def test_huge_values_of_both_signs_stay_finite(self, spec: str) -> None:
        x = random(3, 50).sign() * 3.4e38
        assert bool(through(spec, x, seed=1).isfinite().all())
        x = random(3, 50).sign().to(torch.float16) * 65504
        assert bool(through(spec, x, seed=1).isfinite().all())

    def test_memory_in_another_order_makes_no_difference(self, spec: str) -> None:
        x = random(6, 5, 4).permute(2, 0, 1)
        assert not x.is_contiguous()
        assert torch.equal(through(spec, x, seed=2), through(spec, x.contiguous(), seed=2))
        assert torch.equal(through(spec, random(8, 10)[::2, 1::2]), through(spec, random(8, 10)[::2, 1::2].clone()))

    def test_the_same_bytes_are_made_each_time(self, spec: str) -> None:
        x = random(3, 400)
        frames = []
        for _ in range(2):
            ends = Ends(spec).answering(x)
            ends.send(x, seed=5)
            frames.append(bytes(ends.frames[0]))
        assert frames[0] == frames[1]

    def test_the_tensor_is_left_as_it_is(self, spec: str) -> None:
        x = random(3, 400).requires_grad_()
        before = x.detach().clone()
        Ends(spec).answering(x.detach()).send(x, seed=5)
        assert torch.equal(x.detach(), before)

    def test_both_ends_know_the_same_places(self, spec: str) -> None:
        x = random(3, 400)
        ends = Ends(spec)
        if not ends.codec.spec.keeps:
            if not ends.codec.spec.answers:
                ends.send(x)
            assert ends.ours.kept is ends.theirs.kept is None
            return
        y = ends.send(x, seed=5)
        assert ends.ours.kept is not None
        assert ends.theirs.kept is not None
        assert torch.equal(ends.ours.kept, ends.theirs.kept)
        assert len(ends.ours.kept) == kept(ends.codec.spec, x.shape)
        assert bool((ends.ours.kept.diff() > 0).all())
        if "quantize" not in spec and "half" not in spec:
            assert torch.equal(y.view(-1)[ends.ours.kept], x.view(-1)[ends.ours.kept])

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_what_is_no_number_is_kept_or_refused(self, spec: str, value: float) -> None:
        for width in (50, LONG):
            x = random(1, width)
            x[0, 3] = value
            if spec in COMPARING:
                with pytest.raises(RunFailedError) as refused:
                    Ends(spec).answering(random(1, width)).send(x)
                assert str(refused.value) == f"{NAN}: lower train.lr, or set train.clip_norm"
            elif math.isnan(value) and spec not in MASKS:
                assert math.isnan(through(spec, x)[0, 3])

    def test_whole_numbers_travel_without_loss_or_not_at_all(self, spec: str) -> None:
        for dtype in (torch.int64, torch.uint8, torch.bool):
            x = (random(3, 50) > 0).to(dtype)
            if spec in LOSSLESS:
                assert torch.equal(through(spec, x), x)
            else:
                with pytest.raises(LocalProtocolError, match="cannot send torch"):
                    codec(spec).encode(x)

    def test_a_frame_of_another_length_is_refused(self, spec: str) -> None:
        x = random(3, 400)
        ends = Ends(spec).answering(x)
        ends.send(x)
        frame = bytearray(ends.frames[0])
        for wrong in (frame[:-1], frame + b"\0", b"", bytearray(10**5)):
            meta = TensorMeta("other", "F32", (3, 400), spec, len(wrong))
            with pytest.raises(RemoteProtocolError):
                ends.codec.decode(meta, [memoryview(bytearray(wrong))], ends.theirs)

    def test_a_header_that_promises_more_than_its_frame_is_refused_before_memory_is_taken(self, spec: str) -> None:
        x = random(3, 400)
        ends = Ends(spec).answering(x)
        ends.send(x)
        for shape in ((2**40,), (3, 2**40), (2**40, 2**40), (-3, 400), (30, 400)):
            meta = TensorMeta("other", "F32", shape, spec, ends.frames[0].nbytes)
            with pytest.raises(RemoteProtocolError):
                ends.codec.decode(meta, ends.frames, ends.theirs)

    @few
    @given(st.data())
    def test_any_bytes_are_a_tensor_or_refused(self, spec: str, data: st.DataObject) -> None:
        shape = data.draw(st.sampled_from([(1,), (4, 3), (3, 40), (2, 3, 5)]))
        x = random(*shape)
        ends = Ends(spec).answering(x)
        ends.send(x)
        size = ends.frames[0].nbytes
        frame = bytearray(data.draw(st.binary(min_size=size, max_size=size)))
        try:
            y = ends.codec.decode(ends.meta, [memoryview(frame)], ends.theirs)[0]
        except RemoteProtocolError:
            return
        assert y.shape == x.shape

    @few
    @given(st.integers(0, 60), st.integers(0, 2**32))
    def test_any_length_comes_back(self, spec: str, length: int, seed: int) -> None:
        x = random(length, seed=seed)
        y = through(spec, x, seed=seed)
        assert y.shape == x.shape
        assert torch.equal(through(spec, x, seed=seed), y)


class TestTheRoom:
    def test_it_can_be_called_by_its_name_and_imported_from(self) -> None:
        assert zsplit.codec("half") is codec("half")
        assert isinstance(zsplit.codec("ms:ratio=0.99,bits=2"), Codec)
        room = importlib.import_module("zsplit.codec.ms")
        assert room is sys.modules["zsplit.codec"].ms
        assert zsplit.codec("half").spec.text == "half"

    def test_calling_it_loads_torch_only_then(self) -> None:
        code = "import sys, zsplit; before = 'torch' in sys.modules; c = zsplit.codec('half'); sys.exit(before)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    def test_raw_is_the_tensors_own_memory_at_both_ends(self) -> None:
        x = random(64, 64)
        meta, (frame,) = codec("raw").encode(x)
        assert is_view(x)
        assert not is_view(x.t())
        assert not is_view(x, "half")
        x[0, 0] = 7.0
        assert struct.unpack("f", frame[:4]) == (7.0,)
        y, _ = codec("raw").decode(meta, [frame])
        assert y.data_ptr() == x.data_ptr()

    def test_a_codec_that_does_not_exist_is_a_fault_of_whoever_named_it(self) -> None:
        with pytest.raises(LocalProtocolError, match='"hlaf" is not a codec, the nearest is half'):
            encode("smashed", torch.ones(2), "hlaf")
        with pytest.raises(RemoteProtocolError, match='"hlaf" is not a codec, the nearest is half'):
            decode(TensorMeta("smashed", "F32", (2,), "hlaf", 8), memoryview(bytearray(8)))

    def test_every_dtype_that_travels_has_one_name(self) -> None:
        assert {NAMES[dtype]: dtype for dtype in NAMES} == DTYPES


values = st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5])
rows = st.lists(values, min_size=1, max_size=60)
ratios = st.sampled_from(["0", "0.5", "0.9", "0.97"])


class TestGolden:
    """Bytes and values as a slow implementation has them."""

    @given(rows, ratios, st.integers(1, 8), st.sampled_from(["nearest", "floor"]))
    def test_ms(self, x: list[float], ratio: str, bits: int, rounding: str) -> None:
        ends = Ends(f"ms:ratio={ratio},bits={bits},round={rounding}")
        y = ends.send(torch.tensor(x))
        slow = ms(x, ratio, bits, "floor" if rounding == "floor" else "nearest")
        assert bytes(ends.frames[0]) == ms_frame(x, ratio, bits, "floor" if rounding == "floor" else "nearest")
        assert y.tolist() == slow.decoded
        assert ends.ours.kept is not None
        assert ends.ours.kept.tolist() == slow.kept

    @given(st.lists(rows.map(lambda row: (row * 20)[:20]), min_size=1, max_size=5), ratios, st.integers(1, 8))
    def test_ms_of_each_sample(self, samples: list[list[float]], ratio: str, bits: int) -> None:
        y = through(f"ms:ratio={ratio},bits={bits},scope=sample", torch.tensor(samples))
        assert y.tolist() == [ms(row, ratio, bits).decoded for row in samples]

    @given(rows, st.integers(1, 8))
    @example([-7.258726045202552e-43], 6)
    @example([-7.258726045202552e-43], 8)
    def test_quantize(self, x: list[float], bits: int) -> None:
        ends = Ends(f"quantize:bits={bits}")
        ends.send(torch.tensor(x))
        assert bytes(ends.frames[0]) == quantize_frame(x, bits)

    @given(rows, ratios)
    def test_topk(self, x: list[float], ratio: str) -> None:
        best = set(largest(x, keeps(ratio, len(x))))
        assert through(f"topk:ratio={ratio}", torch.tensor(x)).tolist() == [
            value if i in best else 0.0 for i, value in enumerate(x)
        ]

    def test_ms_of_the_papers_kind_of_values(self) -> None:
        """Non-negative, 2 bits: the mask's levels are 0, s and 2s, and 3 marks what is sent exactly."""
        x = torch.tensor([0.0, 1.0, 2.4, 2.6, 9.0, 0.4, 3.6, 6.0, 0.0, 0.0])
        ends = Ends("ms:ratio=0.8,bits=2")
        assert ends.send(x).tolist() == [0.0, 0.0, 2.0, 2.0, 9.0, 0.0, 4.0, 6.0, 0.0, 0.0]  # s = 6 / 3
        assert Ends("ms:ratio=0.8,bits=2,round=floor").send(x).tolist()[3] == 2.0

    def test_ms_carries_negative_values(self) -> None:
        x = torch.tensor([-9.0, -2.9, -1.0, 0.0, 1.1, 3.0, 6.0, 0.2, 0.1, -0.1])
        y = through("ms:ratio=0.8,bits=3", x)
        assert y[0] == -9.0
        assert y[6] == 6.0
        assert bool(((y - x).abs() <= 8.9 / 7 / 2 + 1e-6).all())


class TestLongTensors:
    """Where a sampled threshold finds the candidates, the result is that of sorting everything."""

    @pytest.mark.parametrize("length", [LONG, LONG + 5, 3 * LONG + 1])
    @pytest.mark.parametrize("kind", ["normal", "ties", "relu", "sorted", "one spike"])
    @pytest.mark.parametrize("share", [0.25, 0.01, 1e-5])
    def test_the_largest_are_exact(self, length: int, kind: str, share: float) -> None:
        x = random(1, length, seed=length)
        x = {
            "normal": x,
            "ties": (x * 3).round(),
            "relu": x.relu(),
            "sorted": x.sort().values,
            "one spike": torch.zeros(1, length),
        }[kind]
        x[0, length // 3] = 50.0
        count = int(share * length)
        found = Largest(x, count)
        expected = x[0].abs().argsort(descending=True, stable=True)[:count].sort().values
        assert torch.equal(found.kept, expected)
        rest = x.clone()
        rest[0, expected] = 0
        assert torch.equal(found.lowest_other(), rest.amin(1).clamp(max=0))

    def test_threads_change_no_bit(self) -> None:
        x = random(LONG * 3 + 11)
        before = torch.get_num_threads()
        try:
            made = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                made.append([bytes(codec(spec).encode(x, seed=1)[1][0]) for spec in COMPARING])
        finally:
            torch.set_num_threads(before)
        assert made[0] == made[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnTheDevice:
    """Where the tensor is on a GPU, so is the work; what is not random gives the same bytes there."""

    @pytest.mark.parametrize("spec", [spec for spec in ALL if "rand" not in spec and "stochastic" not in spec])
    @pytest.mark.parametrize("shape", [(3, 400), (LONG + 5,)], ids=str)
    def test_a_frame_is_that_of_the_cpu_and_comes_back_to_the_device(self, spec: str, shape: tuple[int, ...]) -> None:
        x = random(*shape)
        here, there = Ends(spec).answering(x), Ends(spec).answering(x)
        y = here.send(x)
        meta, frames = there.codec.encode(x.cuda(), there.ours)
        assert bytes(frames[0]) == bytes(here.frames[0])
        back, _ = there.codec.decode(meta, frames, there.theirs, torch.device("cuda"))
        assert torch.equal(back.cpu(), y)
        assert back.is_cuda or there.codec.spec.text == "raw"


class TestBits:
    @given(st.integers(1, 8).flatmap(lambda b: st.tuples(st.just(b), st.lists(st.integers(0, 2**b - 1), max_size=40))))
    def test_codes_come_back_from_as_many_bits(self, drawn: tuple[int, list[int]]) -> None:
        bits, numbers = drawn
        codes = empty_codes(len(numbers), torch.device("cpu"))
        codes[: len(numbers)] = torch.tensor(numbers, dtype=torch.uint8)
        data = torch.cat(pack(codes, bits))
        assert len(data) == -(-len(numbers) // 8) * bits
        assert unpack(data, len(numbers), bits).tolist() == numbers

    @given(st.integers(1, 40).flatmap(lambda b: st.tuples(st.just(b), st.lists(st.integers(0, 2**b - 1), max_size=20))))
    def test_whole_numbers_come_back(self, drawn: tuple[int, list[int]]) -> None:
        bits, numbers = drawn
        data = pack_whole(torch.tensor(numbers, dtype=torch.int64), bits)
        assert unpack_whole(data, len(numbers), bits).tolist() == numbers


class TestRandomness:
    """What is random is a function of the seed, and there is none without one."""

    @pytest.mark.parametrize("spec", ["randtopk:ratio=0.9,alpha=0.3", "quantize:bits=2,round=stochastic"])
    def test_another_seed_is_another_draw_and_none_is_the_plain_codec(self, spec: str) -> None:
        x = random(10, 100)
        assert torch.equal(through(spec, x, seed=1), through(spec, x, seed=1))
        assert not torch.equal(through(spec, x, seed=1), through(spec, x, seed=2))
        plain = {"r": "topk:ratio=0.9", "q": "quantize:bits=2"}[spec[0]]
        assert torch.equal(through(spec, x), through(plain, x))

    def test_randtopk_keeps_others_with_probability_alpha_and_as_many_of_each_sample(self) -> None:
        x = random(40, 500)
        best = set(largest(x.view(-1).tolist(), 2000))
        ends = Ends("randtopk:ratio=0.9,alpha=0.2")
        ends.send(x, seed=4)
        assert ends.ours.kept is not None
        others = sum(place not in best for place in ends.ours.kept.tolist())
        assert abs(others / 2000 - 0.2) < 5 * math.sqrt(0.2 * 0.8 / 2000)
        ends = Ends("randtopk:ratio=0.9,alpha=0.2,scope=sample")
        ends.send(x, seed=4)
        assert ends.ours.kept is not None
        assert (ends.ours.kept // 500).bincount().tolist() == [50] * 40

    def test_randtopk_treats_all_of_the_others_alike(self) -> None:
        x = torch.arange(20.0)
        counts = torch.zeros(20)
        for seed in range(600):
            y = Ends("randtopk:ratio=0.9,alpha=0.5")
            y.send(x, seed=seed)
            assert y.ours.kept is not None
            counts[y.ours.kept] += 1
        assert counts.sum() == 1200
        assert abs(float(counts[:18].sum()) / 1200 - 0.5) < 0.08
        assert float(counts[:18].max()) < 2 * float(counts[:18].mean())

    def test_stochastic_rounding_is_right_on_average(self) -> None:
        x = torch.cat([torch.full((20_000,), 0.3), torch.tensor([0.0, 1.0])])
        y = through("quantize:bits=1,round=stochastic", x, seed=9)
        assert abs(float(y[:-2].mean()) - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 20_000)
        assert set(y.tolist()) == {0.0, 1.0}


class TestTheWayBack:
    def test_mask_sends_the_values_at_the_kept_places_and_no_places(self) -> None:
        x, gradient = random(3, 400), random(3, 400, seed=1)
        up = Ends("ms:ratio=0.9,bits=2")
        up.send(x)
        down = codec("mask")
        meta, frames = down.encode(gradient, up.theirs)
        y, _ = down.decode(meta, frames, up.ours)
        assert meta.nbytes == 4 * 120
        assert up.ours.kept is not None
        expected = torch.zeros(1200)
        expected[up.ours.kept] = gradient.view(-1)[up.ours.kept]
        assert torch.equal(y, expected.view(3, 400))

    def test_mask_without_places_says_so(self) -> None:
        with pytest.raises(LocalProtocolError) as refused:
            codec("mask").encode(random(3, 4))
        assert str(refused.value) == '"mask" has no positions for a tensor of [3, 4]: what it answers kept none'
        ends = Ends("mask").answering(random(3, 400))
        ends.send(random(3, 400))
        with pytest.raises(RemoteProtocolError) as came:
            codec("mask").decode(ends.meta, ends.frames, Context())
        assert str(came.value) == '"mask" has no positions for a tensor of [3, 400]: what it answers kept none'
        with pytest.raises(LocalProtocolError, match=r"of \[4, 3\]: what it answers is \[3, 400\]"):
            codec("mask").encode(random(4, 3), ends.ours)


class TestLz4:
    def frame(self, tensor: Tensor, spec: str = "lz4") -> memoryview:
        return codec(spec).encode(tensor)[1][0]

    def test_what_does_not_shrink_is_one_byte_longer(self) -> None:
        noise = torch.randint(0, 2**31, (20_000,), generator=torch.Generator().manual_seed(0))
        x = noise.to(torch.int32).view(torch.float32)
        assert self.frame(x).nbytes == x.nbytes + 1
        assert self.frame(x)[0] == 0

    def test_zeros_shrink_to_almost_nothing(self) -> None:
        assert self.frame(torch.zeros(10**6)).nbytes < 20_000
        assert self.frame(torch.zeros(10**6))[0] in (1, 2)

    def test_floats_of_one_size_are_shuffled(self) -> None:
        x = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) + 1
        frame = self.frame(x)
        assert frame[0] == 2
        assert frame.nbytes < 0.95 * x.nbytes

    @pytest.mark.parametrize("how", [1, 2])
    def test_a_bomb_is_refused_at_the_declared_size(self, how: int) -> None:
        import lz4.block

        bomb = bytearray([how]) + lz4.block.compress(bytes(50_000_000), store_size=False)
        assert len(bomb) < 200_000
        meta = TensorMeta("other", "F32", (100_000,), "lz4", len(bomb))
        with pytest.raises(RemoteProtocolError, match="does not hold 400000 bytes"):
            codec("lz4").decode(meta, [memoryview(bomb)])
        small = bytearray([how]) + lz4.block.compress(bytes(100), store_size=False)
        meta = TensorMeta("other", "F32", (100_000,), "lz4", len(small))
        with pytest.raises(RemoteProtocolError, match="holds 100 bytes in place of 400000"):
            codec("lz4").decode(meta, [memoryview(small)])

    def test_an_unknown_way_to_compress_is_refused(self) -> None:
        with pytest.raises(RemoteProtocolError, match="An lz4 frame of 9 bytes cannot hold 8 bytes"):
            codec("lz4").decode(TensorMeta("other", "F32", (2,), "lz4", 9), [memoryview(bytearray(b"\x07" * 9))])


class TestForgedFrames:
    """Sizes that fit and contents that do not."""

    def refuse(self, spec: str, shape: Sequence[int], frame: bytes, sentence: str) -> None:
        meta = TensorMeta("other", "F32", tuple(shape), spec, len(frame))
        with pytest.raises(RemoteProtocolError, match=sentence):
            codec(spec).decode(meta, [memoryview(bytearray(frame))])

    def test_a_mask_that_marks_too_many(self) -> None:
        frame = struct.pack("<fB", 1.0, 0) + b"\xff" * 4 + bytes(4)
        self.refuse("ms:ratio=0.9,bits=2", [16], frame, "A mask marks 16 values, its frame has 1")

    def test_a_bitmap_that_marks_too_few(self) -> None:
        self.refuse("topk:ratio=0.5", [16], bytes(2 + 32), "A bitmap marks 0 values, its frame has 8")

    def test_positions_twice_or_beyond_the_end(self) -> None:
        sentence = "The positions of a frame are not ascending within 1000"
        twice = bytes(pack_whole(torch.tensor([5, 5, 6, 7, 8, 9, 10, 11, 12, 13]), 10).tolist())
        beyond = bytes(pack_whole(torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 9, 1001]), 10).tolist())
        for places in (twice, beyond):
            self.refuse("topk:ratio=0.99", [1000], places + bytes(40), sentence)

    def test_a_header_of_another_codec_or_type(self) -> None:
        with pytest.raises(RemoteProtocolError, match='cannot decode F32 with the codec "raw"'):
            codec("half").decode(TensorMeta("other", "F32", (2,), "raw", 8), [memoryview(bytearray(8))])
        self_ = TensorMeta("other", "I64", (2,), "half", 4)
        with pytest.raises(RemoteProtocolError, match='cannot decode I64 with the codec "half"'):
            codec("half").decode(self_, [memoryview(bytearray(4))])


def test_a_frame_does_not_depend_on_the_process_that_made_it() -> None:
    code = (
        "import json, torch, zsplit; x = torch.randn(3000, generator=torch.Generator().manual_seed(7));"
        "f = zsplit.codec('randtopk:ratio=0.9,alpha=0.3+quantize:bits=3,round=stochastic').encode(x, seed=5)[1][0];"
        "print(json.dumps(list(f)))"
    )
    runs = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout for _ in range(2)]
    spec = "randtopk:ratio=0.9,alpha=0.3+quantize:bits=3,round=stochastic"
    mine = codec(spec).encode(random(3000, seed=7), seed=5)[1][0]
    assert [json.loads(run) for run in runs] == [list(mine)] * 2
