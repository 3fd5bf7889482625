"""The CPU's kernels, compiled at their first use and kept on disk.

They live for two reasons: PyTorch's own operators cost more to call than a token costs to compute, and their rows
depend on how many rows there are. `model.kernels` decides where they run; the plain PyTorch beside each is the oracle.
"""
