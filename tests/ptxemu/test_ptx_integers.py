"""Instructions on integers, predicates and lanes against the text of the PTX ISA, in Python."""

from __future__ import annotations

import numpy as np
import pytest
from instructions import check, integers, long_integers, run, signed

from tools import ptxemu

reason = ptxemu.obstacle()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))

GENERATOR = np.random.default_rng(7)
A = integers(GENERATOR)
B, C = (GENERATOR.permutation(integers(GENERATOR)) for _ in range(2))
LONG_A = long_integers(GENERATOR)
LONG_B = GENERATOR.permutation(long_integers(GENERATOR))
SHIFTS = np.concatenate([np.arange(40), B[:160]]).astype(np.uint32)  # also far beyond the width
ONES = 2**32 - 1


def extracted(value, position, length, bits, is_signed):
    """bfe: `length` bits from `position`; beyond the last bit, zeros or copies of the sign."""
    position, length = position & 255, length & 255
    last = min(position + length - 1, bits - 1)
    fill = (value >> last) & 1 if is_signed and length else 0
    inside = [
        (value >> (position + i)) & 1 if i < length and position + i < bits else fill
        for i in range(bits)
    ]
    return sum(bit << i for i, bit in enumerate(inside))


def inserted(field, value, position, length, bits=32):
    """bfi: `length` bits of `field` in place of those of `value` from `position`."""
    position, length = position & 255, length & 255
    for i in range(min(length, max(0, bits - position))):
        place = 1 << (position + i)
        value = (value | place) if (field >> i) & 1 else (value & ~place)
    return value


def permuted(low, high, selector):
    """prmt: four of eight bytes; a selector's highest bit repeats the byte's sign."""
    both, result = low | high << 32, 0
    for i in range(4):
        choice = selector >> 4 * i & 15
        byte = both >> 8 * (choice & 7) & 255
        if choice & 8:
            byte = 255 if byte >> 7 else 0
        result |= byte << 8 * i
    return result


def quotient(x, y):
    """Rounded toward zero, as C does."""
    whole = abs(x) // abs(y)
    return whole if (x < 0) == (y < 0) else -whole


def clamped(value, low, high):
    return max(low, min(high, value))


def part(value, index, bits=8, is_signed=True):
    """Byte, or half, of a register."""
    field = value >> bits * index & (2**bits - 1)
    return signed(field, bits) if is_signed else field


BINARY = {
    "add.s32": lambda x, y: x + y,
    "sub.s32": lambda x, y: x - y,
    "mul.lo.s32": lambda x, y: x * y,
    "mul.hi.s32": lambda x, y: signed(x) * signed(y) >> 32,
    "mul.hi.u32": lambda x, y: x * y >> 32,
    "min.s32": lambda x, y: min(signed(x), signed(y)),
    "max.u32": max,
    "and.b32": lambda x, y: x & y,
    "xor.b32": lambda x, y: x ^ y,
    "add.sat.s32": lambda x, y: clamped(signed(x) + signed(y), -(2**31), 2**31 - 1),
    "sub.sat.s32": lambda x, y: clamped(signed(x) - signed(y), -(2**31), 2**31 - 1),
    "mul24.lo.u32": lambda x, y: (x & 0xFFFFFF) * (y & 0xFFFFFF),
    "mul24.lo.s32": lambda x, y: signed(x, 24) * signed(y, 24),
    "set.lt.u32.s32": lambda x, y: ONES if signed(x) < signed(y) else 0,
}
SHIFTED = {
    "shl.b32": lambda x, y: x << y if y < 32 else 0,
    "shr.u32": lambda x, y: x >> y if y < 32 else 0,
    "shr.s32": lambda x, y: signed(x) >> min(y, 31),
}
DIVIDED = {
    "div.s32": lambda x, y: quotient(signed(x), signed(y)),
    "rem.s32": lambda x, y: signed(x) - quotient(signed(x), signed(y)) * signed(y),
    "rem.u32": lambda x, y: x % y,
}
UNARY = {
    "popc.b32": lambda x: x.bit_count(),
    "clz.b32": lambda x: 32 - x.bit_length(),
    "brev.b32": lambda x: int(f"{x:032b}"[::-1], 2),
    "bfind.u32": lambda x: x.bit_length() - 1,
    "bfind.s32": lambda x: (x if x < 2**31 else ~x & ONES).bit_length() - 1,
    "bfind.shiftamt.u32": lambda x: 32 - x.bit_length() if x else -1,
    "cvt.sat.u8.s32": lambda x: clamped(signed(x), 0, 255),
    "cvt.s8.s32": lambda x: signed(x, 8),
    "cvt.u32.u8": lambda x: x & 255,
    "cvt.sat.s16.s32": lambda x: clamped(signed(x), -(2**15), 2**15 - 1),
}
TERNARY = {
    "prmt.b32": permuted,
    "sad.s32": lambda x, y, z: abs(signed(x) - signed(y)) + z,
    "sad.u32": lambda x, y, z: abs(x - y) + z,
    "shf.l.wrap.b32": lambda x, y, z: ((y << 32 | x) << (z & 31)) >> 32,
    "shf.r.wrap.b32": lambda x, y, z: (y << 32 | x) >> (z & 31),
    "shf.r.clamp.b32": lambda x, y, z: (y << 32 | x) >> min(z, 32),
    "shf.l.clamp.b32": lambda x, y, z: ((y << 32 | x) << min(z, 32)) >> 32,
    "dp4a.s32.u32": lambda x, y, z: (
        z + sum(part(x, i) * part(y, i, is_signed=False) for i in range(4))
    ),
    "dp2a.hi.s32.s32": lambda x, y, z: z + sum(part(x, i, 16) * part(y, i + 2) for i in range(2)),
    "mad.hi.s32": lambda x, y, z: (signed(x) * signed(y) >> 32) + z,
    "slct.s32.s32": lambda x, y, z: x if signed(z) >= 0 else y,
}


