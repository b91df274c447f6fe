"""`python -m benchmarks.cuda_resources`: what each CUDA C++ kernel uses on each GPU that it was built for.

Reads the machine code of the built extension `pvdm_fast._cuda` and checks it against a budget: no spilled registers,
and no more shared memory than the GPU has. Main loops of attention and projection must use tensor cores, asynchronous
copies and matrix loads. Kernels bound by memory must use 16-byte loads. The exit code is 1 if something is over its
budget. It says nothing about speed.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import build_tools
from pvdm_fast.backends import extensions
from pvdm_fast.errors import UserError
from pvdm_fast.jobs.command import run_command

DOCS = Path(__file__).parents[1] / "docs" / "results" / "cuda_resources.md"
BEGIN, END = "<!-- cuda resources: begin -->", "<!-- cuda resources: end -->"
REGISTERS = 64 << 10  # per multiprocessor, allocated to warps in units of 256
RESERVED = 1024  # bytes of shared memory that the system takes per block


@dataclass(frozen=True)
class Gpu:
    """A multiprocessor: how many warps and blocks it holds, and its shared memory in KiB. From the CUDA
    programming guide."""

    warps: int
    blocks: int
    shared: int


GPUS = {
    "sm_80": Gpu(64, 32, 164),
    "sm_86": Gpu(48, 16, 100),
    "sm_89": Gpu(48, 24, 100),
    "sm_90": Gpu(64, 32, 228),
    "sm_100": Gpu(64, 32, 228),
    "sm_120": Gpu(48, 24, 100),
}
MATRIX = ("matrix_forward", "matrix_dq", "matrix_dkv")
TILES = ("sequences_to_latents",)  # their launchers fit a tile into the shared memory that there is
# Kernels without 16-byte loads, and why.
NARROW = {
    "add_parts": "partial sums, a 32nd of what was read before",
    "average": "partial sums, a 32nd of what was read before",
    "combine": "partial sums of tiles, neighbouring threads read neighbours",
    "finish_statistics": "partial sums, a 32nd of what was read before",
    "parameter_gradients": "partial sums, a 32nd of what was read before",
    "project": "rows of a few latent channels",
}


@dataclass(frozen=True)
class Resources:
    """One compiled kernel.

    Registers are per thread, shared is in bytes per block. `step` counts the instructions of the main loop, the one
    with the most matrix instructions.
    """

    kernel: str
    variant: str
    gpu: str
    threads: int
    registers: int
    spilled: int
    shared: int
    loads: int
    wide_loads: int
    step: Counter[str]

    @property
    def blocks(self) -> int:
        """How many blocks fit on a multiprocessor."""
        gpu, warps = GPUS[self.gpu], self.threads // 32
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * 32 * warps)
        return min(gpu.blocks, gpu.warps // warps, by_registers, (gpu.shared << 10) // (self.shared + RESERVED))


def cuobjdump() -> str:
    """The toolkit's cuobjdump, otherwise Triton's.

    Raises:
        UserError: there is neither.
    """
    if found := shutil.which("cuobjdump"):
        return found
    folders = []
    with suppress(build_tools.Unbuildable):
        folders.append(build_tools.find_toolkit().root / "bin")
    if triton := find_spec("triton"):
        folders.append(Path(str(triton.origin)).parent / "backends" / "nvidia" / "bin")
    for folder in folders:
        if (folder / "cuobjdump").exists():
            return str(folder / "cuobjdump")
    raise UserError("No cuobjdump found on PATH, in the CUDA toolkit or in Triton: install the CUDA toolkit.")


def _lines(*command: str) -> Iterator[str]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode:
        raise UserError(f"{' '.join(command[:-1])} fails: it may be older than the compiler of {command[-1]}.")


def readable(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Kernel and template arguments of mangled names: ("slice", "float, true")."""
    names = list(names)
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    found = {}
    for name, line in zip(names, text.splitlines(), strict=True):
        match = re.search(r"(\w+)(?:<([^()]*)>)?\((?!anonymous)", line.replace("(anonymous namespace)::", ""))
        assert match, line
        found[name] = (match[1], match[2] or "")
    return found


