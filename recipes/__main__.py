"""`python -m recipes`: the recipes' commands, each of which lives in the module that does its work."""

from __future__ import annotations

import sys

from seqconv_triton.cli import Command, main

COMMANDS = {
    "demo": Command("train a small network on handwritten digits", "recipes.training.demo"),
    "train": Command("train a model by the paper's recipe, alone or under torchrun", "recipes.training.commands.train"),
    "evaluate": Command("a checkpoint's errors on a validation set", "recipes.training.commands.evaluate"),
    "predict": Command("the likeliest classes of image files", "recipes.training.commands.predict"),
    "export": Command("a checkpoint as plain weights, ONNX or pt2", "recipes.training.commands.export"),
    "heatmap": Command("draw which group uses which (Figure 5), from a checkpoint", "recipes.figures.heatmap"),
    "history": Command("plot the training curves of several runs (Figure 4)", "recipes.figures.history"),
    "ablation": Command("train the ablation's networks (Table 5) and equal baselines", "recipes.ablation.command"),
}

if __name__ == "__main__":
    sys.exit(main())
