"""Triton kernels without a GPU: compiled for sm_80, and their PTX run on `tools.ptxemu`.

    python -m tools.ptx.triton_kernels          # two dozen inputs against the definition, as JSON
    python -m tools.ptx.triton_kernels 10 13    # of these the ones with such numbers, from 0 on

The emulator executes the PTX instruction by instruction, checks every access, and counts
instructions and memory traffic.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from salkernels import reference
from salkernels.backends import triton as backend
from salkernels.reference import Outputs
from tools import ptxemu

CAPABILITY = 80
EPS = 1e-12


def obstacle() -> str | None:
    """Why PTX cannot be compiled and run, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if backend.INTERPRETED:
        return "TRITON_INTERPRET=1 is set: the kernels belong to the interpreter"
    return ptxemu.obstacle()


@dataclass
class Emulator:
    """Runs launches; `stats` holds their counters."""

    stats: list[Any] = field(default_factory=list)
    modules: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def instead_of_a_gpu(self) -> Iterator[None]:
        """Every Triton launch inside runs here, on CPU tensors."""
        from . import offline

        with offline.recorded(CAPABILITY, self.run):
            yield

    def run(self, item: Any) -> None:
        from . import offline

        variant = (item.name, item.constants(), item.signature(), item.hints(), item.warps)
        key = repr((*variant, item.stages, item.registers))
        if key not in self.modules:
            compiled = offline.compile_launch(item, CAPABILITY)
            self.modules[key] = ptxemu.Module(compiled.ptx), compiled.shared_bytes
        module, shared_bytes = self.modules[key]
        arguments = [
            *item.values().values(),
            None,
            None,
        ]  # scratch memory that no kernel here takes
        stats = module.launch(item.name, item.grid, 32 * item.warps, arguments, shared_bytes)
        self.stats.append(stats)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        pairs: Tensor | None,
        valid: Tensor | None,
        window: tuple[int, int],
    ) -> Outputs:
        from salkernels.triton_kernels import launch

        found = backend.outputs(query, key, pairs, window)
        for tensor in found:
            tensor.fill_(77)  # all of it is written
        with self.instead_of_a_gpu():
            launch.forward(launch.Problem(query, key, pairs, valid, window, EPS), *found)
        return found

    def backward(
        self,
        grad_sim: Tensor,
        query: Tensor,
        key: Tensor | None,
        pairs: Tensor | None,
        valid: Tensor | None,
        window: tuple[int, int],
        outputs: Outputs,
    ) -> tuple[Tensor, Tensor | None]:
        from salkernels.triton_kernels import launch

        grads = [torch.full_like(x, torch.nan) for x in (query, key) if x is not None]
        grad_key = None if key is None else grads[1]
        problem = launch.Problem(query, key, pairs, valid, window, EPS)
        with self.instead_of_a_gpu():
            launch.backward(problem, grad_sim, *outputs[1:], grads[0], grad_key)
        return grads[0], grad_key


def upstream(max_sim: Tensor) -> Tensor:
    """A gradient of the maxima, as they lie."""
    noise = torch.randn(max_sim.shape, generator=torch.Generator().manual_seed(1))
    return torch.empty_like(max_sim).copy_(noise)


def errors(
    emulator: Emulator,
    query: Tensor,
    key: Tensor | None,
    pairs: Tensor | None,
    valid: Tensor | None,
    window: tuple[int, int],
) -> dict[str, float]:
    """Against the definition: the largest error of the forward, the relative one of gradients."""
    outputs = emulator.forward(query, key, pairs, valid, window)
    wide = query.double(), None if key is None else key.double()
    expected = reference.match(*wide, pairs, valid, window, EPS)
    found = {
        "loss": largest(outputs.loss, expected.loss),
        "max_sim": largest(outputs.max_sim, expected.max_sim),
        "argmax": largest(outputs.argmax, expected.argmax),
    }
    grad_sim = upstream(outputs.max_sim)
    actual = emulator.backward(grad_sim, query, key, pairs, valid, window, outputs)
    call = (*wide, pairs, valid, *expected[1:], window, EPS)
    wanted = reference.match_backward(grad_sim.double(), *call)
    for name, a, b in zip(("grad_query", "grad_key"), actual, wanted, strict=True):
        if a is not None and b is not None:
            found[name] = float((a.double() - b).norm() / b.norm().clamp_min(1e-300))
    return found


def largest(actual: Tensor, expected: Tensor) -> float:
    """Of the differences."""
    if actual.numel() == 0:
        return 0.0
    return float((actual.double() - expected.double()).abs().max())