@pytest.mark.parametrize("instruction", BINARY)
def test_two_operands(instruction):
    check(instruction, BINARY[instruction], A, B)


@pytest.mark.parametrize("instruction", SHIFTED)
def test_shifts(instruction):
    check(instruction, SHIFTED[instruction], A, SHIFTS)


@pytest.mark.parametrize("instruction", DIVIDED)
def test_division(instruction):
    check(instruction, DIVIDED[instruction], A, np.where(B == 0, 1, B).astype(np.uint32))


@pytest.mark.parametrize("instruction", UNARY)
def test_one_operand(instruction):
    check(instruction, UNARY[instruction], A)


@pytest.mark.parametrize("instruction", TERNARY)
def test_three_operands(instruction):
    check(instruction, TERNARY[instruction], A, B, C)


@pytest.mark.parametrize("table", [0x96, 0xE8, 0xCA, 0x1B, 0x80, 0xFE, 0x3C])
def test_lop3(table):
    def looked_up(x, y, z):
        bits = ((x >> i & 1) * 4 + (y >> i & 1) * 2 + (z >> i & 1) for i in range(32))
        return sum((table >> index & 1) << i for i, index in enumerate(bits))

    check(f"lop3.b32 %d, %x0, %x1, %x2, {table};", looked_up, A, B, C)


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_fields(bits):
    x, y = (A, B) if bits == 32 else (LONG_A, LONG_B)
    position, length = ((z & (2 * bits - 1)).astype(np.uint32) for z in (B, C))
    for kind in "us":
        check(
            f"bfe.{kind}{bits}",
            lambda value, p, n, is_signed=kind == "s": extracted(value, p, n, bits, is_signed),
            x, position, length, bits=bits,
        )  # fmt: skip
    check(
        f"bfi.b{bits}",
        lambda field, value, p, n: inserted(field, value, p, n, bits),
        x, y, position, length, bits=bits,
    )  # fmt: skip


LONG = {
    "mul.lo.s64": (lambda x, y: x * y, LONG_A, LONG_B),
    "mul.hi.s64": (lambda x, y: signed(x, 64) * signed(y, 64) >> 64, LONG_A, LONG_B),
    "mul.hi.u64": (lambda x, y: x * y >> 64, LONG_A, LONG_B),
    "mul.wide.s32": (lambda x, y: signed(x) * signed(y), A, B),
    "mad.wide.u32": (lambda x, y, z: x * y + z, A, B, LONG_A),
    "shr.s64": (lambda x, y: signed(x, 64) >> min(y, 63), LONG_A, B & 127),
    "shl.b64": (lambda x, y: x << y if y < 64 else 0, LONG_A, B & 127),
    "cvt.s64.s16": (lambda x: signed(x, 16), A),
}
CARRY = """{
.reg .b32 low0, high0, low1, high1;
mov.b64 {low0, high0}, %x0;
mov.b64 {low1, high1}, %x1;
$.cc.u32 low0, low0, low1;
$c.u32 high0, high0, high1;
mov.b64 %d, {low0, high0};
}"""


@pytest.mark.parametrize("instruction", LONG)
def test_64_bits(instruction):
    reference, *operands = LONG[instruction]
    check(instruction, reference, *operands, bits=64)


def test_counts_of_64_bits():
    check("popc.b64", lambda x: x.bit_count(), LONG_A)
    check("clz.b64", lambda x: 64 - x.bit_length(), LONG_A)


def test_carry():
    check(CARRY.replace("$", "add"), lambda x, y: x + y, LONG_A, LONG_B, bits=64)
    check(CARRY.replace("$", "sub"), lambda x, y: x - y, LONG_A, LONG_B, bits=64)


def test_predicates_combine():
    check(
        "setp.lt.s32 %p, %x0, %x1; setp.gt.and.u32 %q, %x0, %x2, !%p; selp.b32 %d, 1, 0, %q;",
        lambda x, y, z: x > z and not signed(x) < signed(y),
        A, B, C,
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 16, 8, 4])
@pytest.mark.parametrize("delta", [0, 1, 3, 7, 16])
def test_shuffles(mode, width, delta):
    """A lane reads another of its segment; one that would leave it keeps its own value."""
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    got = run(
        f"shfl.sync.{mode}.b32 %d|%p, %x0, {delta}, {clamp}, 0xffffffff;"
        "selp.b32 %c, 1000, 0, %p; add.s32 %d, %d, %c;",
        [np.arange(100, 132, dtype=np.uint32)],
    )
    expected = []
    for lane in range(32):
        first = lane // width * width
        source = {
            "up": lane - delta,
            "down": lane + delta,
            "bfly": lane ^ delta,
            "idx": first + delta % width,
        }[mode]
        inside = source >= first if mode == "up" else source < first + width
        expected.append(1100 + source if inside else 100 + lane)
    np.testing.assert_array_equal(got, expected)