def threads_of(library: Path) -> dict[str, int]:
    """Threads per block of each kernel, from its launch bounds, by mangled name."""
    found: dict[str, int] = {}
    name = ""
    lines = _lines(cuobjdump(), "--dump-elf", "--gpu-architecture", "sm_80", str(library))
    for line in lines:
        if match := re.match(r"\.nv\.info\.(_Z\w+)", line):
            name = match[1]
        elif "EIATTR_MAX_THREADS" in line:
            next(lines)
            found[name] = int(next(lines).split()[1], 16)
    return found


def usage_of(library: Path) -> dict[tuple[str, str], tuple[int, int, int]]:
    """Registers, and bytes of stack and static shared memory, by GPU and mangled name."""
    found, gpu, name = {}, "", ""
    for line in _lines(cuobjdump(), "--dump-resource-usage", str(library)):
        if match := re.match(r"arch = (\w+)", line):
            gpu = match[1]
        elif match := re.match(r"\s*Function (\w+):", line):
            name = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            shared = int(match[3])
            if int(gpu.removeprefix("sm_")) >= 90 and shared >= RESERVED:
                shared -= RESERVED  # included from Hopper on
            found[gpu, name] = (int(match[1]), int(match[2]), shared)
    return found


_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*)")


def code_of(library: Path) -> Iterator[tuple[str, str, list[tuple[int, str, str]]]]:
    """(GPU, mangled name, instructions as (address, name, operands)) of each kernel."""
    gpu, name, code = "", "", []
    for line in _lines(cuobjdump(), "--dump-sass", str(library)):
        if match := _INSTRUCTION.match(line):
            code.append((int(match[1], 16), match[2], match[3]))
        elif match := re.match(r"\s*Function : (\w+)", line):
            if code:
                yield gpu, name, code
            name, code = match[1], []
        elif match := re.match(r"\s*code for (\w+)", line):
            if code:
                yield gpu, name, code
            gpu, code = match[1], []
    if code:
        yield gpu, name, code


def main_loop(code: list[tuple[int, str, str]]) -> Counter[str]:
    """Instructions by kind (HMMA, LDSM, ...) of the innermost loop with the most matrix instructions."""
    loops: list[tuple[int, int, Counter[str]]] = []
    for address, name, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if kind_of(name) == "BRA" and target and (start := int(target[1], 16)) <= address:
            loops.append((start, address, Counter(kind_of(n) for at, n, _ in code if start <= at <= address)))
    multiplying = sorted((loop for loop in loops if loop[2]["HMMA"]), key=lambda loop: loop[1] - loop[0])
    innermost: list[tuple[int, int, Counter[str]]] = []
    for loop in multiplying:
        if not any(loop[0] <= inner[0] and inner[1] <= loop[1] for inner in innermost):
            innermost.append(loop)
    return max((loop[2] for loop in innermost), key=lambda kinds: kinds["HMMA"], default=Counter())


def kind_of(instruction: str) -> str:
    return instruction.partition(".")[0]


def resources(library: Path) -> list[Resources]:
    """Every kernel of a built extension, on every GPU that it has machine code for."""
    threads, usage = threads_of(library), usage_of(library)
    names = readable(threads)
    found = []
    for gpu, name, code in code_of(library):
        kernel, variant = names[name]
        registers, stack, shared = usage[gpu, name]
        kinds = Counter(kind_of(n) for _, n, _ in code)
        loads = [n for _, n, _ in code if n.startswith(("LDG.", "LDGSTS."))]
        found.append(
            Resources(
                *(kernel, variant, gpu, threads[name], registers),
                spilled=kinds["STL"] + kinds["LDL"] + (stack > 0),
                shared=shared + dynamic_shared(kernel, variant, gpu),
                loads=len(loads),
                wide_loads=sum(".128" in load for load in loads),
                step=main_loop(code) if multiplies(kernel, variant) else Counter(),
            )
        )
    return found


def multiplies(kernel: str, variant: str) -> bool:
    """Whether a kernel should use tensor cores."""
    return kernel in MATRIX or (kernel in TILES and not variant.startswith("float"))


