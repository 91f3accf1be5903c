"""Time on a GPU: device time and host time, measured separately.

A call that is timed on an idle GPU is charged for the host, too: the device waits between kernels
until the next one has been queued. So the device is kept busy until all of the call is in its
queue, and its time is that between events in the queue; the host's time is how long queueing took.
Before each call the second-level cache is emptied, since no training step finds its features there.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple, Protocol

import torch

FIRST_LEAD, LONGEST_LEAD = 2e-3, 60e-3  # seconds that the device is kept busy beforehand
FLUSH_BYTES = 256 << 20  # five times the cache of an H100
CALIBRATION = 20_000_000  # cycles of the busy kernel
Mark = Callable[[], None]


class Event(Protocol):
    """A point in the device's queue."""

    def reached(self) -> bool: ...

    def since(self, other: Event) -> float:
        """Seconds from `other` to this one."""
        ...


class Queue(Protocol):
    """A device that works through a queue while the host goes on."""

    def now(self) -> float:
        """The host's clock, seconds."""
        ...

    def mark(self) -> Event: ...

    def flush(self) -> None:
        """Queues work that evicts the features from the cache."""
        ...

    def spin(self, seconds: float) -> None:
        """Queues work that takes about this long."""
        ...

    def synchronise(self) -> None: ...

    def capture(self, run: Callable[[], object]) -> Callable[[], None]:
        """Captures `run` as a graph and returns its replay; raises if it cannot be captured."""
        ...


class Round(NamedTuple):
    """One call, divided into parts by its marks.

    Args:
        device: seconds of each part on the device.
        host: seconds that the host took to queue each part.
        queued: whether the device was still busy when all was queued. If not, `device` contains
            the host's pauses: the call waits for the device, or takes very long to queue.
    """

    device: list[float]
    host: list[float]
    queued: bool


class Stopwatch:
    """Times calls of one kind; learns how long the device has to be kept busy for them."""

    def __init__(self, queue: Queue, lead: float = FIRST_LEAD) -> None:
        self.queue, self.lead = queue, lead
        self.waits = False  # whether even the longest lead was not enough

    def time(self, run: Callable[[Mark], object]) -> Round:
        """`run(mark)` calls `mark` between its parts; its beginning and end are marked here."""
        while True:
            found = self._once(run)
            if found.queued or self.waits:
                return found
            self.waits = self.lead >= LONGEST_LEAD
            # A call that waits for the device takes as long as any lead: then none is of use.
            longer = max(2 * self.lead, 2 * sum(found.host))
            self.lead = 0.0 if self.waits else min(longer, LONGEST_LEAD)

    def _once(self, run: Callable[[Mark], object]) -> Round:
        queue = self.queue
        queue.synchronise()
        queue.flush()
        if self.lead:
            queue.spin(self.lead)
        events: list[Event] = []
        times: list[float] = []

        def mark() -> None:
            events.append(queue.mark())
            times.append(queue.now())

        mark()
        result = run(mark)
        mark()
        queued = not events[0].reached()
        queue.synchronise()
        del result
        return Round(
            [b.since(a) for a, b in itertools.pairwise(events)],
            [b - a for a, b in itertools.pairwise(times)],
            queued,
        )


def replay_seconds(queue: Queue, run: Callable[[], object], rounds: int = 10) -> float:
    """Median seconds of the device for `run` as a captured graph, the cache emptied before each.

    Raises:
        RuntimeError: it cannot be captured, because it waits for the device, say.
    """
    replay = queue.capture(run)
    replay()
    watch = Stopwatch(queue)
    return median(sum(watch.time(lambda mark: replay()).device) for _ in range(rounds))


class CudaEvent:
    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def reached(self) -> bool:
        return bool(self.event.query())

    def since(self, other: Event) -> float:
        assert isinstance(other, CudaEvent)
        return float(other.event.elapsed_time(self.event)) / 1e3


class CudaQueue:
    """The current stream of the current GPU."""

    def __init__(self) -> None:
        self.buffer = torch.zeros(FLUSH_BYTES // 4, device="cuda")
        self.sink = torch.zeros((), device="cuda")
        self.flush()
        # The first call loads the kernel, and an idle device takes a while to reach its clock.
        self._cycles(5 * CALIBRATION)
        start = self.mark()
        self._cycles(CALIBRATION)
        end = self.mark()
        self.synchronise()
        self.cycles_per_second = CALIBRATION / end.since(start)

    def now(self) -> float:
        return time.perf_counter()

    def mark(self) -> CudaEvent:
        return CudaEvent()

    def flush(self) -> None:
        """Reads, and does not write: lines that wait to be written back would cost bandwidth
        during the call."""
        torch.sum(self.buffer, dim=0, out=self.sink)

    def spin(self, seconds: float) -> None:
        self._cycles(int(seconds * self.cycles_per_second))

    def _cycles(self, count: int) -> None:
        torch.cuda._sleep(count)

    def synchronise(self) -> None:
        torch.cuda.synchronize()

    def capture(self, run: Callable[[], object]) -> Callable[[], None]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        kept: list[object] = []  # the graph writes there
        with torch.cuda.graph(graph):
            kept.append(run())

        def replay() -> None:
            assert kept
            graph.replay()

        return replay


class HostQueue:
    """A CPU as a device whose work is done as soon as it is queued."""

    def now(self) -> float:
        return time.perf_counter()

    def mark(self) -> Event:
        return HostEvent(time.perf_counter())

    def flush(self) -> None:
        pass

    def spin(self, seconds: float) -> None:
        pass

    def synchronise(self) -> None:
        pass

    def capture(self, run: Callable[[], object]) -> Callable[[], None]:
        raise RuntimeError("a CPU has no graphs to capture")


class HostEvent:
    def __init__(self, at: float) -> None:
        self.at = at

    def reached(self) -> bool:
        return False  # nothing runs ahead of the host: no lead is needed

    def since(self, other: Event) -> float:
        assert isinstance(other, HostEvent)
        return self.at - other.at


@functools.cache
def cuda_queue() -> CudaQueue:
    """Shared by all cases, so that its buffer and its calibration are made once."""
    return CudaQueue()


def queue_for(device: str | torch.device) -> Queue:
    return cuda_queue() if torch.device(device).type == "cuda" else HostQueue()
