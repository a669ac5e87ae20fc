"""Measuring a peer: what belongs to which stretch, in how much time, and what happens where memory is not enough.

Time is the model's own: its hooks move a clock, so that every figure is known beforehand.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.helpers import config_of
from tests.nets import Plain, SmallResidual
from zsplit.config import Config
from zsplit.train.half import Workshop
from zsplit.train.profile.chain import loss_of
from zsplit.train.profile.measure import measure, slice_sizes

CPU = torch.device("cpu")
PLAIN = ["flatten", "fc1", "relu1", "fc2", "relu2"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute on one core: nothing here depends on it but the time that the tests take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Time:
    """A clock that stands still until a module is run."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, module: nn.Module, forward: Callable[[int], float], backward: Callable[[int], float]) -> None:
        """Have a module take so many seconds for a slice of so many samples."""

        def run(_: Any, args: tuple[Tensor], __: Any) -> None:
            self.now += forward(len(args[0]))

        def go_back(_: Any, __: Any, gradients: tuple[Tensor]) -> None:
            self.now += backward(len(gradients[0]))

        module.register_forward_hook(run)
        module.register_full_backward_hook(go_back)


def workshop_of(model: nn.Module, shape: tuple[int, ...] = (1, 8, 8), **keys: Any) -> tuple[Workshop, Config]:
    """Return a workshop and its config, for one quick repetition unless told otherwise."""
    config = config_of(**{"train__batch_size": 32, "plan__profile_steps": 1, **keys})
    return Workshop(config, shape, CPU, model), config


def sizes_seen(module: nn.Module) -> list[int]:
    """Return a list that grows by the samples of each forward pass of a module, or of its copies."""
    seen: list[int] = []
    module.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    return seen


