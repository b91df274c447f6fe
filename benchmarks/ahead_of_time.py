"""Compiles Triton kernels as the networks launch them, for GPUs that needn't be here, and reads the result.

Launchers run on the meta device, and their launches are watched. Each launch goes through Triton's own specialisation
and compiler, with a driver that only names a target. Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.machine_code import of_amd, of_cuda
from pvdm_fast.analysis.workload import Call
from pvdm_fast.backends import choice
from pvdm_fast.kernels import configs
from pvdm_fast.kernels.configs import Key
from pvdm_fast.kernels.launch import Config, options, watch

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "sm120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Resources:
    """One compiled kernel.

    Registers are per thread. spilled counts instructions (CUDA) or registers (AMD). shared is in bytes. loads are those
    from global memory.
    """

    kernel: str
    architecture: str
    dtype: str
    config: str
    num_warps: int
    registers: int
    spilled: int
    instructions: int
    asymmetric: int  # sums that lanes may round differently (benchmarks/machine_code.py)
    shared: int
    products: bool  # has a tl.dot
    products_16_bit: bool
    products_tf32: bool
    tensor_core_instructions: int
    loads: int
    wide_loads: int  # of 16 bytes
    narrow: bool = False  # rows are too short, or threads too many, for 16-byte loads


class NamedTarget:
    """Stands in for a GPU's driver: it can compile, but not launch."""

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.architecture]

    def get_current_device(self) -> str:
        return self.architecture  # Triton caches compiled code under this key

    def get_current_stream(self, device: str | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def compile_launch(
    architecture: str, kernel: Any, grid: tuple[int, ...], arguments: Iterable[Any], config: Config, **constants: Any
) -> Any:
    """The compiled kernel of one launch, specialised as on the device. Tensors may be on the meta device."""
    driver.set_active(NamedTarget(architecture))
    return kernel.run(*arguments, grid=grid, warmup=True, **options(config, constants))


def name_of(kernel: Any) -> str:
    return str(kernel.fn.__name__)


def dtype_of(arguments: Iterable[Any]) -> str:
    """The dtype that a launch computes for: that of its narrowest tensor, the first of equally narrow ones."""
    tensors = [a for a in arguments if isinstance(a, Tensor) and a.is_floating_point()]
    return str(min(tensors, key=lambda t: t.element_size()).dtype).removeprefix("torch.")


def run_on_meta(calls: Iterable[Call]) -> None:
    for call in calls:
        getattr(choice.implementation("triton", call.op), call.direction)(*call.inputs("meta"))


def serving_entries(architecture: str, calls: Iterable[Call]) -> set[tuple[str, Key]]:
    """The table entries that `calls` use on `architecture`: (table, key of the entry)."""
    with configs.assume(architecture), watch(lambda *launched: None):
        run_on_meta(calls)
        return {(name, table.entry_of(key)) for name, table in configs.TABLES.items() for key in table.asked}


Launch = tuple[Any, tuple[int, ...], tuple[Any, ...], Config, dict[str, Any]]


def launches_of(architecture: str, calls: Iterable[Call]) -> list[Launch]:
    """(kernel, grid, arguments, configuration, constants) of every launch of `calls` on `architecture`."""
    found: list[Launch] = []
    with configs.assume(architecture), watch(lambda *launched: found.append(launched)):
        run_on_meta(calls)
    return found


@cache
def _entries(tables: int) -> frozenset[str]:
    """Every configuration in a table. The number of `tables` grows with every operation that is imported."""
    return frozenset(str(entry) for table in configs.TABLES.values() for entry in table.entries.values())


def configuration_of(kernel: Any, config: Config) -> tuple[Any, ...]:
    """What distinguishes two configurations of a kernel.

    Blocks that aren't in a table were made from the shapes. Those of one size count as one configuration.
    """
    blocks = str(config.blocks) if str(config) in _entries(len(configs.TABLES)) else math.prod(config.blocks.values())
    return name_of(kernel), blocks, config.num_warps, config.num_stages


def compile_calls(
    architecture: str, calls: Iterable[Call], rest: Iterable[Call] = (), variants: bool = False
) -> list[Resources]:
    """Every kernel that `calls` launch on `architecture`, once per configuration and set of dtypes.

    rest: further calls. Of these, only new configurations are compiled, separately for float32 and 16 bits.
    variants: also compile kernels that differ in other constants, or in the divisibility of their sizes.
    """
    seen: set[Any] = set()
    found: list[Resources] = []

    def add(key: Any, launch: Launch) -> None:
        kernel, grid, arguments, config, constants = launch
        single = (*configuration_of(kernel, config), dtype_of(arguments) == "float32")
        if key in seen:
            return
        seen.update((key, single))
        compiled = compile_launch(architecture, kernel, grid, arguments, config, **constants)
        if id(compiled) not in seen:  # Triton returns the same object for the same specialisation
            seen.add(id(compiled))
            made = resources(compiled, architecture, name_of(kernel), dtype_of(arguments), config)
            found.append(replace(made, narrow=is_narrow(made, config, constants)))

    for number, launch in enumerate(launches_of(architecture, calls)):
        dtypes = tuple(a.dtype if isinstance(a, Tensor) else a is None for a in launch[2])
        add(number if variants else (*configuration_of(launch[0], launch[3]), dtypes), launch)
    for launch in launches_of(architecture, rest):
        add((*configuration_of(launch[0], launch[3]), dtype_of(launch[2]) == "float32"), launch)
    return found


def is_narrow(made: Resources, config: Config, constants: dict[str, Any]) -> bool:
    """Whether shapes are too small for 16-byte loads, as in networks below full size.

    That is: heads that aren't a multiple of 16 channels (Triton sees no alignment in their strides), and tiles of
    `plane_norm` with less than 16 bytes per row or per thread.
    """
    if "BLOCK_W" not in config.blocks:
        return constants.get("HEAD", 16) % 16 != 0
    row = config.blocks["BLOCK_G"] * min(config.blocks["BLOCK_W"], constants["WIDTH"])
    threads = config.num_warps * TARGETS[made.architecture].warp_size
    return min(row, config.blocks["BLOCK_N"] * row // threads) * getattr(torch, made.dtype).itemsize < 16


def resources(compiled: Any, architecture: str, kernel: str, dtype: str, config: Config) -> Resources:
    """Read from a compiled kernel's machine code what the kernel uses."""
    products = [line for line in compiled.asm["ttir"].splitlines() if re.search(r"= tt\.dot\b", line)]
    counts: dict[str, Any] = (
        of_cuda(compiled.asm["cubin"]) if "cubin" in compiled.asm else of_amd(compiled.asm["amdgcn"])
    )
    blocks = " ".join(f"{name.lower()} {size}" for name, size in config.blocks.items())
    return Resources(
        kernel=kernel,
        architecture=architecture,
        dtype=dtype,
        config=f"{blocks}, {config.num_warps} warps, {config.num_stages} stages".strip(", "),
        num_warps=config.num_warps,
        shared=compiled.metadata.shared,
        products=bool(products),
        products_16_bit=any(re.search(r"tensor<[0-9x]*x(bf16|f16)[,>]", line) for line in products),
        products_tf32=any("inputPrecision = tf32" in line for line in products),
        **counts,
    )


def over_budget(found: Resources, narrow: Iterable[str] = ()) -> list[str]:
    """What is wrong with a compiled kernel, in sentences. `narrow`: kernels that don't need 16-byte loads."""
    where = f"{found.kernel} for {found.architecture}, {found.dtype} ({found.config})"
    limit = configs.SHARED_MEMORY[found.architecture] * 1024
    most = 512 if found.architecture.startswith("gfx") else 255
    problems = []
    if found.spilled:
        problems.append(f"{where} spills registers: make its blocks smaller, or give it more warps.")
    if found.asymmetric:
        problems.append(
            f"{where} fuses {found.asymmetric} products into sums over lanes, which then differ in the last bit: take "
            "the product with sum_of_products or rounded_product of kernels/math.py."
        )
    if found.registers > most:
        problems.append(f"{where} takes {found.registers} registers a thread, the most is {most}.")
    if found.shared > limit:
        problems.append(f"{where} takes {found.shared} bytes of shared memory, the most is {limit}.")
    if found.products_16_bit and not found.tensor_core_instructions:
        problems.append(f"{where} multiplies 16-bit matrices without tensor cores.")
    if found.products_tf32 and not found.tensor_core_instructions:
        problems.append(f"{where} rounds to tf32 without tensor cores.")
    if not (found.products or found.narrow) and found.loads and not found.wide_loads and found.kernel not in narrow:
        problems.append(f"{where} is bound by memory, but has no 16-byte load.")
    return problems
