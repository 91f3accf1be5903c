"""A file of PTX and the launch of its kernels."""

from __future__ import annotations

import ctypes as C
import json
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from .errors import BY_KIND, PtxEmuError, RaceError, Unsupported
from .library import load, take
from .memory import Memory, pack

# The words of `Options` and what they are to the library; "raise" differs from "record" only here.
WORDS: dict[str, dict[Any, int]] = {
    "races": {"off": 0, "record": 1, "raise": 1},
    "uninit_local": {False: 0, True: 1, "warn": 2},
    "order": {"sequential": 0, "reverse": 1, "random": 2},
}
MOST_BLOCKS = (2**31 - 1, 65535, 65535)


class Stats(dict[str, Any]):
    """The counters of a launch, as a dict whose keys are attributes too; README.md lists them."""

    __getattr__ = dict.__getitem__

    @property
    def mma_flops(self) -> int:
        """Of the products of the tensor cores, a multiplication and an addition being two."""
        return sum(flops for _, flops in self["mma"].values())

    @property
    def load_efficiency(self) -> float:
        """Share of the bytes of the sectors read that a warp uses."""
        return self._efficiency("global_ld")

    @property
    def store_efficiency(self) -> float:
        """The same of the sectors written."""
        return self._efficiency("global_st")

    @property
    def bank_conflicts(self) -> int:
        """Wavefronts of shared memory beyond those needed."""
        return int(self["shared_ld"]["conflicts"] + self["shared_st"]["conflicts"])

    def _efficiency(self, group: str) -> float:
        sectors = self[group]["sectors"]
        return float(self[group]["unique_bytes"] / (32 * sectors)) if sectors else 1.0


@dataclass(frozen=True)
class Kernel:
    """A kernel as its PTX declares it."""

    name: str
    params: list[dict[str, Any]]
    param_bytes: int
    static_shared: int
    local_bytes: int
    reqntid: list[int]  # the block that it requires, or zeros
    maxntid: int
    n_insns: int
    unsupported: list[list[Any]]  # line, reason, text
    fatal: str  # why it could not be decoded, or ""

    @classmethod
    def parse(cls, found: dict[str, Any]) -> Kernel:
        return cls(**{f.name: found[f.name] for f in fields(cls)})


