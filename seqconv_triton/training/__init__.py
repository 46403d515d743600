"""Training: recipes, data, the loop, checkpoints; commands on top. Not imported by `import seqconv_triton`."""

from seqconv_triton.training.config import Config
from seqconv_triton.training.run import Outcome, train

__all__ = ["Config", "Outcome", "train"]
