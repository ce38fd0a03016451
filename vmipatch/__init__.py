"""vmipatch: the toolchain for VMware's Virtual Machine Interface and kernels that patch themselves."""

__version__ = "0.1.0"
