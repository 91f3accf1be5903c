"""What nvcc makes of the CUDA kernels: registers and spills, and the PTX run on an emulator.

The emulator (`../shared/tools/ptxemu`, if it is there) checks every access of the PTX for sm_80:
bounds, alignment, races, memory that was never written, barriers that some threads miss.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_on_host import LARGE, compare, maps

from benchmarks import cuda_emulation, traffic

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "buildtools"))
FILES = ("forward", "backward")
# Kernels that must leave room for a second block of 256 threads on a multiprocessor.
AT_MOST_128_REGISTERS = re.compile("match_(fp32|tf32|bf16|fp16)")


def _ptxas_log(name: str) -> str:
    """What `ptxas -v` says of one file for every architecture; kept until a source changes."""
    import salkernels_nvcc as nvcc

    default = [a._replace(ptx=False) for a in nvcc.parse(nvcc.DEFAULT)]
    targets = [flag for a in default if (a.major, a.minor) in nvcc.known() for flag in a.flags()]
    cuda = ROOT / "csrc" / "cuda"
    digest = hashlib.sha256(" ".join([nvcc.version(), *nvcc.FLAGS, *targets]).encode())
    for source in sorted([*cuda.iterdir(), ROOT / "csrc" / "geometry.h"]):
        digest.update(source.read_bytes())
    log = ROOT / "build" / "ptxas" / f"{name}-{digest.hexdigest()[:16]}.txt"
    if not log.is_file():
        log.parent.mkdir(parents=True, exist_ok=True)
        command = ["nvcc", *nvcc.FLAGS, *targets, "-Xptxas=-v", "-c", str(cuda / f"{name}.cu")]
        run = subprocess.run(
            [*command, "-o", str(log.with_suffix(".o"))], capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        log.with_suffix(".o").unlink()
        log.write_text(run.stdout + run.stderr, encoding="utf-8")
    return log.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def resources() -> dict[tuple[str, int], tuple[int, int, int]]:
    """(kernel, architecture) -> registers, bytes of stack, bytes spilled."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH")
    with ThreadPoolExecutor(2) as pool:
        text = "\n".join(pool.map(_ptxas_log, FILES))
    found = {}
    for part in text.split("Compiling entry function ")[1:]:
        name, architecture = re.match(r"'salkernels_(\w+)' for 'sm_(\d+)\w*'", part).groups()
        stack, stores, loads = map(
            int,
            re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
            ).groups(),
        )
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        found[name, int(architecture)] = registers, stack, stores + loads
    return found


@pytest.mark.slow
def test_no_kernel_spills_registers_on_any_architecture(resources):
    plan = (ROOT / "csrc" / "cuda" / "plan.h").read_text(encoding="utf-8")
    names = set(re.findall(r"^ +X\((\w+),", plan, flags=re.MULTILINE))
    assert {name for name, _ in resources} == names, "every instantiation is looked at"
    assert len(resources) == len(names) * len({architecture for _, architecture in resources})
    spilled = {key: value for key, value in resources.items() if value[1:] != (0, 0)}
    assert not spilled, "(kernel, architecture): (registers, stack, spilled)"
    many = {
        key: value[0]
        for key, value in resources.items()
        if AT_MOST_128_REGISTERS.match(key[0]) and value[0] > 128
    }
    assert not many


@pytest.fixture(scope="module")
def compiled():
    reason = cuda_emulation.ptx_obstacle()
    if reason is not None:
        pytest.skip(f"the PTX cannot be run: {reason}")
    from benchmarks import traffic_cuda

    return traffic_cuda.kernels()


@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
@pytest.mark.parametrize("shape", [row[0] for row in LARGE], ids=[row[1] for row in LARGE])
def test_ptx_of_every_way_to_tile(shape, layout, compiled):
    groups, queries, keys, channels, height, width, window = shape
    query = maps(groups, queries, channels, height, width, layout=layout)
    key = maps(groups, keys, channels, height, width, layout=layout) if keys else None
    mask = torch.rand(groups, queries, keys or queries) < 0.4
    if mask.numel() > 1000:
        mask = mask.triu(-1) & mask.tril(1)  # the emulator takes its time
    compare(compiled, query, key, mask, window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [LARGE[i][0] for i in (1, 2, 7)], ids=str)
def test_ptx_of_other_dtypes(shape, dtype, compiled):
    groups, queries, keys, channels, height, width, window = shape
    query = maps(groups, queries, channels, height, width, dtype=dtype)
    key = maps(groups, keys, channels, height, width, dtype=dtype) if keys else None
    compare(compiled, query, key, None, window)


def test_ptx_of_tf32(compiled):
    from benchmarks.cuda_emulation import CompiledKernels

    kernels = CompiledKernels.__new__(CompiledKernels)
    kernels.__dict__.update(compiled.__dict__, allow_tf32=True, stats=[])
    query = maps(1, 6, 64, 4, 8)
    arguments = (query, None, None, (2, 2), 1e-12, 36)
    exact, rounded = (k.pair_losses_forward(*arguments)[2] for k in (compiled, kernels))
    assert 1e-7 < (exact - rounded).abs().max() < 2e-3, "one tf32 product holds 11 bits"
    assert all("tf32" in s["kernel"] for s in kernels.stats if "match" in s["kernel"])


def test_each_feature_is_read_once_and_each_gradient_written_once(compiled):
    """At the paper's windows: 32 samples of 384 channels, channels-last."""
    from benchmarks import traffic_cuda

    forward, backward = traffic_cuda.run(traffic.CASES[0])
    assert forward.error < 1e-6
    assert backward.error < 1e-6
    # What is above 1 are matches and pair numbers.
    assert forward.unique_read <= 1.05
    assert backward.unique_read <= 1.05
    assert backward.unique_written <= 1.01
    assert forward.load_efficiency >= 0.9
    assert backward.store_efficiency >= 0.99
    assert forward.shared_conflicts <= 0.02


def test_the_traffic_table_holds_all_providers_side_by_side(tmp_path):
    row = traffic.Row("a", traffic.CASES[0].key, "backward", "k", 1, *[1.0] * 6, 1, 1e-7)
    traffic.write_rows("a", [row], tmp_path)
    other = traffic.Row("b", traffic.CASES[0].key, "forward", "k", 1, *[1.0] * 6, 1, 1e-7)
    traffic.write_rows("b", [other], tmp_path)
    lines = (tmp_path / "traffic.md").read_text(encoding="utf-8").splitlines()
    assert [line[:4] for line in lines[-2:]] == ["| b ", "| a "], "the forward comes first"
