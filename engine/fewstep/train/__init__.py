"""Training: the loop that knows no method, its strategies, averages, checkpoints and progress."""

from fewstep.train.trainer import Interrupted, Trainer, train

__all__ = ["Interrupted", "Trainer", "train"]
