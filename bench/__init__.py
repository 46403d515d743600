"""Benchmarks: `python -m bench` (or `make bench`) times ours against the concatenating reference in one run."""
