"""Recipes beside the library: training, the ablation, figures, the demo. Run from a checkout: `python -m recipes`."""
