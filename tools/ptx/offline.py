"""Compiles Triton kernels for GPUs that are not here, exactly as a call would launch them.

    python -m tools.ptx.offline            registers, spills and shared memory of every variant
    python -m tools.ptx.offline --quick    of those that the tests look at

A call on CPU tensors is recorded instead of run: kernel, arguments, constants, warps, stages. From
that come the signature and the hints of alignment that Triton takes at a launch, and the compiler
does the rest without a driver. Not in a process with `TRITON_INTERPRET=1`: it defines no kernels to
compile.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from salkernels.backends import triton as backend
from salkernels.triton_kernels import launch
from salkernels.triton_kernels.offline import negatives

# Of a launch, with Triton's defaults.
OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 3, "maxnreg": None}
CAPABILITIES = (80, 90, 100, 120)
# Shared memory of one block, bytes, of the smallest device that runs the code: 8.6 and 8.9 for 80.
SHARED_LIMIT = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
LINE = (
    "sm_{capability:<3} {kernel:22} {dtype:8} {form:17} {layout:13} window {window[0]:<2} "
    "samples {samples:<2} {warps} warps, {registers:>3} registers, {spill_bytes:>3} bytes spilled, "
    "{shared_bytes:>6} bytes shared"
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """One launch: what a GPU would have been given."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by name, constants included
    warps: int
    stages: int
    registers: int | None  # the most that a thread may take

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    def constants(self) -> dict[tuple[int, ...], Any]:
        """What is compiled in, by its path: `tl.constexpr` arguments, and in others, and the tuples
        that they are, integers that are 1, and None."""
        declared = [p.is_constexpr for p in self.kernel.params]
        given = enumerate(self.arguments.values())
        whole = {(i,): value for i, value in given if declared[i]}
        return whole | {path: x for path, x in self._parts().items() if _is_compiled_in(x)}

    def values(self) -> dict[tuple[int, ...], Any]:
        """What is passed at run time, by its path, in order."""
        return {path: x for path, x in self._parts().items() if not _is_compiled_in(x)}

    def _parts(self) -> dict[tuple[int, ...], Any]:
        """Arguments that are not `tl.constexpr`, tuples taken apart, however deep."""
        found: dict[tuple[int, ...], Any] = {}

        def take(path: tuple[int, ...], value: Any) -> None:
            if isinstance(value, tuple):
                for i, part in enumerate(value):
                    take((*path, i), part)
            else:
                found[path] = value

        for i, (parameter, value) in enumerate(
            zip(self.kernel.params, self.arguments.values(), strict=True)
        ):
            if not parameter.is_constexpr:
                take((i,), value)
        return found

    def signature(self) -> dict[str, Any]:
        """The type of each argument; of a tuple with names, the same tuple of types."""
        return {
            p.name: "constexpr" if p.is_constexpr else _type(self.arguments[p.name])
            for p in self.kernel.params
        }

    def hints(self) -> dict[tuple[int, ...], list[list[Any]]]:
        """Values divisible by 16: aligned pointers, and integers that are not sizes of 1."""
        return {
            path: [["tt.divisibility", 16]]
            for path, value in self.values().items()
            if not isinstance(value, float)
            and (value.data_ptr() if isinstance(value, Tensor) else value) % 16 == 0
        }


