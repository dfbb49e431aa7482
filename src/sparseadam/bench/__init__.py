"""The benchmark: ours against PyTorch's optimizers and against the memory's own speed, on any machine and shape.

Run it with ``python -m sparseadam bench``. Nothing in the optimizer imports this package.
"""
