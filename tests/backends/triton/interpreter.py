"""Turns Triton's interpreter into a test of kernels: its wrong results are corrected, and what it can't see is checked.

`install()` (called once, by tests/conftest.py) changes the interpreter for the whole process:

- **Values.** bf16 `tl.dot` and casts compute on values, rounded to nearest even. (The interpreter multiplies bit
  patterns, and cuts off bits.) Other arithmetic on bf16 is an error: kernels must cast to float32 first. A float32
  `tl.dot` with input precision tf32, which is also the default, rounds its operands to tf32.
- **Bounds.** Every address that is loaded or stored must be an element of a tensor passed to the kernel. The gaps of a
  view don't belong to it.
- **Races.** No two programs may store, or store and load, one address without atomics. No single store may put two
  values there. Programs run one after another here, so results alone wouldn't show it. And a program that loads what
  it has stored needs a `tl.debug_barrier` between the two: on a GPU other threads may load. A program may load what
  another has stored before a barrier and then an acq_rel atomic, if its own such atomic at that address came later.
- **Order.** Inside `arriving(order)` the programs of a launch run in an order of yours, as they may on a GPU.
- **Undefined values.** Lanes that a mask leaves out, and memory that a launcher allocates without filling it, are NaN
  (for integers the largest number).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from pvdm_fast.backends import choice

NOBODY, SEVERAL = -1, -2  # in place of a program's number
NEVER = -1  # in place of a time
# The parts of the interpreter that are changed or used here. It promises none of them.
NEEDED = {
    "": ("GridExecutor", "InterpreterBuilder", "ReduceScanOpInterface", "TensorHandle", "_get_np_dtype", "_patch_lang"),
    "_interpreter": ("load",),
    "GridExecutor": ("__call__", "_init_args_hst"),
    "InterpreterBuilder": (
        *("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas"),
        *("create_barrier", "create_dot", "cast_impl", "binary_op", "unary_op", "ternary_op", "create_fma"),
        *("create_rsqrt", "create_erf", "set_grid_idx"),
    ),
    "ReduceScanOpInterface": ("check_tensor",),
}


class Memory:
    """One storage that a kernel has views of: which elements the views contain, and who accessed each."""

    def __init__(self, tensors: list[Tensor], names: list[str]) -> None:
        storage = tensors[0].untyped_storage()
        self.name = " or ".join(names)
        self.unit = min(t.element_size() for t in tensors)
        self.base, self.end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        given = torch.zeros(-(-storage.nbytes() // self.unit), dtype=torch.bool)
        for t in tensors:
            units = t.element_size() // self.unit
            for part in range(units):
                strides = [stride * units for stride in t.stride()]
                given.as_strided(t.shape, strides, t.storage_offset() * units + part).fill_(True)
        self.given = given.numpy()
        self.writer = np.full(self.given.shape, NOBODY, dtype=np.int32)
        self.reader = np.full(self.given.shape, NOBODY, dtype=np.int32)
        self.stored = np.full(self.given.shape, NEVER, dtype=np.int64)  # the launch's clock at the last store

    def elements(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Indices into the arrays above for `addresses` of `size` bytes each."""
        first = (addresses - self.base) // self.unit
        return first if size <= self.unit else (first[:, None] + np.arange(size // self.unit)).ravel()


class Launch:
    """One launch: the memory that it may access, and who accessed it.

    Args:
        kernel: its name.
        tensors: its tensor arguments by name, on the host.
    """

    def __init__(self, kernel: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self.kernel = kernel
        self.patched: set[int] = set()
        self.running = NOBODY
        self.clock = 0
        self.fenced = 0  # the running program's last barrier
        self.seen: dict[int, int] = {}  # by program: of its stores, the running one may load those up to this time
        self.released: dict[int, dict[int, int]] = {}  # by address of an atomic: what the next one there sees
        by_storage: dict[int, list[tuple[str, Tensor]]] = {}
        for name, tensor in tensors:
            if tensor.numel():
                by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
        self.memories = [Memory([t for _, t in group], [n for n, _ in group]) for group in by_storage.values()]

    def access(self, kind: str, builder: Any, pointers: Any, mask: np.ndarray | None, orders: bool = False) -> None:
        """Check one load, store or atomic operation of the running program, and record it.

        orders: it is an acq_rel atomic.
        """
        addresses = pointers.data.astype(np.int64)
        if mask is not None:
            shape = np.broadcast_shapes(addresses.shape, mask.shape)
            addresses = np.broadcast_to(addresses, shape)[np.broadcast_to(mask, shape).astype(bool)]
        self._let_run(builder)
        if orders:
            self._hand_over(addresses.ravel())
        rest, size = addresses.ravel(), interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
        for memory in self.memories:
            inside = (rest >= memory.base) & (rest < memory.end)
            if not inside.any():
                continue
            elements = memory.elements(rest[inside], size)
            if elements[-1] >= memory.given.size or not memory.given[elements].all():
                break
            self._note(kind, builder, memory, elements)
            rest = rest[~inside]
        if rest.size:
            raise IndexError(
                f"{kind} out of bounds: program {builder.grid_idx} of {self.kernel} uses addresses that are no element "
                f"of a tensor passed to it, the first of them {self._where(rest, size)}."
            )

    def _where(self, addresses: np.ndarray, size: int) -> str:
        """The first wrong one of `addresses`, in words."""
        for address in addresses.tolist():
            near = min(self.memories, key=lambda m: max(m.base - address, address - m.end), default=None)
            if near is None:
                return "where no tensor was passed at all"
            if address < near.base:
                return f"{near.base - address} bytes before the memory of {near.name}"
            if address >= near.end:
                return f"{address - near.end} bytes after the end of the memory of {near.name}"
            elements = near.elements(np.array([address]), size)
            if elements[-1] >= near.given.size or not near.given[elements].all():
                return f"{address - near.base} bytes into the memory of {near.name}, outside the view"
        return "elsewhere"

    def _note(self, kind: str, builder: Any, memory: Memory, elements: np.ndarray) -> None:
        if kind == "atomic":
            return
        program = self.running
        writers, readers = memory.writer[elements], memory.reader[elements]
        self._no_race(kind, "stored", self._unseen(writers, memory.stored[elements]), program, builder, memory)
        if kind == "store":
            self._no_race(kind, "loaded", readers, program, builder, memory)
            memory.writer[elements] = program
            self.clock += 1
            memory.stored[elements] = self.clock
        else:
            if ((writers == program) & (memory.stored[elements] > self.fenced)).any():
                raise RuntimeError(
                    f"race: program {builder.grid_idx} of {self.kernel} loads from {memory.name} what it has stored "
                    "there without a tl.debug_barrier in between."
                )
            memory.reader[elements] = np.where((readers == NOBODY) | (readers == program), program, SEVERAL)

    def _let_run(self, builder: Any) -> None:
        """Note which program runs. A new one sees nothing yet of what others have stored."""
        (x, y, z), (nx, ny, _) = builder.grid_idx, builder.grid_dim
        program = x + nx * (y + ny * z)
        if program != self.running:
            self.barrier()
            self.running, self.seen = program, {}

    def barrier(self) -> None:
        """From here on the program's threads see what each of them has stored."""
        self.fenced = self.clock

    def _hand_over(self, addresses: np.ndarray) -> None:
        """An acq_rel atomic: the program sees what those before it there saw, and what they stored before their last
        barrier."""
        for address in addresses.tolist():
            released = self.released.setdefault(address, {})
            self.seen |= released
            released |= {**self.seen, self.running: self.fenced}

    def _unseen(self, writers: np.ndarray, stored: np.ndarray) -> np.ndarray:
        """`writers`, without those whose stores at these times the running program sees."""
        unseen = writers.copy()
        for program, time in self.seen.items():
            unseen[(writers == program) & (stored <= time)] = NOBODY
        return unseen

    def _no_race(self, kind: str, did: str, others: np.ndarray, program: int, builder: Any, memory: Memory) -> None:
        wrong = others[(others != NOBODY) & (others != program)]
        if wrong.size:
            nx, ny, _ = builder.grid_dim
            other = int(wrong[0])
            who = "several programs" if other == SEVERAL else f"{(other % nx, other // nx % ny, other // (nx * ny))}"
            raise RuntimeError(
                f"race: {kind} by program {builder.grid_idx} of {self.kernel} at {wrong.size} addresses of "
                f"{memory.name} that {who} {did}."
            )


_launch: Launch | None = None
_order: Callable[[int], Sequence[int]] | None = None
ACQ_REL = interpreter._ir.MEM_SEMANTIC.ACQUIRE_RELEASE


@contextmanager
def arriving(order: Callable[[int], Sequence[int]]) -> Iterator[None]:
    """In this block the programs of a launch run in the order of the permutation that `order` makes of their count."""
    global _order
    previous, _order = _order, order
    try:
        yield
    finally:
        _order = previous


def named_tensors(names: Iterable[str], values: Iterable[Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in zip(names, values, strict=False):
        if isinstance(value, tuple):
            yield from named_tensors([name] * len(value), value)
        # TensorWrapper and TensorDescriptor have a base
        elif isinstance(base := getattr(value, "base", value), Tensor):
            yield name, base


def _check_accesses() -> None:
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    start, call = executor._init_args_hst, executor.__call__
    load, store = builder.create_masked_load, builder.create_masked_store
    modify, exchange = builder.create_atomic_rmw, builder.create_atomic_cas

    def _init_args_hst(self: Any, arguments: Any, options: dict[str, Any]) -> Any:
        global _launch
        host, host_options = start(self, arguments, options)
        tensors = [*named_tensors(self.arg_names, host), *named_tensors(host_options, host_options.values())]
        _launch = Launch(self.fn.__name__, tensors)
        return host, host_options

    def __call__(self: Any, *arguments: Any, **options: Any) -> None:
        global _launch
        try:
            call(self, *arguments, **options)
        finally:
            _launch = None

    def create_masked_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
        assert _launch is not None
        _launch.access("load", self, pointers, mask.data)
        if other is None and not mask.data.all():
            element = pointers.get_element_ty()
            other = interpreter.TensorHandle(np.full(pointers.data.shape, undefined(element)), element)
        return load(self, pointers, mask, other, *rest)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> None:
        assert _launch is not None
        _launch.access("store", self, pointers, mask.data)
        store(self, pointers, value, mask, *rest)
        data = np.ascontiguousarray(np.broadcast_to(value.data, pointers.data.shape))
        found = interpreter._interpreter.load(pointers.data, mask.data, data, data.dtype)
        if (bits(found) != bits(data)).any():
            raise RuntimeError(f"race: {_launch.kernel} stores two values at one address in one store.")

    def create_barrier(self: Any) -> None:
        assert _launch is not None
        _launch.barrier()

    def create_atomic_rmw(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        assert _launch is not None
        _launch.access("atomic", self, pointers, mask.data, rest[0] == ACQ_REL)
        return modify(self, operation, pointers, value, mask, *rest)

    def create_atomic_cas(self: Any, pointers: Any, *rest: Any) -> Any:
        assert _launch is not None
        _launch.access("atomic", self, pointers, None, rest[-2] == ACQ_REL)
        return exchange(self, pointers, *rest)

    def set_grid_idx(self: Any, *index: int) -> None:
        if _order is not None:
            number = np.ravel_multi_index(index, self.grid_dim)
            index = tuple(map(int, np.unravel_index(_order(int(np.prod(self.grid_dim)))[number], self.grid_dim)))
        start_program(self, *index)

    executor._init_args_hst, executor.__call__ = _init_args_hst, __call__
    start_program, builder.set_grid_idx = builder.set_grid_idx, set_grid_idx
    builder.create_masked_load, builder.create_masked_store = create_masked_load, create_masked_store
    builder.create_barrier = create_barrier
    builder.create_atomic_rmw, builder.create_atomic_cas = create_atomic_rmw, create_atomic_cas


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(f"uint{8 * values.itemsize}")


def undefined(element: Any) -> Any:
    """The undefined value of a Triton type: NaN, or the largest number."""
    dtype = interpreter._get_np_dtype(element)
    if element == tl.bfloat16:
        return dtype.type(0x7FC0)
    if dtype == np.bool_:
        return np.True_
    return dtype.type(np.nan) if dtype.kind == "f" else dtype.type(np.iinfo(dtype).max)


def widened(data: np.ndarray, element: Any) -> np.ndarray:
    """Values as float32. The interpreter holds bf16 as bits."""
    if element == tl.bfloat16:
        return (data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return data.astype(np.float32)


def rounded(data: np.ndarray, dropped: int) -> np.ndarray:
    """float32 rounded to nearest even, without its last `dropped` bits. Infinities and NaN stay."""
    held = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    odd = (held >> np.uint32(dropped)) & np.uint32(1)
    nearest = (held + odd + np.uint32((1 << (dropped - 1)) - 1)) & np.uint32(-(1 << dropped) & 0xFFFFFFFF)
    special = (held & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    quiet = np.where(np.isnan(data), np.uint32(0x7FC00000), held)
    return np.where(special, quiet, nearest).view(np.float32)


def _mend_bf16() -> None:
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, cast = builder.create_dot, builder.cast_impl
    tf32 = interpreter._ir.INPUT_PRECISION.TF32

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, *rest: Any) -> Any:
        elements = a.dtype.scalar, b.dtype.scalar
        if not all(element in (tl.bfloat16, tl.float16, tl.float32) for element in elements):
            return dot(self, a, b, d, precision, *rest)
        left, right = widened(a.data, elements[0]), widened(b.data, elements[1])
        if elements == (tl.float32, tl.float32) and precision == tf32:
            left, right = rounded(left, 13), rounded(right, 13)
        return handle((np.matmul(left, right) + d.data).astype(d.data.dtype), d.dtype.scalar)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        before, after = source.dtype.scalar, target.scalar
        if tl.bfloat16 not in (before, after):
            return cast(self, source, target)
        data = widened(source.data, before)
        if after == tl.bfloat16:
            data = (rounded(data, 16).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        return handle(data.astype(interpreter._get_np_dtype(after)), after)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma", "create_rsqrt", "create_erf"):
        setattr(builder, name, _refusing_bf16(getattr(builder, name)))
    check = interpreter.ReduceScanOpInterface.check_tensor

    def check_tensor(self: Any, inputs: Any) -> None:
        refuse_bf16([getattr(tensor, "handle", None) for tensor in inputs], "a reduction")
        check(self, inputs)

    interpreter.ReduceScanOpInterface.check_tensor = check_tensor


def refuse_bf16(operands: Iterable[Any], operation: str) -> None:
    if any(isinstance(o, interpreter.TensorHandle) and o.dtype.scalar == tl.bfloat16 for o in operands):
        raise TypeError(f"bf16 arithmetic ({operation}): the interpreter would use bit patterns; cast to tl.float32.")


def _refusing_bf16(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def refusing(self: Any, *operands: Any) -> Any:
        if operands[-1] is not np.where:  # np.where only moves bits
            refuse_bf16(operands, getattr(operands[-1], "__name__", method.__name__))
        return method(self, *operands)

    return refusing


def _patch_once_a_launch() -> None:
    """Patch once per launch and module of functions.

    At every call of a jitted function, including tl.sum, the interpreter goes through all of triton.language and
    replaces what it has replaced already, which takes 0.5 ms.
    """
    patch = interpreter._patch_lang

    class Nothing:
        def restore(self) -> None: ...

    def _patch_lang(function: Any) -> Any:
        module = id(function.__globals__)
        if _launch is not None and module in _launch.patched:
            return Nothing()
        if _launch is not None:
            _launch.patched.add(module)
        return patch(function)

    interpreter._patch_lang = _patch_lang


@contextmanager
def poisoned() -> Iterator[None]:
    """In this block torch.empty and its relatives give NaN (for integers the largest number)."""
    mode, fill = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def poisoning(launcher: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(launcher)
    def with_poison(*arguments: Any, **options: Any) -> Any:
        with poisoned():
            return launcher(*arguments, **options)

    return with_poison


def _poison_launchers() -> None:
    for op in choice.SERVED["triton"]:
        module = choice.implementation("triton", op)
        for direction in ("forward", "backward"):
            if hasattr(module, direction):  # what is fused for inference has no backward
                setattr(module, direction, poisoning(getattr(module, direction)))


def install() -> None:
    """Change the interpreter as the module's docstring says. `TRITON_INTERPRET=1` must be set.

    Raises:
        RuntimeError: this version of Triton doesn't have something that is changed here.
    """
    for owner, names in NEEDED.items():
        for name in names:
            if not hasattr(getattr(interpreter, owner) if owner else interpreter, name):
                raise RuntimeError(
                    f"The interpreter of Triton {triton.__version__} has no {owner}{'.' if owner else ''}{name}, which "
                    "tests/backends/triton/interpreter.py changes: update it, or install Triton 3.5 to 3.9."
                )
    _mend_bf16()
    _check_accesses()
    _patch_once_a_launch()
    _poison_launchers()
