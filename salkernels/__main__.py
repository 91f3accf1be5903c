"""`python -m salkernels`: versions, devices and backends, for a first look and for bug reports."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from . import __version__, _native, _shadow, backends
from .backends import cuda

OPTIONAL = ("triton", "numpy", "nibabel", "monai", "safetensors", "tensorboard", "jsonargparse")


def report() -> str:
    """The whole report as text."""
    lines = [
        f"salkernels {__version__} in {_shadow.HERE}",
        f"python     {platform.python_version()} on {platform.platform()}",
        f"torch      {torch.__version__} (CUDA {torch.version.cuda or 'not in this build'})",
    ]
    lines += [f"{name:10} {_version(name)}" for name in OPTIONAL]
    lines.append(
        f"CPU        {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    )
    lines += [f"GPU {i:<6} {_device(i)}" for i in range(torch.cuda.device_count())]
    if torch.cuda.device_count() == 0:
        lines.append("GPU        none visible to torch")
    lines.append(f"CUDA code  {cuda.built_for() or 'not built'}")
    lines += ["", "backends, in order of preference:"]
    lines += [f"  {status}" for status in backends()]
    if hint := _native.rebuild_hint():
        lines += ["", hint]
    if found := _shadow.hidden():
        lines += ["", f"warning: {_shadow.explanation(found)}"]
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _device(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    capability = f"sm_{properties.major}{properties.minor}"
    return f"{properties.name}, {capability}, {properties.total_memory / 2**30:.1f} GiB"


if __name__ == "__main__":
    print(report())
