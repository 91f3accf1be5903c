"""Random inputs through every backend that can run, against the reference in float64.

The default run is short and the same for everyone. A long one (minutes), with another seed every
time unless one is given:

    pytest tests/fuzz -s --hypothesis-profile=nightly [--hypothesis-seed=N]

The CPU kernel has three instruction sets: SALKERNELS_CPU_ISA=avx2 or baseline runs the others.
"""

from __future__ import annotations

from fuzz_check import COMPARED, check
from fuzz_inputs import inputs
from hypothesis import HealthCheck, given, settings
from targets import runs_on

COMPARABLE = 0.5  # share of pixels whose gradients must have been compared, at least
# Inputs are large structures: hypothesis finds that slow, and too much to keep.
CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large]


def explore(backend: str, share: float, device: str = "cpu", **kind) -> None:
    """`share`: of the profile's number of inputs."""
    number = max(1, round(share * settings.default.max_examples))

    @settings(max_examples=number, suppress_health_check=CHECKS)
    @given(case=inputs(**kind))
    def every(case):
        check(case, backend, device)

    every()
    pixels, compared = COMPARED[f"{backend} pixels"], COMPARED[f"{backend} compared"]
    print(f"{backend}: {COMPARED[f'{backend} inputs']} inputs, {compared} of {pixels} pixels")
    assert number < 50 or compared >= COMPARABLE * pixels, (
        f"only {compared} of {pixels} pixels were compared"
    )


@runs_on("cpu", "cpu")
def test_cpu():
    explore("cpu", 10, dtypes=("fp32", "fp32", "fp64", "bf16", "fp16"))


def test_reference():
    explore("reference", 2, dtypes=("fp32", "bf16", "fp16"))


@runs_on("cuda", "cuda")
def test_cuda():
    explore("cuda", 10, "cuda", dtypes=("fp32", "fp32", "fp64", "bf16", "fp16"))


@runs_on("triton", "cpu")
def test_triton_in_its_interpreter():
    explore("triton", 0.2, dtypes=("fp32", "bf16", "fp16"), small=True)


@runs_on("triton", "cuda")
def test_triton():
    explore("triton", 2, "cuda", dtypes=("fp32", "bf16", "fp16"))
