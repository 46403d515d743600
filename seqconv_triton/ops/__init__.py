"""A stage as one function: checks, autocast, the registered ops behind it."""
