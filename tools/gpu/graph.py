"""What a training loop does around the loss: graphs, streams, compile, autocast, repeats."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import salkernels
from benchmarks.cases import PAPER, QUICK, sample_pairs
from benchmarks.clock import cuda_queue

from .record import Context

REPEATS = 50
MANY = 100  # masks: more than the package keeps lists of
Gradient = Callable[[Tensor], Tensor]


def graph(context: Context) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(8, 32, 8, 8, generator=generator).to(context.device)
    features = features.contiguous(memory_format=torch.channels_last).requires_grad_()
    pairs = ~torch.eye(8, dtype=torch.bool)
    for name in context.backends:
        _Checks(context, name, features, pairs).run()


class _Checks:
    """All of one backend, against its own gradient in a plain call."""

    def __init__(self, context: Context, name: str, features: Tensor, pairs: Tensor) -> None:
        self.context, self.name, self.features, self.pairs = context, name, features, pairs

    def gradient(self, pairs: Tensor) -> Tensor:
        loss = salkernels.wla_set_loss(self.features, pairs, 2, backend=self.name)
        return torch.autograd.grad(loss, self.features)[0]

    def run(self) -> None:
        checks: dict[str, Callable[[], bool]] = {}
        if self.context.on_gpu:
            for where in ("cuda", "cpu"):
                checks[f"graph, mask on {where}"] = functools.partial(self._captured, where)
            checks["graph, mask not seen before"] = self._unseen
            checks["graph, mask changed later"] = self._changed_later
            checks["side stream"] = self._on_a_side_stream
        checks["repeats"] = self._repeats
        checks["autocast"] = self._under_autocast
        checks["compile"] = self._compiled
        for what, check in checks.items():
            label = f"{what}, {self.name}"
            if label in self.context.finished:
                continue
            self.context.need(2, label)
            with self.context.measuring(label, backend=self.name, what=what) as row:
                row["ok"] = check()

    def _same(self, gradient: Tensor, expected: Tensor | None = None) -> bool:
        expected = self.gradient(self.pairs) if expected is None else expected
        return torch.allclose(gradient, expected, rtol=1e-5, atol=1e-7)

    def _graph(self, pairs: Tensor) -> Callable[[], Tensor]:
        """Forward and backward in a graph, after calls that warm up; its replay."""
        found: list[Tensor] = []
        replay = cuda_queue().capture(lambda: found.append(self.gradient(pairs)))

        def replayed() -> Tensor:
            found[-1].zero_()
            replay()
            torch.cuda.synchronize()
            return found[-1]

        return replayed

    def _captured(self, where: str) -> bool:
        """With the table of pairs on either side."""
        return self._same(self._graph(self.pairs.to(where))())

    def _unseen(self) -> bool:
        """A mask on the CPU that no call has used yet: a capture says what to do, and no more."""
        mask = _mask(MANY + self.context.backends.index(self.name))
        try:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                self.gradient(mask)
        except RuntimeError as error:
            told = "before the capture" in str(error)
        else:
            told = False
        return told and self._same(self._graph(mask)(), self.gradient(mask.to(self.context.device)))

    def _changed_later(self) -> bool:
        """Changed in place, a mask on the CPU is a new one to a call; a replay has the old list,
        which it still finds when many other masks have come and gone."""
        mask = self.pairs.clone()
        old = self.gradient(mask)
        replayed = self._graph(mask)
        mask[:, 0] = False
        new = self.gradient(mask)
        for seed in range(MANY):
            self.gradient(_mask(seed))
        right = self._same(new, self.gradient(mask.to(self.context.device)))
        return right and not self._same(new, old) and self._same(replayed(), old)

    def _on_a_side_stream(self) -> bool:
        """While the stream is still busy: whoever launches on another one reads too early."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            cuda_queue().spin(0.02)
            found = self.gradient(self.pairs)
        stream.synchronize()
        return self._same(found)

    def _compiled(self) -> bool:
        pairs = self.pairs.to(self.context.device)

        def loss(x: Tensor) -> Tensor:
            return salkernels.wla_set_loss(x, pairs, 2, backend=self.name)

        # A rehearsal is not to wait for a C++ compiler.
        how = "inductor" if self.context.on_gpu else "aot_eager"
        compiled = torch.compile(loss, fullgraph=True, backend=how)
        return self._same(torch.autograd.grad(compiled(self.features), self.features)[0])

    def _under_autocast(self) -> bool:
        with torch.autocast(self.context.device, torch.bfloat16):
            loss = salkernels.wla_set_loss(
                self.features.bfloat16(), self.pairs, 2, backend=self.name
            )
        return loss.dtype == torch.float32

    def _repeats(self) -> bool:
        """The same bits, many times, at the size of a real call."""
        case = PAPER if self.context.on_gpu else QUICK
        features, pairs = case.problem(self.context.device).features, sample_pairs(case.samples)

        def once() -> tuple[Tensor, Tensor]:
            loss = salkernels.wla_set_loss(features, pairs, 2, reduction="none", backend=self.name)
            return loss.detach(), torch.autograd.grad(loss.sum(), features)[0]

        first = once()
        for _ in range(REPEATS if self.context.on_gpu else 2):
            if not all(torch.equal(a, b) for a, b in zip(first, once(), strict=True)):
                return False
        return True


def _mask(seed: int) -> Tensor:
    """Pairs of eight samples."""
    return torch.rand(8, 8, generator=torch.Generator().manual_seed(seed)) < 0.5
