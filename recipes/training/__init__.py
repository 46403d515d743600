"""Training: recipes, data, the loop, checkpoints; commands on top. Not imported by `import seqconv_triton`."""

from recipes.training.config import Config
from recipes.training.run import Outcome, train

__all__ = ["Config", "Outcome", "train"]
