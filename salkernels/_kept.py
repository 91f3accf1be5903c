"""What was made on a GPU from recent tensors of the CPU, found again by what those hold.

A mask of pairs comes from the CPU with every call, and from it a list on the GPU. Kept, an equal
mask costs a look-up, and a CUDA graph can hold the call: while one is captured nothing can be
copied from ordinary memory, but the warm-up before it has left the copy here.

**Content.** The key holds every byte of the source, not a hash of it or its address: a mask that
was changed in place, or another one at the same address, is a different key.

**Streams.** A copy is queued on the current stream and does not wait for it, so that no call waits
for the device. It belongs to that stream: another one makes its own, which replaces it. So each
copy is written, read and freed in the order of one stream, as the memory of any tensor is, and
neither an event nor `record_stream` is needed.

**Graphs.** A capture has a stream of its own, and takes the copy of any: `torch.cuda.graph` waits
for the device before it begins, and who uses `capture_begin` has to let its stream wait for that of
the warm-up in any case. The copy lies outside the graph's private pool, which therefore does not
keep it: freed here, its memory could be given to another tensor, and a replay would read that one.
Nothing tells when the last graph has gone. So what a capture was given is kept until the process
ends, some kilobytes for each mask that is captured.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ._torch_private import nobody_looks, raw_stream

MOST = 128  # values: most tables have two
MOST_BYTES = 32 << 20  # of all values and their keys

Value = TypeVar("Value")


class Entry(NamedTuple):
    """A value, the stream it was made on, and its bytes, those of its key included."""

    value: Any
    stream: int
    size: int


class Recent:
    """The values that were asked for last, within bounds.

    Threads may share it, a signal handler may call a loss in the middle of another, and a process
    may fork while a thread is in here.
    """

    def __init__(self, most: int = MOST, most_bytes: int = MOST_BYTES) -> None:
        self.most, self.most_bytes = most, most_bytes
        self.captured: dict[int, Any] = {}  # by identity: kept until the process ends
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._lock = threading.RLock()  # a signal handler runs in the thread that it interrupts
        if hasattr(os, "register_at_fork"):  # a child has no thread that could let go of the lock
            let_go = self._lock.release
            os.register_at_fork(
                before=self._lock.acquire, after_in_parent=let_go, after_in_child=let_go
            )

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes(self) -> int:
        """Of all values and their keys."""
        return sum(entry.size for entry in list(self._entries.values()))

    def get(self, key: Hashable, stream: int, capturing: bool) -> Any:
        """The value of a key for use on a stream; None if there is none."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or not (capturing or entry.stream == stream):
                return None
            with contextlib.suppress(KeyError):  # a signal handler's call has just evicted it
                self._entries.move_to_end(key)
            if capturing:
                self.captured[id(entry.value)] = entry.value
            return entry.value

    def put(self, key: Hashable, value: Any, stream: int, size: int) -> None:
        """Keeps a value, and lets go of the oldest ones beyond the bounds."""
        with self._lock:
            self._entries.pop(key, None)
            if size > self.most_bytes:
                return
            self._entries[key] = Entry(value, stream, size)
            while len(self._entries) > self.most or self.bytes > self.most_bytes:
                self._entries.pop(next(iter(self._entries), None), None)


RECENT = Recent()


def recall(
    what: Hashable,
    source: Tensor,
    device: torch.device,
    make: Callable[[Tensor, torch.device], Value],
    size_of: Callable[[Value], int],
) -> Value:
    """`make(source, device)`, or what it gave for an equal source on the CPU.

    what: all that the value depends on besides the source and the device.

    Raises:
        RuntimeError: a CUDA graph is being captured, and nothing was made from such a source yet.
    """
    if not _keepable(source, device):
        return make(source, device)
    content = _content(source)
    key = (what, device, source.dtype, source.shape, content)
    stream, captured = stream_of(device), torch.cuda.is_current_stream_capturing()
    value: Value | None = RECENT.get(key, stream, captured)
    if value is None:
        if captured:
            raise RuntimeError(_NOT_YET.format(shape=tuple(source.shape), device=device))
        # Made in inference mode it could not be saved for a backward later.
        with torch.inference_mode(False):
            value = make(source, device)
        _allow_notes(value)
        RECENT.put(key, value, stream, len(content) + size_of(value))
    return value


def _allow_notes(value: object) -> None:
    for part in value if isinstance(value, tuple) else (value,):
        if isinstance(part, Tensor):
            part.salkernels_notes = {}  # type: ignore[attr-defined]


def notes_of(tensor: Tensor) -> dict[Hashable, Any] | None:
    """What kernels made of a tensor that never changes, by a name that says what, for its stream.

    It lives as long as the tensor. None: the tensor is not ours, and may change.
    """
    return getattr(tensor, "salkernels_notes", None)


def find(key: Hashable, device: torch.device) -> Any:
    """What `keep` was given for this key, if that was on the current stream; else None.

    While a CUDA graph is captured, on any stream: what is found is kept until the process ends.
    """
    if not _has_streams(device):
        return RECENT.get(key, 0, False)
    return RECENT.get(key, stream_of(device), torch.cuda.is_current_stream_capturing())


def keep(key: Hashable, device: torch.device, value: object, size: int) -> None:
    """Keeps a value whose memory is of this stream; not if that is of a CUDA graph."""
    if not _has_streams(device):
        RECENT.put(key, value, 0, size)
    elif not torch.cuda.is_current_stream_capturing():
        RECENT.put(key, value, stream_of(device), size)


def one(like: Tensor) -> Tensor:
    """1 as a tensor () of the dtype of another and on its device: made anew it is a launch."""
    device = like.device
    if not (device.type == "cpu" or _has_streams(device)):
        return like.new_ones(())
    stream = stream_of(device) if _has_streams(device) else 0
    key, captured = ("one", device, like.dtype), capturing(device)
    value: Tensor | None = RECENT.get(key, stream, captured)
    if value is None:
        with torch.inference_mode(False):
            value = like.new_ones(())
        if not captured:  # there it is a node of the graph, and its memory the graph's
            RECENT.put(key, value, stream, value.nbytes)
    return value


_NOT_YET = (
    "a CUDA graph is being captured, and a table or list {shape} on the CPU, which says what forms "
    "a pair, has not been used on {device} yet: a graph cannot hold its copy. Call the loss once "
    "with the same one before the capture, as warm-ups do, or keep it on the GPU"
)


def _keepable(source: Tensor, device: torch.device) -> bool:
    """Whether the source's values are there to be read, and nobody records what is done to it."""
    return (
        type(source) is Tensor
        and source.is_cpu
        and not torch.compiler.is_compiling()
        and _has_streams(device)
        and not source.requires_grad
        and nobody_looks(source)
    )


@cache
def _has_streams(device: torch.device) -> bool:
    return device.type == "cuda"


def stream_of(device: torch.device) -> int:
    """The current stream of a GPU."""
    return raw_stream(device)


def capturing(device: torch.device) -> bool:
    """Whether what is queued now goes into a CUDA graph."""
    return (
        not torch.compiler.is_compiling()
        and _has_streams(device)
        and torch.cuda.is_current_stream_capturing()
    )


def _content(source: Tensor) -> bytes:
    if source.dtype == torch.bfloat16:  # NumPy has none
        source = source.view(torch.int16)
    return source.numpy().tobytes()
