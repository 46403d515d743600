"""Triton kernels, one family a file. Importing this package imports Triton: only `backend/triton*.py` do."""
