"""Commands about a model: what it costs, what its kernels compile to, how they are tuned."""
