"""Recipes beside the library: training, evaluation, figures, the ablation, the demo. `python -m recipes` lists them."""