def least_shared(gpu: str) -> int:
    """Shared memory in KiB on the GPU that has least of it. Code for sm_80 also runs on sm_86 and sm_89, which have
    less."""
    return min(known.shared for name, known in GPUS.items() if name[:-1] == gpu[:-1])


def dynamic_shared(kernel: str, variant: str, gpu: str) -> int:
    """The most dynamic shared memory that a launch asks for, in bytes."""
    if kernel in TILES:
        return (least_shared(gpu) << 10) - RESERVED
    if not kernel.startswith(("matrix_", "vector_")):
        return 0
    matrix = kernel in MATRIX
    width = int(variant.split(", ")[1]) if matrix else 0
    return int(extensions.extension("_cuda").attention_shared_memory(width, matrix, not kernel.endswith("forward")))


def over_budget(found: Resources) -> list[str]:
    """What is wrong with a compiled kernel, in sentences."""
    where = f"{found.kernel}<{found.variant}> for {found.gpu}"
    problems = []
    if found.spilled:
        problems.append(f"{where} spills registers.")
    least = least_shared(found.gpu)
    if found.shared + RESERVED > least << 10:
        problems.append(f"{where} takes {found.shared} bytes of shared memory, more than the {least} KiB there are.")
    if multiplies(found.kernel, found.variant):
        for kind, what in (("HMMA", "tensor cores"), ("LDSM", "ldmatrix"), ("LDGSTS", "asynchronous copies")):
            if not found.step[kind]:
                problems.append(f"{where} has no {kind} in its main loop: it should use {what}.")
    elif not found.wide_loads and found.kernel not in NARROW and "false" not in found.variant:
        problems.append(f"{where} is bound by memory, but has no 16-byte load.")
    return problems


def table(rows: Iterable[Resources]) -> list[str]:
    """Lines of Markdown: per kernel and GPU, the variant with the most registers."""
    groups: dict[tuple[str, str], list[Resources]] = defaultdict(list)
    for row in rows:
        groups[row.kernel, row.gpu].append(row)
    lines = [
        "| kernel | GPU | variants | registers | shared, KiB | blocks | warps | a step: mma, ldmatrix, copies | "
        "16-byte loads |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kernel, gpu in sorted(groups, key=lambda key: (key[0], list(GPUS).index(key[1]))):
        group = groups[kernel, gpu]
        worst = max(group, key=lambda row: (row.registers, row.variant))
        fewest = min(row.blocks for row in group)
        step = ", ".join(str(worst.step[kind]) for kind in ("HMMA", "LDSM", "LDGSTS"))
        step = step if multiplies(kernel, worst.variant) else ""
        wide = [row.wide_loads for row in group if "false" not in row.variant]
        lines.append(
            f"| {kernel} | {gpu} | {len(group)} | {worst.registers} | {max(row.shared for row in group) / 1024:.1f} | "
            f"{fewest} | {fewest * worst.threads // 32} of {GPUS[gpu].warps} | {step} | {min(wide)}-{max(wide)} |"
        )
    return lines


def write_docs(rows: Iterable[Resources], compiler: str, path: Path = DOCS) -> None:
    """Put the table between the markers in docs/results/cuda_resources.md."""
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UserError(f"{path} must have the lines {BEGIN} and {END} once each.")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    made = f"Made by `python -m benchmarks.cuda_resources --write-docs` from what {compiler} built."
    path.write_text("\n".join([head + BEGIN, made, "", *table(rows), END + tail]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_resources", description=__doc__)
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/results/cuda_resources.md")
    options = parser.parse_args(arguments)
    problems: list[str] = []

    def run() -> None:
        try:
            library = extensions.extension("_cuda").__file__
        except extensions.ExtensionError as error:
            raise UserError(f"There is nothing to look at: {error}") from error
        rows = resources(Path(str(library)))
        print("\n".join(table(rows)))
        problems.extend(problem for row in rows for problem in over_budget(row))
        print(f"\n{len(rows)} compiled kernels, {len(problems)} problems", *problems, sep="\n")
        if options.write_docs:
            write_docs(rows, extensions.build_info()["_cuda"]["compiler"])

    return run_command(run) or int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
