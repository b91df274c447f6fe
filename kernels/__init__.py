"""Triton kernels and their launchers, one file per operation. Installed as ``pvdm_fast.kernels``.

Importing this package doesn't import triton. Only the submodules do, and they are loaded when an operation first runs
on the ``triton`` backend.
"""
