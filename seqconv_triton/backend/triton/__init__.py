"""The order in which a stage launches the Triton kernels."""
