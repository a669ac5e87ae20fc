"""Learning rates by epoch, compared with torch's own schedulers."""

import pytest
import torch
from helpers import config_of

from zsplit.config import Config
from zsplit.train.rates import epoch_of, factor

EPOCHS = 12


def of_torch(kind: type, **values: object) -> list[float]:
    """Return the rates of a torch scheduler that begins with 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = kind(optimizer, **values)
    rates = []
    for _ in range(EPOCHS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def ours(config: Config) -> list[float]:
    return [factor(config, epoch) for epoch in range(EPOCHS)]


def test_rates_that_are_constant_stay_as_they_are() -> None:
    assert ours(config_of()) == [1.0] * EPOCHS


def test_step_is_that_of_torch() -> None:
    config = config_of(train__lr_schedule="step", train__lr_step=4, train__lr_gamma=0.5)
    assert ours(config) == pytest.approx(of_torch(torch.optim.lr_scheduler.StepLR, step_size=4, gamma=0.5))


def test_multistep_is_that_of_torch() -> None:
    config = config_of(train__lr_schedule="multistep", train__lr_milestones=[3, 7], train__lr_gamma=0.2)
    expected = of_torch(torch.optim.lr_scheduler.MultiStepLR, milestones=[3, 7], gamma=0.2)
    assert ours(config) == pytest.approx(expected)


@pytest.mark.parametrize("keys", [{"train__lr_epochs": EPOCHS}, {"run__rounds": 4, "train__local_epochs": 3}])
def test_cosine_is_that_of_torch_over_the_epochs_of_the_run_unless_told_otherwise(keys: dict[str, int]) -> None:
    config = config_of(train__lr_schedule="cosine", **keys)
    assert ours(config) == pytest.approx(of_torch(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=EPOCHS))


def test_cosine_stays_at_nothing_after_its_epochs() -> None:
    config = config_of(train__lr_schedule="cosine", train__lr_epochs=5)
    assert ours(config)[5:] == [0.0] * (EPOCHS - 5)


def test_epochs_are_counted_over_the_whole_run() -> None:
    config = config_of(train__local_epochs=2)
    assert [epoch_of(config, 3, step, epoch_steps=4) for step in (0, 3, 4, 7)] == [6, 6, 7, 7]
