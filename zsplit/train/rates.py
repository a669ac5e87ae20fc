"""Learning rates as a function of the epoch, counted over the whole run: nothing to carry, nothing to restore."""

import math

from zsplit.config import Config


def factor(config: Config, epoch: int) -> float:
    """Return what the learning rates of `train.lr` and its kin are multiplied by in this epoch, from 0 on.

    `step` and `multistep` multiply by `train.lr_gamma`; `cosine` falls from 1 to 0 along half a wave (SGDR, Loshchilov
    and Hutter 2017, equation 5, without restarts), as torch's schedulers of these names do.
    """
    train = config.train
    match train.lr_schedule:
        case "constant":
            return 1.0
        case "step":
            return float(train.lr_gamma ** (epoch // train.lr_step))
        case "multistep":
            return float(train.lr_gamma ** sum(epoch >= milestone for milestone in train.lr_milestones))
        case "cosine":
            epochs = train.lr_epochs or config.run.rounds * train.local_epochs
            return 0.5 * (1 + math.cos(math.pi * min(epoch, epochs) / epochs))


def epoch_of(config: Config, round_: int, step: int, epoch_steps: int) -> int:
    """Return the epoch that a step of a round belongs to, counted over the whole run."""
    return round_ * config.train.local_epochs + step // epoch_steps
