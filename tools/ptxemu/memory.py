"""Arguments of a launch: buffers get addresses, everything becomes the bytes of a parameter.

A storage (of a torch tensor, or the base of a numpy array) lies at an address of its own, and a
buffer in it at its true offset. Only the span of a buffer may be touched, not the rest of its
storage.
"""

from __future__ import annotations

import ctypes as C
import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import PtxEmuError
from .library import Region

SLOT_SHIFT = 36  # each storage has 2^36 bytes of addresses
READ_ONLY, TRACKED = 1, 2  # flags of a Region
FORMATS = {
    "u8": "B",
    "s8": "b",
    "b8": "B",
    "u16": "H",
    "s16": "h",
    "b16": "H",
    "f16": "e",
    "u32": "I",
    "s32": "i",
    "b32": "I",
    "u64": "Q",
    "s64": "q",
    "b64": "Q",
    "f32": "f",
    "f64": "d",
}
FLOATS_OF_BITS = {2: "<e", 4: "<f", 8: "<d"}  # by size: a float given for a .b parameter


class ReadOnly:
    """A buffer to which any write is an error."""

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer


class Uninit:
    """A buffer, such as torch.empty: to read a byte before a thread wrote it is an error."""

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer


class DevPtr:
    """A pointer some bytes into a buffer."""

    def __init__(self, buffer: Any, offset: int = 0) -> None:
        self.buffer, self.offset = buffer, offset


class PtrTable:
    """A pointer to an array of pointers; None is a null pointer."""

    def __init__(self, buffers: Any) -> None:
        self.buffers = list(buffers)


class Struct:
    """A structure by value: (code, value) for each field, codes of `struct`, alignment as in C."""

    def __init__(self, *fields: tuple[str, Any]) -> None:
        self.fields = fields


def is_tensor(x: Any) -> bool:
    """Whether it is a torch tensor; torch need not be installed."""
    return type(x).__module__.split(".")[0] == "torch" and hasattr(x, "data_ptr")


def _address(x: Any) -> int:
    return int(x.data_ptr() if is_tensor(x) else x.ctypes.data)


def _span(x: Any) -> tuple[int, int, int, int]:
    """Address and bytes of the storage, and the first and last byte in it that elements cover."""
    if is_tensor(x):
        if x.device.type != "cpu":
            raise TypeError(f"a tensor argument must be on the CPU, got {x.device}")
        storage = x.untyped_storage()
        base, size = int(storage.data_ptr()), int(storage.nbytes())
        low = x.data_ptr() - base
        if x.numel() == 0:
            return base, size, low, low
        last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        return base, size, low, low + (last + 1) * x.element_size()
    owner = x
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    base, end = _bounds(owner)
    low, high = (x.ctypes.data, x.ctypes.data) if x.size == 0 else _bounds(x)
    return base, end - base, low - base, high - base


def _bounds(x: Any) -> tuple[int, int]:
    module: Any = np.lib.array_utils if hasattr(np.lib, "array_utils") else np  # numpy 1.26
    low, high = module.byte_bounds(x)
    return int(low), int(high)


@dataclass
class _Storage:
    base: int
    size: int
    slot: int
    flags: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def merged(self) -> list[int]:
        """The spans, ascending and disjoint, as begin, end, begin, end and so on."""
        found: list[list[int]] = []
        for low, high in sorted(span for span in self.spans if span[0] < span[1]):
            if found and low <= found[-1][1]:
                found[-1][1] = max(found[-1][1], high)
            else:
                found.append([low, high])
        return [edge for span in found or [[0, 0]] for edge in span]


