"""The shared buffer on PyTorch's own ops: CPU, export, and wherever Triton is not."""
