"""Launchers of the CUDA C++ kernels: outputs and workspaces are made here, `pvdm_fast._cuda` fills them."""