class Ticks:
    """A clock that is read for a second each time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


CODECS = {"codec__up": "ms:ratio=0.75,bits=2", "codec__down": "mask+half"}


def test_bytes_at_each_cut_are_those_of_the_codec_and_packing_is_timed() -> None:
    workshop, config = workshop_of(Plain(), plan__profile_seconds=1e6, **CODECS)
    for role in ("client", "server"):
        profile = measure(workshop, config, role=role, clock=Ticks())  # type: ignore[arg-type]
        widths = [64, 12, 12, 12, 12]
        assert profile.up == tuple((5 + 2 * 32 * d / 8 + 4 * 32 * d / 4) / 32 for d in widths)
        assert profile.down == tuple(2 * d / 4 for d in widths)
        assert profile.encode == profile.decode == (1 / 32,) * 5


def test_what_travels_raw_takes_no_time_to_pack() -> None:
    workshop, config = workshop_of(Plain(), plan__profile_seconds=1e6)
    profile = measure(workshop, config, clock=Ticks())
    assert profile.encode == profile.decode == ()
    assert profile.up == profile.down == (256.0, 48.0, 48.0, 48.0, 48.0)


def out_of_memory(module: nn.Module, from_samples: int, error: Exception) -> None:
    """Let a module fail for slices of so many samples or more."""

    def fail(_: Any, args: tuple[Tensor]) -> None:
        if len(args[0]) >= from_samples:
            raise error

    module.register_forward_pre_hook(fail)


class TestWhatIsMeasured:
    def test_each_stretch_gets_the_time_of_its_own_modules(self) -> None:
        time, model = Time(), Plain()
        workshop, config = workshop_of(model, plan__profile_seconds=1e9)
        time.spend(model.fc1, lambda size: 1 + size, lambda size: 2 * size)
        time.spend(model.fc3, lambda size: 5 * size, lambda size: 3)
        found = measure(workshop, config, clock=time)
        assert found.cuts == tuple(PLAIN)
        assert found.sizes == (1, 2, 4, 8, 16, 32)
        forwards, backwards = ([getattr(s, way) for s in found.stretches] for way in ("forward", "backward"))
        nothing = (0.0,) * 6
        assert forwards == [nothing, (2, 3, 5, 9, 17, 33), nothing, nothing, nothing, (5, 10, 20, 40, 80, 160)]
        assert backwards == [nothing, (2, 4, 8, 16, 32, 64), nothing, nothing, nothing, (3,) * 6]

    def test_a_single_slow_repetition_does_not_count(self) -> None:
        time, model, calls = Time(), Plain(), []

        def forward(size: int) -> float:
            calls.append(size)
            return 1000.0 if len(calls) % 11 == 0 else 1.0

        workshop, config = workshop_of(model, plan__profile_steps=5, plan__profile_seconds=1e9)
        time.spend(model.fc2, forward, lambda _: 1.0)
        assert measure(workshop, config, clock=time).stretches[3].forward == (1.0,) * 6

    def test_the_first_slice_of_a_mini_batch_counts_as_what_it_is_one_of_several(self) -> None:
        time, model = Time(), Plain()
        workshop, config = workshop_of(model, train__batch_size=8, plan__profile_seconds=1e9)
        cold = [True]
        # The first fc3 in a row is cold; a backward pass ends the row.
        time.spend(model.fc3, lambda _: 9.0 if cold and cold.pop() else 1.0, lambda _: 0.0)
        model.fc1.register_full_backward_hook(lambda *_: cold.clear() or cold.append(True))  # type: ignore[func-returns-value]
        found = measure(workshop, config, clock=time)
        assert found.sizes == (1, 2, 4, 8)
        assert found.stretches[-1].forward == (2.0, 3.0, 5.0, 9.0)

    def test_bytes_are_those_at_the_cuts(self) -> None:
        workshop, config = workshop_of(SmallResidual())
        found = measure(workshop, config)
        expected = tuple(cut.bytes_per_sample for cut in workshop.traced.cuts)
        assert (found.up, found.down) == (expected, expected)

    def test_weights_are_parameters_and_buffers_each_once(self) -> None:
        model = SmallResidual()
        workshop, config = workshop_of(model)
        weights = [s.weights for s in measure(workshop, config).stretches]
        assert sum(weights) == sum(tensor.nbytes for tensor in model.state_dict().values())

    def test_what_waits_for_the_backward_pass_is_counted_once_and_without_weights(self) -> None:
        workshop, config = workshop_of(Plain())
        saved = [s.saved for s in measure(workshop, config).stretches]
        # fc1 keeps its input, each ReLU its output, which the next layer takes.
        assert saved[:5] == [0, 64 * 4, 12 * 4, 0, 12 * 4]
        assert 10 * 4 <= saved[5] <= 10 * 4 + 16

    def test_the_optimizers_step_belongs_to_the_stretches_with_parameters(self) -> None:
        time = Time()

        def stepped(*_: object) -> None:
            time.now += 0.5

        workshop, config = workshop_of(Plain(), train__optimizer="adam")
        handle = register_optimizer_step_post_hook(stepped)
        try:
            steps = [stretch.step for stretch in measure(workshop, config, clock=time).stretches]
        finally:
            handle.remove()
        assert steps == [0, 0.5, 0, 0.5, 0, 0.5]

    def test_loading_a_mini_batch_is_timed(self) -> None:
        time = Time()

        def load() -> None:
            time.now += 0.125

        workshop, config = workshop_of(Plain())
        assert measure(workshop, config, load, clock=time).batch_seconds == 0.125
        assert measure(workshop, config, clock=time).batch_seconds == 0

    def test_a_message_takes_some_time(self) -> None:
        workshop, config = workshop_of(Plain())
        assert 0 < measure(workshop, config).message_seconds < 1

    @pytest.mark.parametrize(("model", "has"), [(Plain, False), (SmallResidual, True)])
    def test_batch_norm_is_noticed(self, model: type[nn.Module], has: bool) -> None:
        assert measure(*workshop_of(model())).batch_norm is has

    def test_the_loss_of_logits_is_cross_entropy_and_of_anything_else_the_sum(self) -> None:
        assert loss_of(torch.zeros(4, 10)) == pytest.approx(2.302585)
        assert loss_of(torch.ones(4, 3, 2, 2)) == 48

    def test_a_model_whose_output_is_no_logits_can_be_measured(self) -> None:
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Conv2d(2, 2, 3))
        assert len(measure(*workshop_of(model)).stretches) == 3


class TestLeavesEverythingAsItWas:
    def test_weights_buffers_modes_and_random_generators(self) -> None:
        model = SmallResidual().eval()
        workshop, config = workshop_of(model)
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        generator = torch.get_rng_state()
        measure(workshop, config)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), generator)
        assert not model.training
        assert all(parameter.grad is None for parameter in model.parameters())


class TestSizes:
    @pytest.mark.parametrize(
        ("keys", "sizes"),
        [
            ({"train__batch_size": 100}, [3, 6, 12, 25, 50, 100]),
            ({"train__batch_size": 100, "train__micro_batches": 7}, [3, 6, 12, 14, 15, 25, 50, 100]),
            ({"train__batch_size": 100, "train__micro_batches": "auto"}, [3, 6, 12, 25, 50, 100]),
            ({"train__batch_size": 5}, [1, 2, 5]),
            ({"train__batch_size": 1}, [1]),
        ],
    )
    def test_they_are_those_that_the_mini_batch_gives(self, keys: dict[str, object], sizes: list[int]) -> None:
        assert slice_sizes(config_of(**keys), batch_norm=False) == sizes

    def test_batch_norm_needs_two_samples(self) -> None:
        assert slice_sizes(config_of(train__batch_size=5), batch_norm=True) == [2, 5]


class TestTime:
    def test_with_time_enough_every_size_is_repeated_as_often_as_asked(self) -> None:
        model = Plain()
        workshop, config = workshop_of(model, plan__profile_steps=3)
        seen = sizes_seen(model.fc1)
        measure(workshop, config, clock=Time())
        # 32 is warm after the first try, the others after one run more; up to three slices run in a row.
        assert {size: seen.count(size) for size in seen} == {
            32: 1 + 3,
            16: 2 * 4,
            8: 3 * 4,
            4: 3 * 4,
            2: 3 * 4,
            1: 3 * 4,
        }
        assert seen[-6:] == [8, 8, 8, 16, 16, 32]

    def test_without_time_largest_and_smallest_are_measured_once_and_warm(self) -> None:
        time, model = Time(), Plain()
        workshop, config = workshop_of(model, plan__profile_seconds=1.0)
        time.spend(model.fc1, lambda size: float(size), lambda _: 0.0)
        seen = sizes_seen(model.fc1)
        found = measure(workshop, config, clock=time)
        assert found.sizes == (1, 32)
        assert seen == [32, 1, 1, 1, 1, 1, 1, 32]

    def test_repetitions_are_given_up_before_sizes(self) -> None:
        time, model = Time(), Plain()
        workshop, config = workshop_of(model, plan__profile_seconds=250.0, plan__profile_steps=50)
        time.spend(model.fc1, lambda size: float(size), lambda _: 0.0)
        found = measure(workshop, config, clock=time)
        assert found.sizes == (1, 2, 4, 8, 16, 32)
        assert time.now <= 250

    def test_the_sizes_that_the_config_asks_for_are_the_last_to_go(self) -> None:
        time, model = Time(), Plain()
        workshop, config = workshop_of(model, plan__profile_seconds=140.0, train__micro_batches=2)
        time.spend(model.fc1, lambda size: float(size), lambda _: 0.0)
        assert measure(workshop, config, clock=time).sizes == (1, 16, 32)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    MemoryError(),
]


class TestMemory:
    @pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["CUDA", "CPU", "Python"])
    def test_a_client_excludes_the_cuts_whose_front_does_not_fit(self, error: Exception) -> None:
        model = Plain()
        workshop, config = workshop_of(model)
        out_of_memory(model.fc2, 32, error)
        found = measure(workshop, config)
        assert found.note == "Out of memory: 'relu1' is the last cut whose front fits, later cuts are excluded."
        assert (len(found.stretches), len(found.cuts), found.sizes) == (3, 5, (1, 2, 4, 8, 16, 32))
        assert len(found.up) == len(found.down) == 5

    def test_the_backward_pass_has_to_fit_too(self) -> None:
        model = Plain()
        workshop, config = workshop_of(model)

        def fail(_: Any, gradients: tuple[Tensor]) -> None:
            if len(gradients[0]) == 32:
                raise RuntimeError("can't allocate memory")

        model.relu1.register_full_backward_pre_hook(fail)
        found = measure(workshop, config)
        assert found.note == "Out of memory: 'fc1' is the last cut whose front fits, later cuts are excluded."

    def test_a_front_that_fits_only_in_slices_can_be_used_in_slices(self) -> None:
        model = Plain()
        workshop, config = workshop_of(model)
        out_of_memory(model.flatten, 16, OUT_OF_MEMORY[0])
        found = measure(workshop, config)
        assert found.note == "Out of memory: slices of more than 8 samples do not fit."
        assert (len(found.stretches), found.sizes) == (6, (1, 2, 4, 8))

    def test_a_server_takes_the_slices_that_fit(self) -> None:
        model = Plain()
        workshop, config = workshop_of(model)
        out_of_memory(model.fc2, 16, OUT_OF_MEMORY[0])
        found = measure(workshop, config, role="server")
        assert found.note == "Out of memory: slices of more than 8 samples do not fit."
        assert (len(found.stretches), found.sizes) == (6, (1, 2, 4, 8))

    @pytest.mark.parametrize(("role", "stretches"), [("client", 3), ("server", 6)])
    def test_only_a_client_needs_room_for_several_slices_at_once(
        self, role: Literal["client", "server"], stretches: int
    ) -> None:
        model, flying = Plain(), [0]
        workshop, config = workshop_of(model)

        def take_off(*_: object) -> None:
            if flying[0] > 0:
                raise OUT_OF_MEMORY[0]
            flying[0] += 1

        def land(*_: object) -> None:
            flying[0] = 0

        model.fc2.register_forward_pre_hook(take_off)
        model.fc1.register_full_backward_hook(land)
        found = measure(workshop, config, role=role)
        assert (len(found.stretches), found.sizes) == (stretches, (1, 2, 4, 8, 16, 32))

    def test_where_nothing_fits_no_cut_is_left(self) -> None:
        model = Plain()
        workshop, config = workshop_of(model)
        out_of_memory(model.flatten, 1, OUT_OF_MEMORY[0])
        for found in (measure(workshop, config, role="client"), measure(workshop, config, role="server")):
            assert found.note == "Out of memory before the first cut: no cut is left."
            assert found.stretches == ()

    def test_any_other_error_is_raised(self) -> None:
        model = Plain()
        workshop, config = workshop_of(model)
        out_of_memory(model.fc2, 32, RuntimeError("shapes do not match"))
        with pytest.raises(RuntimeError, match="shapes do not match"):
            measure(workshop, config)

    def test_a_real_limit_is_noticed(self) -> None:
        found = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=True)
        assert found.stdout == "Out of memory: '1' is the last cut whose front fits, later cuts are excluded.\n2\n"


LIMITED = """
import resource
from pathlib import Path
import torch
from torch import nn
from zsplit.config import load_config
from zsplit.train.half import Workshop
from zsplit.train.profile import measure

torch.set_num_threads(1)
config = load_config(None, {"train.batch_size": 64})
# At 64 samples the first two outputs are 16 MiB each, the next two 4 GiB.
model = nn.Sequential(nn.Conv2d(1, 64, 1), nn.ReLU(), nn.Conv2d(64, 16384, 1), nn.ReLU(), nn.Conv2d(16384, 1, 1))
workshop = Workshop(config, (1, 32, 32), torch.device("cpu"), model)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**31,) * 2)
found = measure(workshop, config)
print(found.note)
print(len(found.stretches))
"""
