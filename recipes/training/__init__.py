"""Training: settings, data, the loop, checkpoints. `train(Config(…))` is what `python -m recipes.train` does."""

from recipes.training.config import Config
from recipes.training.run import Outcome, train

__all__ = ["Config", "Outcome", "train"]