class Memory:
    """The buffers of one launch."""

    def __init__(self) -> None:
        self._storages: dict[int, _Storage] = {}
        self._kept: list[Any] = []  # what the launch points to

    def __len__(self) -> int:
        return len(self._storages)

    def add(self, buffer: Any, name: str, flags: int = 0) -> int:
        """The address that a buffer has in the emulator."""
        if not is_tensor(buffer) and not isinstance(buffer, np.ndarray):
            raise TypeError(f"{name}: expected a tensor or an array, got {type(buffer)}")
        base, size, low, high = _span(buffer)
        number = len(self._storages) + 1
        storage = self._storages.setdefault(base, _Storage(base, size, number))
        storage.size = max(storage.size, size)
        storage.spans.append((low, high))
        storage.names.append(name)
        storage.flags |= flags
        self._kept.append(buffer)
        return (storage.slot << SLOT_SHIFT) + _address(buffer) - base

    def regions(self) -> Any:
        """All storages, as the library takes them; valid as long as this object."""
        found = (Region * max(1, len(self._storages)))()
        for region, storage in zip(found, self._storages.values(), strict=False):
            edges = storage.merged()
            intervals = (C.c_uint64 * len(edges))(*edges)
            name = "+".join(storage.names).encode()
            self._kept += [intervals, name]
            region.va, region.size = storage.slot << SLOT_SHIFT, storage.size
            region.host, region.name, region.flags = storage.base, name, storage.flags
            region.number_of_intervals, region.intervals = len(edges) // 2, intervals
        return found


def pack(parameter: dict[str, Any], value: Any, memory: Memory, index: int) -> bytes:
    """The bytes of one parameter, whose declaration is `parameter`."""
    size, kind = parameter["size"], parameter["type"]
    name = f"arg{index}({parameter['name']})"
    flags = 0
    while isinstance(value, (ReadOnly, Uninit)):
        flags |= READ_ONLY if isinstance(value, ReadOnly) else TRACKED
        value = value.buffer
    if isinstance(value, Struct):
        return _filled(_pack_struct(value, memory, name), size, name)
    if parameter["array"]:
        return _filled(_pack_array(value, size, name), size, name)
    if value is None:
        return bytes(size)
    if isinstance(value, PtrTable):
        addresses = [0 if x is None else memory.add(x, name) for x in value.buffers]
        return struct.pack("<Q", memory.add(np.array(addresses, np.uint64), name, READ_ONLY))
    if isinstance(value, DevPtr):
        return struct.pack("<Q", memory.add(value.buffer, name, flags) + value.offset)
    if is_tensor(value) or isinstance(value, np.ndarray):
        if size != 8:
            raise PtxEmuError(f"{name}: a buffer given for a scalar parameter of {size} bytes")
        return struct.pack("<Q", memory.add(value, name, flags))
    return _pack_scalar(kind, size, value, name)


def _filled(content: bytes, size: int, name: str) -> bytes:
    if len(content) > size:
        raise PtxEmuError(f"{name}: {len(content)} bytes for a parameter of {size} bytes")
    return content.ljust(size, b"\0")


def _pack_struct(value: Struct, memory: Memory, name: str) -> bytes:
    out = bytearray()
    for code, item in value.fields:
        if code == "Q" and not isinstance(item, (int, np.integer)):
            if isinstance(item, DevPtr):
                item = memory.add(item.buffer, name) + item.offset
            else:
                item = 0 if item is None else memory.add(item, name)
        out += bytes(-len(out) % struct.calcsize(f"<{code}"))
        out += struct.pack(f"<{code}", item)
    return bytes(out)


def _pack_array(value: Any, size: int, name: str) -> bytes:
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tobytes()
    if isinstance(value, float) and size == 2:
        return np.float16(value).tobytes()
    raise PtxEmuError(f"{name}: a structure takes bytes, a numpy record or Struct")


def _pack_scalar(kind: str, size: int, value: Any, name: str) -> bytes:
    if isinstance(value, (bytes, bytearray)):
        return bytes(value).ljust(size, b"\0")
    if isinstance(value, np.generic) and value.dtype.itemsize == size:
        numbers = value.dtype.kind in "fiub"
        if numbers and (value.dtype.kind == "f" or not kind.startswith("f")):
            return value.tobytes()
    if kind.startswith("f"):
        return struct.pack("<" + FORMATS[kind], float(value))
    if isinstance(value, (float, np.floating)):
        if not kind.startswith("b"):
            raise PtxEmuError(f"{name}: a float given for an integer parameter of type .{kind}")
        return struct.pack(FLOATS_OF_BITS[size], float(value))
    return (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