def _is_compiled_in(value: Any) -> bool:
    return value is None or (_is_integer(value) and value == 1)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _type(value: Any) -> Any:
    if isinstance(value, tuple):
        parts = map(_type, value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if _is_compiled_in(value):
        return "constexpr"
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@contextmanager
def recorded(capability: int, act: Callable[[Launch], None]) -> Iterator[None]:
    """Launches of any Triton kernel inside go to `act` instead of a GPU of this capability.

    An autotuner takes its first configuration.
    """

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        names = [p.name for p in kernel.params]
        defaults = {p.name: p.default for p in kernel.params if p.has_default}
        given = defaults | dict(zip(names, args, strict=False)) | kwargs
        size = grid(given) if callable(grid) else grid
        found = {name: given[name] for name in names}
        warps, stages, registers = ({**OPTIONS, **options}[name] for name in OPTIONS)
        act(Launch(kernel, tuple(size), found, warps, stages, registers))

    def tune(tuner: Any, *args: Any, **kwargs: Any) -> None:
        tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
        config = tuner.prune_configs(kwargs)[0]
        tuner.fn.run(*args, **(kwargs | config.all_kwargs()))

    before = launch.capability, JITFunction.run, Autotuner.run
    setattr(launch, "capability", lambda _: capability)  # noqa: B010
    JITFunction.run, Autotuner.run = run, tune
    try:
        yield
    finally:
        launch.capability, JITFunction.run, Autotuner.run = before


@dataclass(frozen=True)
class Compiled:
    """What the compiler and the assembler say of a kernel."""

    ptx: str
    registers: int
    spill_bytes: int
    shared_bytes: int


def compile_launch(item: Launch, capability: int) -> Compiled:
    """Triton to PTX to machine code, which is thrown away."""
    kernel = triton.compile(
        ASTSource(item.kernel, item.signature(), item.constants(), item.hints()),
        target=GPUTarget("cuda", capability, 32),
        options=dict(zip(OPTIONS, (item.warps, item.stages, item.registers), strict=True)),
    )
    registers, spill_bytes = resources(kernel.asm["ptx"], capability)
    return Compiled(kernel.asm["ptx"], registers, spill_bytes, kernel.metadata.shared)


def resources(ptx: str, capability: int) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills, stores and loads together."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"\.target\s+(\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", f"-arch={target[1]}", str(path)]
        done = subprocess.run(
            [*command, "-o", f"{path}.cubin"], capture_output=True, text=True, check=True
        )
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", done.stderr))
    return registers, sum(int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr))


@dataclass(frozen=True)
class Variant:
    """A call whose kernels are compiled: shape and form decide which code it takes."""

    dtype: str
    window: tuple[int, int]
    samples: int = 32
    form: str = "set"  # or "pairs", "negatives" (of a set), "negatives of keys"
    layout: str = "channels_last"
    valid: bool = False  # whether some pixels may take no part

    def call(self) -> None:
        """Forward and backward of the backend, on zeros."""
        groups, samples = (self.samples, 1) if self.form == "pairs" else (1, self.samples)
        size = max(16, *self.window)
        shape = (groups, samples, 384, size, size)
        query = zeros(shape, DTYPES[self.dtype], self.layout)
        key = torch.zeros_like(query) if self.form in ("pairs", "negatives of keys") else None
        nodes = samples if key is None else 2 * samples
        valid = torch.ones(groups, nodes, size, size, dtype=torch.bool) if self.valid else None
        pairs = None if self.form == "pairs" else torch.arange(samples * samples)
        problem = launch.Problem(query, key, pairs, valid, self.window, 1e-12)
        if self.form.startswith("negatives"):
            negatives(problem)
            return
        found = backend.outputs(query, key, pairs, self.window)
        launch.forward(problem, *found)
        grads = torch.empty_like(query), None if key is None else torch.empty_like(key)
        launch.backward(problem, found.max_sim, *found[1:], *grads)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    """(G, N, C, H, W) in a memory layout."""
    if layout == "nchw":
        return torch.zeros(shape, dtype=dtype)
    groups, samples, channels, height, width = shape
    return torch.zeros(groups, samples, height, width, channels, dtype=dtype).movedim(-1, 2)


def variants(quick: bool) -> list[Variant]:
    """One of each kind of code: samples and pixels of a tile, one tile or several, forms."""
    found = []
    for dtype in DTYPES:
        found += [
            Variant(dtype, (2, 2)),
            Variant(dtype, (2, 2), form="pairs"),
            Variant(dtype, (12, 12), samples=2),
            Variant(dtype, (2, 2), valid=True),
            Variant(dtype, (2, 2), form="pairs", valid=True),
            Variant(dtype, (12, 12), samples=2, valid=True),
            Variant(dtype, (2, 2), form="negatives"),
            Variant(dtype, (2, 2), form="negatives of keys", valid=True),
        ]
        if not quick:
            found += [Variant(dtype, (w, w), samples=80) for w in (1, 2, 3, 5, 8)]
            found += [Variant(dtype, (w, w), form="pairs") for w in (1, 3, 5, 8, 12)]
            found += [Variant(dtype, (2, 2), layout="nchw"), Variant(dtype, (2, 2), samples=8)]
    return found


def report(capability: int, variant: Variant) -> list[dict[str, Any]]:
    """A row for each kernel of a variant."""
    items: list[Launch] = []
    with recorded(capability, items.append):
        variant.call()
    rows = []
    for item in items:
        compiled = compile_launch(item, capability)
        rows.append(
            {
                "capability": capability,
                **asdict(variant),
                "kernel": item.name,
                "parameters": len(item.arguments),
                "diagonal": item.arguments.get("DIAGONAL"),
                "merged": getattr(item.arguments.get("FORM"), "MERGED", None),
                "warps": item.warps,
                "stages": item.stages,
                "registers": compiled.registers,
                "spill_bytes": compiled.spill_bytes,
                "shared_bytes": compiled.shared_bytes,
                "shared_limit": SHARED_LIMIT[capability],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="what the tests look at")
    parser.add_argument("--json", action="store_true", help="one row a line, as JSON")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--capabilities", type=int, nargs="+", default=CAPABILITIES)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=tuple(DTYPES))
    parser.add_argument("--all-valid", action="store_true", help="none where pixels take no part")
    options = parser.parse_args()
    chosen = [
        v
        for v in variants(options.quick)
        if v.dtype in options.dtypes and not (options.all_valid and v.valid)
    ]
    work = [(c, v) for v in chosen for c in options.capabilities]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for rows in pool.map(report, *zip(*work, strict=True)):
            for row in rows:
                if options.json:
                    print(json.dumps(row), flush=True)
                else:
                    print(LINE.format(**row), flush=True)


if __name__ == "__main__":
    main()
