"""Triton kernels and their launchers, one file an operation; installed as ``pvdm_fast.kernels``.

Importing this package doesn't import triton: only its submodules do, and those are loaded when an operation first runs
on the ``triton`` backend.
"""