@dataclass(frozen=True)
class Options:
    """How a launch is run and checked. Their order here is that of the library's list."""

    races: str = "raise"  # of shared memory: "raise", "record" or "off"
    uninit_shared: bool = True  # to read it before it was written is an error
    uninit_local: bool | str = True  # the same for registers' memory, or "warn"
    poison: bool = True  # registers and shared memory start as NaN
    stats: bool = True
    global_races: bool = True
    order: str = "sequential"  # of the blocks: "sequential", "reverse" or "random"
    resident_blocks: int = 1  # at a time
    random_schedule: bool = False  # of the warps
    max_warp_insns: int = 400_000_000
    seed: int = 1
    per_line: bool = False  # adds `lines`

    def __post_init__(self) -> None:
        for name, words in WORDS.items():
            if getattr(self, name) not in words:
                raise ValueError(f"{name} must be one of {[*words]}, got {getattr(self, name)!r}")

    def numbers(self) -> list[int]:
        """As the library takes them."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return [WORDS[name][x] if name in WORDS else int(x) for name, x in values.items()]


class Module:
    """Parsed PTX; `kernels` by name."""

    def __init__(self, ptx: str) -> None:
        library, error = load(), C.c_void_p()
        self._handle = library.pe_create(ptx.encode(), C.byref(error))
        if not self._handle:
            raise PtxEmuError(f"the PTX could not be parsed: {take(error.value or 0)}")
        self.ptx = ptx
        info = json.loads(take(library.pe_info(self._handle)))
        self.target: str = info["target"]
        self.globals = {found["name"]: found for found in info["globals"]}
        self.kernels = {found["name"]: Kernel.parse(found) for found in info["kernels"]}

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            load().pe_destroy(self._handle)
            self._handle = None

    @property
    def unsupported(self) -> dict[str, list[list[Any]]]:
        """What the emulator does not know, by kernel."""
        return {k.name: k.unsupported for k in self.kernels.values() if k.unsupported or k.fatal}

    def global_view(self, name: str, dtype: Any = np.uint8) -> Any:
        """A numpy view of a `__device__` or `__constant__` variable."""
        found = self.globals[name]
        address = load().pe_global_host(self._handle, found["va"])
        buffer = (C.c_uint8 * found["size"]).from_address(address)
        return np.frombuffer(buffer, dtype=np.uint8).view(dtype)

    def launch(
        self,
        name: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Iterable[Any],
        shared_bytes: int = 0,
        **options: Any,
    ) -> Stats:
        """Runs a kernel; raises a `PtxEmuError` at the first check that fails.

        `args` are arrays or CPU tensors (changed in place), scalars, None for a null pointer, or
        the wrappers of `memory`. `options` are the fields of `Options`.
        """
        kernel = self.kernels[name]
        blocks, threads = _three(grid), _three(block)
        _check(kernel, blocks, threads)
        values, memory = list(args), Memory()
        if len(values) != len(kernel.params):
            raise PtxEmuError(
                f"kernel {name} takes {len(kernel.params)} arguments, got {len(values)}"
            )
        parameters = bytearray(kernel.param_bytes)
        for index, (declared, value) in enumerate(zip(kernel.params, values, strict=True)):
            begin = declared["offset"]
            packed = pack(declared, value, memory, index)
            parameters[begin : begin + declared["size"]] = packed
        chosen = Options(**options)
        numbers = chosen.numbers()
        found = load().pe_launch(
            *(self._handle, name.encode(), (C.c_uint32 * 3)(*blocks), (C.c_uint32 * 3)(*threads)),
            *(int(shared_bytes), bytes(parameters), len(parameters)),
            *(memory.regions(), len(memory), (C.c_int64 * len(numbers))(*numbers), len(numbers)),
        )
        stats = Stats(json.loads(take(found)), kernel=name, grid=blocks, block=threads)
        _raise(stats, chosen)
        return stats


def _three(size: int | Sequence[int]) -> tuple[int, int, int]:
    given = (size,) if isinstance(size, (int, np.integer)) else tuple(size)
    x, y, z = (*map(int, given), 1, 1)[:3]
    return x, y, z


def _check(kernel: Kernel, grid: tuple[int, ...], block: tuple[int, ...]) -> None:
    """Of a launch: what a driver would refuse, and what the emulator cannot run."""
    if kernel.fatal:
        raise Unsupported(f"kernel {kernel.name}: {kernel.fatal}")
    if kernel.unsupported:
        lines = [f"line {n}: {why}   [{text.strip()}]" for n, why, text in kernel.unsupported[:20]]
        raise Unsupported("\n  ".join([f"kernel {kernel.name} uses unsupported PTX:", *lines]))
    if any(kernel.reqntid) and tuple(kernel.reqntid) != block:
        raise PtxEmuError(f"kernel {kernel.name} requires blocks of {kernel.reqntid}, got {block}")
    if kernel.maxntid and block[0] * block[1] * block[2] > kernel.maxntid:
        raise PtxEmuError(f"kernel {kernel.name} takes {kernel.maxntid} threads, got {block}")
    if any(not 1 <= n <= most for n, most in zip(grid, MOST_BLOCKS, strict=True)):
        raise PtxEmuError(f"a grid has 1 to {MOST_BLOCKS} blocks, got {grid}")


def _raise(stats: Stats, options: Options) -> None:
    error: PtxEmuError | None = None
    if "error" in stats:
        kind = stats["kind"]
        error = BY_KIND.get(kind, PtxEmuError)(f"[{kind}] {stats['error']}")
        error.kind = kind
    elif stats["races"] and options.races == "raise":
        race = stats["races"][0]
        sides = [
            f"warp {race[f'warp{i}']} (PTX line {race[f'line{i}']}: '{race[f'text{i}'].strip()}')"
            for i in (1, 2)
        ]
        error = RaceError(
            f"[race] shared memory of kernel {stats['kernel']}: {race['kind']} at offset "
            f"{race['shared_offset']}, block {race['block']}, {sides[0]} and {sides[1]}; "
            f"{len(stats['races'])} distinct pairs, {stats['race_count']} events"
        )
        error.kind = "race"
    if error is not None:
        error.stats = stats
        raise error


def nvcc_ptx(source: str | Path, arch: str = "sm_80") -> str:
    """CUDA C++, a file or the text itself, as PTX. Raises RuntimeError with what nvcc said."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(source) if isinstance(source, Path) else Path(folder) / "kernels.cu"
        if not isinstance(source, Path):
            path.write_text(source, encoding="utf-8")
        target = Path(folder) / "kernels.ptx"
        flags = [f"-arch={arch}", "-O3", "-std=c++17", "-ptx", "-lineinfo"]
        command = ["nvcc", *flags, str(path), "-o", str(target)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            raise RuntimeError(f"nvcc failed:\n{run.stdout[-2000:]}{run.stderr[-6000:]}")
        return target.read_text(encoding="utf-8")
