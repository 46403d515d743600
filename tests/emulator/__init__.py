"""A GPU for Triton that is none: the compiled PTX of every launch is executed on a CPU, thread by thread.

`driver.Emulator` is Triton's active driver inside a `with` block.
"""
