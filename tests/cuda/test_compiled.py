"""What nvcc makes of the CUDA kernels: registers and spills, and the PTX run on an emulator.

The emulator (`tools/ptxemu`) checks every access of the PTX for sm_80: bounds, alignment, races,
memory that was never written, barriers that some threads miss.
"""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from against_reference import (
    SHAPE_NAMES,
    SHAPES,
    compare,
    compare_mean,
    features,
    maps,
    some_pairs,
    valid_pixels,
)

from tools.ptx.cuda_kernels import CompiledKernels
from tools.traffic import cuda as traffic_cuda
from tools.traffic import table as traffic

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "buildtools"))
FILES = ("forward", "backward")
# Kernels that must leave room for a second block of 256 threads on a multiprocessor. Not
# match_fp32: its three products take operands in two parts, and within 128 registers it spills.
AT_MOST_128_REGISTERS = re.compile("match_(tf32|bf16|fp16)|gradient_(tile|rows)")


def _ptxas_log(name: str) -> str:
    """What `ptxas -v` says of one file for every architecture: to the build of the installed
    library, or here if that was another one."""
    import salkernels_nvcc as nvcc

    wanted = [a._replace(ptx=False) for a in nvcc.parse(nvcc.DEFAULT)]
    wanted = [a for a in wanted if (a.major, a.minor) in nvcc.known()]
    source = f"csrc/cuda/{name}.cu"
    log = nvcc.resource_log(ROOT, source, wanted)
    if not log.is_file():
        log.parent.mkdir(parents=True, exist_ok=True)
        targets = [flag for a in wanted for flag in a.flags()]
        command = ["nvcc", *nvcc.FLAGS, *targets, "-Xptxas=-v", "-c", str(ROOT / source)]
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
    return traffic_cuda.kernels()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_NAMES)
def test_ptx_of_every_way_to_tile(shape, layout, compiled):
    query, key, window = features(shape, layout=layout)
    compare(compiled, query, key, some_pairs(query, key, left_over=1), None, window)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["some", "windows", "samples"])
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_NAMES)
def test_ptx_where_pixels_take_no_part(shape, kind, compiled):
    query, key, window = features(shape)
    valid = valid_pixels(query, key, window, kind)
    compare(compiled, query, key, some_pairs(query, key, left_over=1), valid, window)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [SHAPES[i] for i in (1, 2, 7)], ids=str)
def test_ptx_of_other_dtypes(shape, masked, dtype, compiled):
    query, key, window = features(shape, dtype=dtype)
    valid = valid_pixels(query, key, window, "some") if masked else None
    compare(compiled, query, key, None, valid, window)


@pytest.mark.parametrize("window", [(2, 2), (12, 12)])
def test_ptx_loads_no_pixel_that_takes_no_part(window, compiled):
    """Not a sector of a sample of which no pixel is valid, in either direction."""
    query = maps(1, 8, 256, 12, 12)
    valid = torch.ones(1, 8, 12, 12, dtype=torch.bool)
    read = []
    for _ in range(2):
        compiled.stats.clear()
        compare(compiled, query, None, None, valid, window)
        read.append({s["kernel"]: s["global_ld"]["sectors"] for s in compiled.stats})
        valid[:, 4:] = False
    whole, half = read
    readers = {kernel for kernel in whole if re.search("match|norms|stream|gradient", kernel)}
    assert len(readers) == (2 if window == (2, 2) else 3)
    assert not {
        kernel: (half[kernel], whole[kernel])
        for kernel in readers
        if half[kernel] > 0.6 * whole[kernel]
    }


def test_ptx_of_both_directions_of_a_pair_by_one_block(compiled):
    """Windows of 2 x 2 tiles. The pairs (0, 1) and (1, 0) share their products where there is
    enough to do without; (2, 1) and (2, 2) have their own."""
    query = maps(1, 3, 64, 12, 12)
    pairs = torch.tensor([1, 3, 7, 8])
    products = []
    for room in (0, 1024):
        compiled.stats.clear()
        listed = torch.cat((pairs, pairs.new_full((room,), -1)))
        compare(compiled, query, None, listed, None, (12, 12))
        streamed = next(s for s in compiled.stats if "stream" in s["kernel"])
        products.append(sum(executed for executed, _ in streamed["mma"].values()))
    assert products[1] == 0.75 * products[0]


def test_ptx_of_gradients_of_any_kind(compiled):
    for window in ((2, 2), (6, 8)):
        query = maps(1, 5, 24, 6, 8)
        grad_sim = torch.zeros(25, 6, 8)
        compare(compiled, query, None, None, None, window, grad_sim)
        grad_sim[3, 2:5] = 1e3
        grad_sim[7, 1, 1] = torch.nan
        compare(compiled, query, None, None, None, window, grad_sim)


def test_ptx_of_tf32(compiled):
    kernels = CompiledKernels(allow_tf32=True, modules=compiled.modules)
    query = maps(1, 6, 64, 4, 8)
    arguments = (query, None, None, None, (2, 2), 1e-12)
    exact, rounded = (k.match(*arguments).max_sim for k in (compiled, kernels))
    assert 1e-7 < (exact - rounded).abs().max() < 2e-3, "one tf32 product holds 11 bits"
    assert all("tf32" in s["kernel"] for s in kernels.stats if "match" in s["kernel"])
    assert any("match" in s["kernel"] for s in kernels.stats)


def test_each_feature_is_read_once_and_each_gradient_written_once(compiled):
    """At the paper's windows: 32 samples of 384 channels, channels-last."""
    forward, backward = traffic_cuda.run(traffic.CASES[0])
    assert forward.error < 1e-6
    assert backward.error < 1e-6
    # What is above 1 are matches and pair numbers. The backward reads the gradient, the maximum
    # and the place of each, 9 bytes for each pair and pixel; of these it writes two terms of 8
    # bytes, and reads them again.
    case = traffic.CASES[0]
    matches = case.num_pairs * case.height * case.width / case.feature_bytes
    assert forward.unique_read <= 1.05
    assert backward.unique_read <= 1.02 + (9 + 16) * matches <= 1.16
    assert backward.unique_written <= 1.01 + 16 * matches <= 1.1
    assert forward.load_efficiency >= 0.9
    # Gradients fill sectors. Terms are 8 bytes, sorted by the row they belong to: each in a sector
    # of its own, all stores would come to (1 + 16 matches) / (1 + 64 matches) = 0.80.
    assert backward.store_efficiency >= 0.85
    # Pairs are taken from a list, so lanes that look for the best of different pairs read cosines
    # of different rows, some on one bank: 0.066 of the requests.
    assert forward.shared_conflicts <= 0.08


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 5, 0, 40, 4, 5, (2, 2)), (2, 2, 3, 16, 4, 6, (4, 4))])
def test_ptx_of_the_mean(shape, dtype, compiled):
    query, key, window = features(shape, dtype=dtype)
    compare_mean(compiled, query, key, some_pairs(query, key, 0.6, left_over=1), window)
