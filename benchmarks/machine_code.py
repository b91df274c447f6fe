"""What compiled machine code shows: registers, spills, loads, and sums that lanes may round differently.

A sum over the lanes of a warp is a butterfly: each lane adds its own value and a neighbour's, so all lanes get the same
bits. But if a lane's own value is a product, the compiler may fuse product and sum. Then the lane adds its exact
product to the neighbour's rounded one, the neighbour does the opposite, and the two differ in the last bit. The lane
that writes last decides what is in shared memory. In machine code this shows as a fused multiply-add whose addend came
from another lane.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path

TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA", "v_mfma")
CUDA_LINE = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);", flags=re.MULTILINE
)
AMD_LINE = re.compile(r"^\s+([vsdgb][a-z0-9]*_[a-z0-9_]+)[ \t]*([^;\n]*)", flags=re.MULTILINE)
Instruction = tuple[str, list[str]]  # name and operands
CUDA_FUSED = ("FFMA", "FFMA2", "HFMA2", "DFMA")
AMD_FUSED = re.compile(r"v_(pk_)?fma(c|k|ak|mk)?_f")
AMD_CROSSING = re.compile(r"ds_swizzle|ds_b?permute|v_permlane|v_mov_b32_dpp")


@cache
def _cuobjdump() -> str:
    import triton.backends.nvidia

    return str(Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump")


def _operands(text: str) -> list[str]:
    return [operand.strip() for operand in text.split(",") if operand.strip()]


def cuda_instructions(sass: str) -> list[Instruction]:
    """Name and operands of every instruction that `cuobjdump --dump-sass` prints."""
    return [(name, _operands(rest)) for name, rest in CUDA_LINE.findall(sass)]


def amd_instructions(assembly: str) -> list[Instruction]:
    """Name and operands of every instruction of an AMD assembly."""
    return [(name, _operands(rest)) for name, rest in AMD_LINE.findall(assembly)]


def _cuda_registers(operand: str, wide: int) -> set[int]:
    found = re.search(r"\bR(\d+)\b", operand)
    return set(range(int(found[1]), int(found[1]) + wide)) if found else set()


def _cuda_width(name: str) -> int:
    """At most how many registers an instruction writes."""
    kind, *parts = name.split(".")
    if kind == "HGMMA":
        size = re.search(r"\d+x(\d+)x\d+", name)
        return int(size[1]) // 2 if size else 128
    if kind == "LDTM":
        return max([int(part[1:]) for part in parts if re.fullmatch(r"x\d+", part)], default=1)
    if kind in ("HMMA", "IMMA", "DMMA") or {"128", "4", "x4"} & set(parts):
        return 4
    double = kind in ("FFMA2", "FADD2", "FMUL2", "CS2R") or kind.startswith("D")
    return 2 if double or {"64", "WIDE", "2", "x2"} & set(parts) else 1


def cuda_asymmetric(code: Iterable[Instruction]) -> int:
    """Fused multiply-adds whose addend came from another lane, in the order of the code."""
    crossed: set[int] = set()
    count = 0
    for name, operands in code:
        kind = name.partition(".")[0]
        if not operands:
            continue
        width = _cuda_width(name)
        if kind in CUDA_FUSED and len(operands) >= 4 and _cuda_registers(operands[3], width) & crossed:
            count += 1
        if kind == "SHFL":
            crossed |= _cuda_registers(operands[1], 1)
        elif kind == "MOV" and _cuda_registers(operands[1], 1) & crossed:
            crossed |= _cuda_registers(operands[0], 1)
        elif operands[0].startswith("R"):
            crossed -= _cuda_registers(operands[0], width)
    return count


def _amd_registers(operand: str) -> set[int]:
    found = re.match(r"-?\|?v(?:(\d+)|\[(\d+):(\d+)\])", operand)
    if not found:
        return set()
    first, last = (found[1], found[1]) if found[1] else (found[2], found[3])
    return set(range(int(first), int(last) + 1))


def amd_asymmetric(code: Iterable[Instruction]) -> int:
    """The same for AMD, where values cross lanes by a permutation, a swizzle or a DPP move.

    On AMD complete sums end in such a move too, and may then be added to any product. So this counts only products that
    were also computed separately, from the same values, to cross lanes. A subtracted value is a row's largest score,
    not part of a sum.
    """
    crossed: set[int] = set()
    products: set[frozenset[str]] = set()
    count = 0
    for name, operands in code:
        if not operands:
            continue
        if name.startswith(("v_mul_f32", "v_pk_mul_f32")) and len(operands) > 2:
            products.add(frozenset(operand.split()[0] for operand in operands[1:3]))
        if AMD_FUSED.match(name) and len(operands) > 2:
            in_place = name.startswith(("v_fmac", "v_pk_fmac"))
            addend = operands[0] if in_place else operands[3] if len(operands) > 3 else ""
            product = frozenset(operand.split()[0] for operand in operands[1:3])
            subtracted = addend.startswith("-") or re.search(r"neg_lo:\[\d,\d,1\]", ",".join(operands))
            count += bool(_amd_registers(addend) & crossed) and product in products and not subtracted
        if not name.startswith(("v_", "ds_", "global_load", "buffer_load")):
            continue
        written = _amd_registers(operands[0])
        products = {pair for pair in products if not any(_amd_registers(factor) & written for factor in pair)}
        copied = name.startswith("v_mov_b32") and _amd_registers(operands[1]) & crossed
        if copied or AMD_CROSSING.match(name):
            crossed |= written
        elif not name.startswith("ds_write"):
            crossed -= written
    return count


def of_cuda(cubin: bytes) -> dict[str, int]:
    """Resources and counts of a cubin, under the names in `ahead_of_time.Resources`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_cuobjdump(), "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"\b(REG|STACK):(\d+)", text))
    code = cuda_instructions(text)
    kinds = Counter(name.partition(".")[0] for name, _ in code)
    loads = [name for name, _ in code if name.startswith(("LDG.", "LDGSTS."))]
    return {
        "registers": int(usage["REG"]),
        "spilled": kinds["STL"] + kinds["LDL"] + (int(usage["STACK"]) > 0),
        "instructions": len(code) - kinds["NOP"],
        "asymmetric": cuda_asymmetric(code),
        "tensor_core_instructions": sum(kinds[kind] for kind in TENSOR_CORES),
        "loads": len(loads),
        "wide_loads": sum(".128" in load for load in loads),
    }


def of_amd(assembly: str) -> dict[str, int]:
    """The same for an AMD assembly."""

    def number(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[0])

    code = amd_instructions(assembly)
    loads = [name for name, _ in code if name.startswith(("global_load", "buffer_load"))]
    return {
        "registers": number("vgpr_count"),
        "spilled": number("vgpr_spill_count") + (number("private_segment_fixed_size") > 0),
        "instructions": len(code),
        "asymmetric": amd_asymmetric(code),
        "tensor_core_instructions": sum(name.startswith("v_mfma") for name, _ in code),
        "loads": len(loads),
        "wide_loads": sum("x4" in load for load in loads),
    }
