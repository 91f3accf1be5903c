"""Runs one PTX instruction on every element of its operands, and makes operands worth running."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from string import Template

import numpy as np

from tools import ptxemu

PROGRAM = Template("""
.version 8.4
.target sm_80
.address_size 64
.visible .entry kernel(.param .u64 result$parameters)
{
.reg .b64 %address, %offset;
.reg .b32 %thread, %c;
.reg .pred %p, %q;
.reg .b$bits %d;
mov.u32 %thread, %tid.x;
$loads
$instruction
ld.param.u64 %address, [result];
mul.wide.u32 %offset, %thread, $size;
add.s64 %address, %address, %offset;
st.global.b$bits [%address], %d;
ret;
}
""")
LOAD = Template("""
.reg .b$bits %x$index;
ld.param.u64 %address, [operand$index];
mul.wide.u32 %offset, %thread, $size;
add.s64 %address, %address, %offset;
ld.global.b$bits %x$index, [%address];
""")
UNSIGNED = {16: np.uint16, 32: np.uint32, 64: np.uint64}
SPECIAL_INTEGERS = [
    0, 1, 2, 31, 32, 33, 63, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x12345678, 0xDEADBEEF, 0xFF,
    0x100, 0x01010101, 0x80808080,
]  # fmt: skip
SPECIAL_FLOATS = [
    0.0, -0.0, 1, -1, 0.5, -0.5, 1.5, 2.5, -2.5, 3e38, -3e38, 1e-40, -1e-40, math.inf, -math.inf,
    math.nan, 2147483648.0, -2147483648.0, 4294967296.0, 1e-45, 255.5, 32767.5, 65504.0, 65520.0,
    1 + 2**-11, 1 + 2**-12, 1 + 3 * 2**-12,
]  # fmt: skip


def run(instruction: str, operands: Sequence[np.ndarray], bits: int = 32) -> np.ndarray:
    """The result, as unsigned integers, of an instruction in one thread per element.

    instruction: PTX that reads %x0, %x1, ... and writes %d; %c, %p and %q are free for it. Without
        operands, such as "add.s32", it takes all of them in order.
    operands: arrays (n,) of n ≤ 1024 elements.
    bits: of the result.
    """
    names = [f"%x{index}" for index in range(len(operands))]
    if not instruction.endswith((";", "}")):
        instruction = f"{instruction} {', '.join(['%d', *names])};"
    loads = [
        LOAD.substitute(bits=8 * x.itemsize, size=x.itemsize, index=index)
        for index, x in enumerate(operands)
    ]
    program = PROGRAM.substitute(
        parameters="".join(f", .param .u64 operand{index}" for index in range(len(operands))),
        bits=bits,
        size=bits // 8,
        loads="".join(loads),
        instruction=instruction,
    )
    result = np.zeros(len(operands[0]), UNSIGNED[bits])
    ptxemu.Module(program).launch("kernel", 1, len(result), [result, *operands])
    return result


def check(
    instruction: str, reference: Callable[..., int], *operands: np.ndarray, bits: int = 32
) -> None:
    """Compares with `reference`, which takes the elements as Python's integers."""
    expected = [
        int(reference(*map(int, elements))) & (2**bits - 1)
        for elements in zip(*operands, strict=True)
    ]
    np.testing.assert_array_equal(run(instruction, operands, bits), expected)


def check_floats(instruction: str, expected: Sequence[float], *operands: np.ndarray) -> None:
    """Compares an fp32 result bit by bit; a NaN is any NaN. fp32 operands go in as their bits."""
    operands = tuple(bits_of(x) if x.dtype == np.float32 else x for x in operands)
    got = run(instruction, operands).view(np.float32)
    wanted = np.asarray(expected, np.float32)
    same = (bits_of(got) == bits_of(wanted)) | (np.isnan(got) & np.isnan(wanted))
    assert same.all(), (np.flatnonzero(~same)[:5], got[~same][:5], wanted[~same][:5])


def bits_of(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


def integers(generator: np.random.Generator, count: int = 200) -> np.ndarray:
    """Of 32 bits, in any order: the special ones, then random ones."""
    rest = generator.integers(0, 2**32, count - len(SPECIAL_INTEGERS), dtype=np.uint64)
    return np.array([*SPECIAL_INTEGERS, *rest], np.uint64).astype(np.uint32)


def long_integers(generator: np.random.Generator, count: int = 200) -> np.ndarray:
    """Of 64 bits: half of them fit into 32."""
    short = integers(generator, count)[: count // 2].astype(np.uint64)
    odd = generator.integers(0, 2**63, count - count // 2, dtype=np.uint64) * np.uint64(2) + 1
    return np.concatenate([short, odd.astype(np.uint64)])


def floats(generator: np.random.Generator, count: int = 400) -> np.ndarray:
    """fp32: zeros, halves, subnormal and infinite numbers, NaN, then eight decades either way."""
    rest = count - len(SPECIAL_FLOATS)
    random = generator.standard_normal(rest) * 10.0 ** generator.integers(-8, 9, rest)
    return np.concatenate([np.array(SPECIAL_FLOATS, np.float32), random.astype(np.float32)])


def signed(value: int, bits: int = 32) -> int:
    """The two's complement that the lowest bits are."""
    value &= 2**bits - 1
    return value - 2**bits if value >> (bits - 1) else value


def rounded(value: Fraction, mode: str) -> np.float32:
    """An exact number as fp32, rounded as PTX's mode says; for finite, normal results."""
    if value == 0:
        return np.float32(0)
    magnitude = abs(value)
    exponent = math.floor(math.log2(magnitude))
    while Fraction(2) ** exponent > magnitude:  # log2 has rounded
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= magnitude:
        exponent += 1
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    whole, rest = divmod(magnitude / unit, 1)
    half = Fraction(1, 2)
    up = {
        "rn": rest > half or (rest == half and whole & 1),
        "rz": False,
        "rm": value < 0 and rest > 0,
        "rp": value > 0 and rest > 0,
    }[mode]
    return np.float32(math.copysign(1, value) * float((whole + bool(up)) * unit))
