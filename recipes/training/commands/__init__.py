"""The commands `train`, `evaluate`, `predict` and `export`."""
