"""Instructions on fp16, bf16, tf32 and fp32 against exact arithmetic and numpy."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from instructions import (
    bits_of,
    check,
    check_floats,
    floats,
    integers,
    long_integers,
    rounded,
    run,
    signed,
)

from tools import ptxemu

reason = ptxemu.obstacle()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))

GENERATOR = np.random.default_rng(7)
X = floats(GENERATOR)
Y = GENERATOR.permutation(floats(GENERATOR))
FINITE = np.isfinite(X)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_rounding(mode):
    generator = np.random.default_rng(8)
    scale = 10.0 ** generator.integers(-3, 4, (3, 200))
    x, y, z = (generator.standard_normal((3, 200)) * scale).astype(np.float32)
    exact = [[Fraction(float(value)) for value in values] for values in (x, y, z)]
    pairs = list(zip(*exact[:2], strict=True))
    expected = {
        "fma": [p * q + r for p, q, r in zip(*exact, strict=True)],
        "add": [p + q for p, q in pairs],
        "mul": [p * q for p, q in pairs],
        "div": [p / q for p, q in pairs],
    }
    for name, values in expected.items():
        operands = (x, y, z) if name == "fma" else (x, y)
        check_floats(f"{name}.{mode}.f32", [rounded(v, mode) for v in values], *operands)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_rounding_of_wider_numbers(mode):
    generator = np.random.default_rng(9)
    wide = generator.standard_normal(200) * 10.0 ** generator.integers(-3, 4, 200)
    short, long = integers(generator), long_integers(generator)
    sources = {
        "f64": (wide.view(np.uint64), [Fraction(value) for value in wide]),
        "s32": (short, [Fraction(signed(int(value))) for value in short]),
        "u64": (long, [Fraction(int(value)) for value in long]),
    }
    for kind, (operand, exact) in sources.items():
        check_floats(f"cvt.{mode}.f32.{kind}", [rounded(v, mode) for v in exact], operand)


def larger(x, y, keep_nan=False):
    """max: of a number and NaN the number; +0 is larger than -0."""
    if math.isnan(x) or math.isnan(y):
        both = math.isnan(x) and math.isnan(y)
        return math.nan if keep_nan or both else (y if math.isnan(x) else x)
    if x == y == 0:
        return 0.0 if math.copysign(1, x) > 0 or math.copysign(1, y) > 0 else -0.0
    return max(x, y)


def test_min_and_max():
    pairs = [(float(x), float(y)) for x, y in zip(X, Y, strict=True)]
    check_floats("max.f32", [larger(x, y) for x, y in pairs], X, Y)
    check_floats("max.NaN.f32", [larger(x, y, keep_nan=True) for x, y in pairs], X, Y)
    check_floats("min.f32", [-larger(-x, -y) for x, y in pairs], X, Y)


def test_saturation():
    def saturated(values):
        return [0 if math.isnan(v) else min(1, max(0, v)) + 0.0 for v in values]

    with np.errstate(invalid="ignore", over="ignore"):
        check_floats("add.sat.f32", saturated(X + Y), X, Y)
    check_floats("cvt.sat.f32.f32", saturated(X), X)


def test_flush_to_zero():
    """With .ftz a subnormal number is zero, with its sign."""
    x = np.array([1e-40, -1e-40, 1e-38, 2e-38, 1], np.float32)
    flushed = [0, -0.0, 0, x[3], 1]
    check_floats("add.ftz.f32", flushed, x, np.copysign(np.float32(0), x))
    check_floats("mul.ftz.f32", flushed, x, np.ones_like(x))
    check_floats("mul.f32", x, x, np.ones_like(x))


@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
@pytest.mark.parametrize("kind", ["s32", "u32", "s16", "u8", "s64", "u64", "s8", "u16"])
def test_floats_to_integers(mode, kind):
    """Out of range: the nearest end of the range; NaN: zero, or 2⁶³ of 64 bits."""
    bits = int(kind[1:])
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if kind[0] == "s" else (0, 2**bits - 1)
    whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode]

    def converted(value):
        if math.isnan(value):
            return 2**63 if bits == 64 else 0
        if math.isinf(value):
            return high if value > 0 else low
        return max(low, min(high, int(whole(value))))

    register = max(bits, 32)
    got = run(f"cvt.{mode}.{kind}.f32", [bits_of(X)], register)
    expected = [converted(float(value)) & (2**register - 1) for value in X]
    np.testing.assert_array_equal(got, expected)


def to_bfloat16(x):
    """The bits, rounded to nearest, of what is no NaN."""
    bits = bits_of(x).astype(np.uint64)
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def test_fp32_to_shorter_formats():
    numbers = ~np.isnan(X)
    both = numbers & ~np.isnan(Y)
    with np.errstate(over="ignore"):
        half = X.astype(np.float16).view(np.uint16)
    got = run("cvt.rn.f16.f32", [bits_of(X)], 16)
    np.testing.assert_array_equal(got[FINITE], half[FINITE])
    got = run("cvt.rn.bf16.f32", [bits_of(X)], 16)
    np.testing.assert_array_equal(got[numbers], to_bfloat16(X)[numbers])
    got = run("cvt.rna.tf32.f32", [bits_of(X)])
    tf32 = (bits_of(X).astype(np.uint64) + 0x1000) & 0xFFFFE000
    np.testing.assert_array_equal(got[FINITE], tf32[FINITE])
    got = run("cvt.rn.bf16x2.f32", [bits_of(X), bits_of(Y)])
    two = to_bfloat16(X) << 16 | to_bfloat16(Y)
    np.testing.assert_array_equal(got[both], two[both])


def test_to_fp32():
    half = np.random.default_rng(10).integers(0, 2**16, 300, dtype=np.uint16)
    check_floats("cvt.f32.f16", half.view(np.float16).astype(np.float32), half)
    check_floats("cvt.f32.bf16", (half.astype(np.uint32) << 16).view(np.float32), half)
    check_floats("cvt.rmi.f32.f32", np.floor(X), X)


COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
               "gt": np.greater, "ge": np.greater_equal}  # fmt: skip


@pytest.mark.parametrize(
    "name", [*COMPARISONS, *(f"{name}u" for name in COMPARISONS), "num", "nan"]
)
def test_comparisons(name):
    """Of NaN: false, or true where the name ends in u, for unordered."""
    same = np.random.default_rng(11).random(len(X)) < 0.3
    y = np.where(same, X, Y)
    unordered = np.isnan(X) | np.isnan(y)
    if name in ("num", "nan"):
        expected = unordered == (name == "nan")
    elif name in COMPARISONS:
        expected = COMPARISONS[name](X, y) & ~unordered
    else:
        expected = COMPARISONS[name[:2]](X, y) | unordered
    got = run(
        f"setp.{name}.f32 %p|%q, %x0, %x1;"
        "selp.b32 %d, 1, 0, %p; selp.b32 %c, 2, 0, %q; or.b32 %d, %d, %c;",
        [bits_of(X), bits_of(y)],
    )
    np.testing.assert_array_equal(got, np.where(expected, 1, 2))


def test_fp16():
    generator = np.random.default_rng(12)
    sign = generator.integers(0, 2, (3, 500), dtype=np.uint16) << np.uint16(15)
    bits = generator.integers(0, 0x7C00, (3, 500), dtype=np.uint16) | sign  # finite
    x, y, z = bits.view(np.float16).astype(np.float64)
    with np.errstate(over="ignore"):
        results = {
            "add.f16": x + y,
            "sub.f16": x - y,
            "mul.f16": x * y,
            # Exact before it is rounded: 22 bits of a product and 11 of a term need not fit fp64.
            "fma.rn.f16": np.array(
                [
                    float(Fraction(p) * Fraction(q) + Fraction(r))
                    for p, q, r in zip(x, y, z, strict=True)
                ]
            ),
        }
        halves = {name: value.astype(np.float16) for name, value in results.items()}
    for name, expected in halves.items():
        operands = [*bits] if name.startswith("fma") else [*bits[:2]]
        got = run(name, operands, 16).view(np.float16)
        np.testing.assert_array_equal(got, expected)
    check("neg.f16", lambda v: v ^ 0x8000, bits[0], bits=16)
