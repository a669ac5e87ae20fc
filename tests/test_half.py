"""Where a workshop cuts, what it refuses, and how a half ends a mini-batch."""

import pytest
import torch
from helpers import config_of
from nets import Normed, SmallResidual, images

from zsplit.errors import ConfigError, PlanError
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


def test_a_pattern_that_excludes_nothing_from_the_average_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        workshop(aggregate__exclude=["stem.*", "*bn9*"])
    names = list(SmallResidual().state_dict())
    assert str(caught.value) == (
        f'aggregate.exclude has "*bn9*", which is none of the model\'s names ({names[0]}, …, {names[-1]}): mend it, '
        "or leave it out."
    )
    assert workshop(aggregate__exclude=["stem.*"]).cut


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


# The tail


def test_the_tail_begins_at_the_last_cut_unless_the_config_says_otherwise() -> None:
    kept = {"train__labels": "keep"}
    assert workshop(model__cut="stem").tail == ""
    assert workshop(model__cut="stem", **kept).tail == "drop"
    assert workshop(model__cut="stem", model__tail="pool", **kept).tail == "pool"
    assert workshop(model__cut="stem", model__tail=2, **kept).tail == workshop().traced.cuts[2].name
    assert workshop(model__cut="drop", model__tail="output", **kept).tail == "output"


def test_a_tail_that_leaves_the_server_nothing_is_refused() -> None:
    for tail in ("stem", "block.add", "input"):
        assert refusal(model__cut="block.add", model__tail=tail, train__labels="keep").endswith(
            " does not come after the cut at 'block.add' (1): move model.cut or model.tail."
        )


def test_a_model_that_is_cut_at_its_last_place_has_none_left_for_the_tail() -> None:
    assert refusal(model__cut="drop", train__labels="keep") == (
        "train.labels = \"keep\" leaves no cut for the tail behind 'drop' (5): cut the model earlier, "
        'or set model.tail = "output" to keep the loss alone.'
    )


@pytest.mark.parametrize(
    ("labels", "tail", "found"), [("keep", "", "has no tail"), ("share", "pool", "has a tail at 'pool'")]
)
def test_a_plan_whose_tail_is_not_what_the_labels_ask_for_is_refused(labels: str, tail: str, found: str) -> None:
    mine = workshop(model__cut="stem", train__labels=labels)
    with pytest.raises(PlanError) as caught:
        mine.front("stem", tail)
    assert str(caught.value) == (
        f'The plan {found}, under train.labels = "{labels}": plan anew, or leave plan.file out.'
    )


@pytest.mark.parametrize("labels", ["server", "keep"])
def test_a_plan_at_the_output_is_refused_unless_labels_are_shared(labels: str) -> None:
    mine = workshop(model__cut="stem", train__labels=labels)
    for use in (mine.front, mine.back):
        with pytest.raises(PlanError) as caught:
            use("output")
        assert str(caught.value) == (
            "The plan cuts at the output, where a client needs its labels for the loss and has no tail, under "
            f'train.labels = "{labels}": cut inside the model, or leave train.labels out.'
        )


def test_a_plan_with_a_tail_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(PlanError, match=r"There is no 'poool' .* \(the plan names it: plan anew"):
        workshop(model__cut="stem", train__labels="keep").back("stem", "poool")


def test_front_and_tail_are_one_half_and_the_middle_the_other() -> None:
    mine = workshop(model__cut="stem", train__labels="keep")
    ends, middle = mine.front("stem", "pool"), mine.back("stem", "pool")
    assert set(ends.state().tensors()) == {"stem.weight", "stem.bias", "fc.weight", "fc.bias"}
    assert all(name.startswith("block.") for name in middle.state().tensors())


def test_at_the_ends_one_half_has_everything_and_the_other_nothing() -> None:
    mine = workshop()
    whole = set(mine.model.state_dict())
    for empty, full in ((mine.front("input"), mine.back("input")), (mine.back("output"), mine.front("output"))):
        assert set(full.state().tensors()) == whole
        assert (empty.optimizer, empty.state().tensors(), empty.gradient_norms().tolist()) == (None, {}, [])