@dataclass(frozen=True)
class Input:
    """An input of the operator."""

    shape: tuple[int, int, int, int, int, int]  # groups, queries, keys (0: set form), C, H, W
    window: tuple[int, int]
    dtype: str = "float32"
    layout: str = "channels_last"
    density: float = 1.0  # of the pairs; 1 is no list of them at all
    valid: float = 1.0  # share of the pixels that are; 1 is all, unsaid
    room: int = 0  # rows of the list that are left over

    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """query, key, pairs and valid; what is not valid holds NaN."""
        groups, queries, keys, channels, height, width = self.shape
        generator = torch.Generator().manual_seed(0)
        nodes = (groups, queries + keys, height, width)
        valid = torch.rand(nodes, generator=generator) < self.valid

        def maps(first: int, samples: int) -> Tensor:
            x = torch.randn(groups, samples, channels, height, width, generator=generator)
            x = x.to(getattr(torch, self.dtype))
            x.masked_fill_(~valid[:, first : first + samples, None], torch.nan)
            if self.layout == "channels_last":
                return x.movedim(2, -1).contiguous().movedim(-1, 2)
            return x if self.layout == "nchw" else x.mT.contiguous().mT

        query, key = maps(0, queries), maps(queries, keys) if keys else None
        chosen = torch.rand(groups * queries * (keys or queries), generator=generator)
        pairs = (chosen < self.density).nonzero().squeeze(1)
        pairs = torch.cat([pairs, pairs.new_full((self.room,), -1)])
        listed = None if self.density == 1 else pairs
        return query, key, listed, None if self.valid == 1 else valid


INPUTS = (
    Input((1, 16, 0, 64, 12, 12), (2, 2), density=0.4),
    Input((1, 40, 0, 48, 5, 7), (2, 2), density=0.1),  # several tiles, ragged
    Input((1, 20, 0, 24, 4, 5), (2, 2), density=0.3),  # two tiles that pairs join
    Input((2, 24, 0, 64, 4, 4), (2, 2), "bfloat16", density=0.4),
    Input((1, 10, 0, 33, 7, 9), (3, 4), layout="nchw", density=0.5),  # nothing divides anything
    Input((1, 5, 0, 20, 9, 8), (6, 5), layout="transposed"),
    Input((9, 1, 1, 64, 6, 6), (2, 2)),  # pairs, many groups in a tile
    Input((2, 3, 4, 24, 7, 6), (3, 3), density=0.6),
    Input((1, 30, 25, 16, 4, 4), (2, 2), density=0.1),  # queries and keys in several tiles
    Input((1, 40, 0, 16, 2, 3), (1, 1), density=0.3),
    Input((1, 3, 0, 40, 13, 11), (13, 11), density=0.6),  # streamed
    Input((2, 2, 1, 24, 12, 9), (9, 9), layout="nchw"),  # streamed, ragged
    Input((1, 16, 0, 64, 6, 6), (3, 3), "bfloat16", density=0.4),
    Input((3, 2, 2, 40, 5, 6), (2, 3), "float16"),
    Input((1, 3, 0, 64, 12, 12), (12, 12), "bfloat16"),
    # Some pixels take no part, and some rows of the list are left over.
    Input((1, 16, 0, 64, 12, 12), (2, 2), density=0.4, valid=0.6, room=3),
    Input((1, 40, 0, 48, 5, 7), (2, 2), density=0.1, valid=0.5, room=20),
    Input((9, 1, 1, 64, 6, 6), (2, 2), density=0.5, valid=0.7, room=1),
    Input((2, 3, 4, 24, 7, 6), (3, 3), "float16", valid=0.4),
    Input((1, 16, 0, 64, 6, 6), (3, 3), "bfloat16", density=0.4, valid=0.5),
    Input((2, 2, 1, 24, 12, 9), (9, 9), layout="nchw", density=0.7, valid=0.6, room=2),
    Input((1, 3, 0, 64, 12, 12), (12, 12), "bfloat16", valid=0.5),
)


def main() -> None:
    reason = obstacle()
    if reason is not None:
        sys.exit(reason)
    parser = argparse.ArgumentParser("python -m tools.ptx.triton_kernels")
    numbers = range(len(INPUTS))
    parser.add_argument("numbers", nargs="*", type=int, choices=numbers, metavar="NUMBER")
    emulator = Emulator()
    for number in parser.parse_args().numbers or numbers:
        item = INPUTS[number]
        row = {
            "input": repr(item),
            "dtype": item.dtype,
            **errors(emulator, *item.tensors(), item.window),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
