"""The errors of a launch: each names the kernel, block, thread, line of PTX and address."""

from __future__ import annotations

from typing import Any


class PtxEmuError(RuntimeError):
    """Any failure: of parsing, of the arguments, or, as a subclass, of a check at run time.

    `kind` is the emulator's name for it; `stats` has the counters up to then, or None.
    """

    kind = "error"
    stats: Any = None


class OutOfBounds(PtxEmuError):
    """Global, shared, local or parameter memory outside its bounds, or a write to `ReadOnly`."""


class Misaligned(PtxEmuError):
    """An address that is not a multiple of the access size."""


class UninitRead(PtxEmuError):
    """Memory that was read before anything was written to it."""


class RaceError(PtxEmuError):
    """Two warps touched the same shared memory, one of them writing, with no barrier between."""


class Unsupported(PtxEmuError):
    """An instruction that the emulator does not know."""


class Deadlock(PtxEmuError):
    """A barrier that never completes, lanes that are missing, or too many instructions."""


class DeviceAssert(PtxEmuError):
    """An `assert` in the kernel failed."""


BY_KIND: dict[str, type[PtxEmuError]] = {
    **dict.fromkeys(["oob", "shared_oob", "local_oob", "param_oob", "readonly"], OutOfBounds),
    "misaligned": Misaligned,
    **dict.fromkeys(["uninit_shared", "uninit_local", "uninit_global"], UninitRead),
    "unsupported": Unsupported,
    **dict.fromkeys(["deadlock", "divergent_barrier", "barrier"], Deadlock),
    **dict.fromkeys(["instruction_limit", "membermask"], Deadlock),
    "device_assert": DeviceAssert,
}
