"""Where a workshop cuts, what it refuses, and how a half ends a mini-batch."""

import pytest
import torch
from helpers import config_of
from nets import Normed, SmallResidual, images

from zsplit.errors import PlanError
from zsplit.train.half import Half, Workshop

CPU = torch.device("cpu")


def workshop(**keys: object) -> Workshop:
    """Return a workshop for a model of our own: cuts `stem`, `block.add`, `block.relu_1`, `pool`, `flatten`, `drop`."""
    return Workshop(config_of(data__name="own", **keys), (1, 8, 8), CPU, SmallResidual())


def refusal(**keys: object) -> str:
    with pytest.raises(PlanError) as caught:
        workshop(**keys)
    return str(caught.value)


@pytest.mark.parametrize("cut", ["", "auto"])
def test_without_a_cut_of_its_own_a_model_is_cut_in_the_middle(cut: str) -> None:
    cuts = workshop(model__cut=cut).traced.cuts
    assert workshop(model__cut=cut).cut == cuts[len(cuts) // 2].name


@pytest.mark.parametrize("cut", ["", "auto"])
def test_a_model_of_the_zoo_is_cut_where_it_usually_is(cut: str) -> None:
    assert Workshop(config_of(model__cut=cut), (1, 8, 8), CPU, None).cut == "pool"


def test_the_config_s_cut_is_taken_by_name_and_by_index() -> None:
    cuts = workshop().traced.cuts
    assert workshop(model__cut="flatten").cut == "flatten"
    assert workshop(model__cut=1).cut == cuts[1].name


def test_cuts_by_kind_are_taken_and_told_by_the_name_of_the_place() -> None:
    mine = workshop(model__cut="child:3", plan__min_cut="child:1")
    assert (mine.cut, mine.earliest) == ("flatten", "block.relu_1")
    assert workshop().earliest == ""
    assert Workshop(config_of(data__name="own"), (1, 8, 8), CPU, SmallResidual(), named="child:0").cut == "stem"
    usual = Workshop(config_of(model__name="pipelearn/vgg5", model__cut="pipelearn:3"), (1, 8, 8), CPU, None)
    assert usual.cut == "block3.relu"


def test_where_the_planner_chooses_the_cut_is_moved_behind_the_earliest() -> None:
    assert workshop(model__cut="auto", plan__min_cut="flatten").cut == "flatten"
    assert workshop(model__cut="auto", plan__min_cut=0).cut == workshop().cut


def test_a_fixed_cut_before_the_earliest_is_refused() -> None:
    remedy = "set model.cut to that place, to a later one, or to 'auto'."
    assert refusal(model__cut="stem", plan__min_cut="block.add") == (
        f"The model is cut at 'stem' (0), before plan.min_cut = 'block.add' (1): {remedy}"
    )
    assert refusal(plan__min_cut="flatten").endswith(f", before plan.min_cut = 'flatten' (4): {remedy}")
    assert workshop(model__cut="block.add", plan__min_cut="block.add").cut == "block.add"


def test_an_earliest_cut_that_does_not_exist_is_refused() -> None:
    assert refusal(plan__min_cut="flat").startswith("plan.min_cut names no cut: There is no 'flat' in SmallResidual")


def test_a_plan_with_a_cut_that_the_model_does_not_have_is_refused() -> None:
    mine = workshop()
    for use in (mine.check_cut, mine.front, mine.back):
        with pytest.raises(PlanError) as caught:
            use("flat")
        assert str(caught.value) == (
            "There is no 'flat' in SmallResidual: the nearest cuts are 'flatten' (4), and `zsplit cuts` lists all "
            "(the plan names it: plan anew, and give all peers the same model)."
        )


def test_a_plan_with_a_cut_before_the_earliest_is_refused() -> None:
    mine = workshop(model__cut="auto", plan__min_cut="block.add")
    mine.check_cut("flatten")
    with pytest.raises(PlanError) as caught:
        mine.front("stem")
    assert str(caught.value) == "The plan cuts at 'stem' (0), before plan.min_cut = 'block.add' (1): plan anew."


@pytest.mark.parametrize(("mode", "slices", "moves"), [("deferred", 3, 1), ("micro", 3, 3), ("micro", 1, 1)])
def test_running_statistics_move_as_the_config_says_when_a_half_steps(mode: str, slices: int, moves: int) -> None:
    half = Half(Normed(), config_of(train__batch_norm=mode), 0.1, CPU)
    half.begin_step(slices)
    for x in images(12)[0].tensor_split(slices):
        half.part(x).sum().backward()
    half.step()
    assert half.part.get_buffer("bn2.num_batches_tracked") == moves
