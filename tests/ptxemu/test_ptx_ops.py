"""Single PTX instructions against Python references written from the PTX ISA text."""

import math
from fractions import Fraction

import numpy as np
import pytest

from tools import ptxemu

reason = ptxemu.obstacle()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))

R = np.random.RandomState(7)
SPECIAL32 = [
    0,
    1,
    2,
    31,
    32,
    33,
    63,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    0x12345678,
    0xDEADBEEF,
    0xFF,
    0x100,
    0x01010101,
    0x80808080,
]


def run(op, srcs, dbits=32, dreg=None, ty=None):
    """op: instruction text with {d},{0},{1}..; srcs: list of uint32/uint64 arrays (n<=1024)"""
    n = len(srcs[0])
    W = {4: "32", 8: "64", 2: "16"}
    ps = "".join(",\n .param .u64 p%d" % i for i in range(len(srcs)))
    decl = ld = ""
    for i, s in enumerate(srcs):
        w = s.dtype.itemsize
        decl += ".reg .b%s %%x%d;\n" % (W[w], i)
        ld += (
            "ld.param.u64 %%q, [p%d];\nmul.wide.u32 %%o, %%t, %d;\nadd.s64 %%q, %%q, %%o;\nld.global.b%s %%x%d, [%%q];\n"
            % (i, w, W[w], i)
        )
    ins = op.format(*["%%x%d" % i for i in range(len(srcs))], d="%d")
    ptx = (
        ".version 8.4\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 po%s)\n{\n.reg .b64 %%q, %%o; .reg .b32 %%t, %%c, %%n; .reg .pred %%p, %%pq;\n.reg .b%d %%d;\n%smov.u32 %%t, %%tid.x;\n%s%s\nld.param.u64 %%q, [po];\nmul.wide.u32 %%o, %%t, %d;\nadd.s64 %%q, %%q, %%o;\nst.global.b%d [%%q], %%d;\nret;\n}\n"
        % (ps, dbits, decl, ld, ins, dbits // 8, dbits)
    )
    m = ptxemu.Module(ptx)
    o = np.zeros(n, {16: np.uint16, 32: np.uint32, 64: np.uint64}[dbits])
    m.launch("k", 1, n, [o, *list(srcs)])
    return o


def rnd32(n=200):
    return np.array(
        SPECIAL32 + list(R.randint(0, 2**32, n - 16, dtype=np.uint64)), np.uint64
    ).astype(np.uint32)


def rnd64(n=200):
    return np.concatenate(
        [rnd32(n).astype(np.uint64)[:100], R.randint(0, 2**63, n - 100).astype(np.uint64) * 2 + 1]
    )


def sg(v, b=32):
    v = int(v) & (2**b - 1)
    return v - 2**b if v >> (b - 1) else v


def perm(x):
    return x[R.permutation(len(x))]


a, b, c = rnd32(), perm(rnd32()), perm(rnd32())
A64, B64 = rnd64(), perm(rnd64())
M32, M64 = 2**32 - 1, 2**64 - 1


def bfe(x, p, l, bits, signed):
    p &= 255
    l &= 255
    s = ((x >> min(p + l - 1, bits - 1)) & 1) if signed and l else 0
    r = 0
    for i in range(bits):
        r |= (((x >> (p + i)) & 1) if i < l and p + i < bits else s) << i
    return r


def bfi(f, x, p, l, bits=32):
    p &= 255
    l &= 255
    for i in range(l):
        if p + i < bits:
            x = (x & ~(1 << (p + i))) | (((f >> i) & 1) << (p + i))
    return x


def prmt(x, y, s):
    v = x | y << 32
    r = 0
    for i in range(4):
        q = s >> 4 * i & 15
        by = v >> 8 * (q & 7) & 255
        if q & 8:
            by = 255 if by >> 7 else 0
        r |= by << 8 * i
    return r


def tdiv(x, y):
    q = abs(x) // abs(y)
    return q if (x < 0) == (y < 0) else -q


I2 = {
    "add.s32": lambda x, y: x + y,
    "sub.s32": lambda x, y: x - y,
    "mul.lo.s32": lambda x, y: x * y,
    "mul.hi.s32": lambda x, y: sg(x) * sg(y) >> 32,
    "mul.hi.u32": lambda x, y: x * y >> 32,
    "min.s32": lambda x, y: min(sg(x), sg(y)),
    "max.u32": max,
    "and.b32": lambda x, y: x & y,
    "xor.b32": lambda x, y: x ^ y,
    "shl.b32": lambda x, y: x << y if y < 32 else 0,
    "shr.u32": lambda x, y: x >> y if y < 32 else 0,
    "shr.s32": lambda x, y: sg(x) >> min(y, 31),
    "add.sat.s32": lambda x, y: max(-(2**31), min(2**31 - 1, sg(x) + sg(y))),
    "sub.sat.s32": lambda x, y: max(-(2**31), min(2**31 - 1, sg(x) - sg(y))),
    "mul24.lo.u32": lambda x, y: (x & 0xFFFFFF) * (y & 0xFFFFFF),
    "mul24.lo.s32": lambda x, y: sg(x, 24) * sg(y, 24),
}


@pytest.mark.parametrize("op", I2)
def test_int2(op):
    y = (
        b
        if op[:3] != "shl" and op[:3] != "shr"
        else np.concatenate([np.arange(40), b[:160]]).astype(np.uint32)
    )
    np.testing.assert_array_equal(
        run(op + " {d},{0},{1};", [a, y]),
        [I2[op](int(p), int(q)) & M32 for p, q in zip(a, y, strict=False)],
    )


def test_int_misc():
    def L(f, *s):
        return [f(*map(int, t)) & M32 for t in zip(*s, strict=False)]

    eq = np.testing.assert_array_equal
    y = np.where(b == 0, 1, b).astype(np.uint32)
    eq(run("div.s32 {d},{0},{1};", [a, y]), L(lambda p, q: tdiv(sg(p), sg(q)), a, y))
    eq(
        run("rem.s32 {d},{0},{1};", [a, y]),
        L(lambda p, q: sg(p) - tdiv(sg(p), sg(q)) * sg(q), a, y),
    )
    eq(run("rem.u32 {d},{0},{1};", [a, y]), L(lambda p, q: p % q, a, y))
    pos = (b & 63).astype(np.uint32)
    ln = (c & 63).astype(np.uint32)
    for s in (0, 1):
        eq(
            run("bfe.{}32 {{d}},{{0}},{{1}},{{2}};".format("us"[s]), [a, pos, ln]),
            L(lambda x, p, l: bfe(x, p, l, 32, s), a, pos, ln),
        )
    eq(run("bfi.b32 {d},{0},{1},{2},{3};", [a, b, pos, ln]), L(bfi, a, b, pos, ln))
    eq(run("prmt.b32 {d},{0},{1},{2};", [a, b, c]), L(prmt, a, b, c))
    eq(
        run("sad.s32 {d},{0},{1},{2};", [a, b, c]),
        L(lambda x, y, z: abs(sg(x) - sg(y)) + z, a, b, c),
    )
    eq(run("sad.u32 {d},{0},{1},{2};", [a, b, c]), L(lambda x, y, z: abs(x - y) + z, a, b, c))
    for lut in (0x96, 0xE8, 0xCA, 0x1B, 0x80, 0xFE, 0x3C):
        eq(
            run("lop3.b32 {d},{0},{1},{2},%d;" % lut, [a, b, c]),
            L(
                lambda x, y, z: sum(
                    ((lut >> ((x >> i & 1) * 4 + (y >> i & 1) * 2 + (z >> i & 1))) & 1) << i
                    for i in range(32)
                ),
                a,
                b,
                c,
            ),
        )
    eq(
        run("shf.l.wrap.b32 {d},{0},{1},{2};", [a, b, c]),
        L(lambda x, y, z: ((y << 32 | x) << (z & 31)) >> 32, a, b, c),
    )
    eq(
        run("shf.r.wrap.b32 {d},{0},{1},{2};", [a, b, c]),
        L(lambda x, y, z: (y << 32 | x) >> (z & 31), a, b, c),
    )
    eq(
        run("shf.r.clamp.b32 {d},{0},{1},{2};", [a, b, c]),
        L(lambda x, y, z: (y << 32 | x) >> min(z, 32), a, b, c),
    )
    eq(
        run("shf.l.clamp.b32 {d},{0},{1},{2};", [a, b, c]),
        L(lambda x, y, z: ((y << 32 | x) << min(z, 32)) >> 32, a, b, c),
    )
    eq(run("popc.b32 {d},{0};", [a]), L(lambda x: bin(x).count("1"), a))
    eq(run("clz.b32 {d},{0};", [a]), L(lambda x: 32 - x.bit_length(), a))
    eq(run("brev.b32 {d},{0};", [a]), L(lambda x: int(f"{x:032b}"[::-1], 2), a))
    eq(run("bfind.u32 {d},{0};", [a]), L(lambda x: x.bit_length() - 1, a))
    eq(
        run("bfind.s32 {d},{0};", [a]),
        L(lambda x: (x if x < 2**31 else ~x & M32).bit_length() - 1, a),
    )
    eq(run("bfind.shiftamt.u32 {d},{0};", [a]), L(lambda x: 32 - x.bit_length() if x else -1, a))

    def by(x, i, s):
        return sg(x >> 8 * i, 8) if s else x >> 8 * i & 255

    eq(
        run("dp4a.s32.u32 {d},{0},{1},{2};", [a, b, c]),
        L(lambda x, y, z: z + sum(by(x, i, 1) * by(y, i, 0) for i in range(4)), a, b, c),
    )
    eq(
        run("dp2a.hi.s32.s32 {d},{0},{1},{2};", [a, b, c]),
        L(
            lambda x, y, z: z + sum(sg(x >> 16 * i, 16) * by(y, i + 2, 1) for i in range(2)),
            a,
            b,
            c,
        ),
    )
    eq(
        run("mad.hi.s32 {d},{0},{1},{2};", [a, b, c]),
        L(lambda x, y, z: (sg(x) * sg(y) >> 32) + z, a, b, c),
    )


def test_int64():
    def L(f, *s):
        return [f(*map(int, t)) & M64 for t in zip(*s, strict=False)]

    eq = np.testing.assert_array_equal
    pos = (b & 127).astype(np.uint32)
    ln = (c & 127).astype(np.uint32)
    eq(run("mul.lo.s64 {d},{0},{1};", [A64, B64], 64), L(lambda x, y: x * y, A64, B64))
    eq(
        run("mul.hi.s64 {d},{0},{1};", [A64, B64], 64),
        L(lambda x, y: sg(x, 64) * sg(y, 64) >> 64, A64, B64),
    )
    eq(run("mul.hi.u64 {d},{0},{1};", [A64, B64], 64), L(lambda x, y: x * y >> 64, A64, B64))
    eq(run("mul.wide.s32 {d},{0},{1};", [a, b], 64), L(lambda x, y: sg(x) * sg(y), a, b))
    eq(
        run("mad.wide.u32 {d},{0},{1},{2};", [a, b, A64], 64),
        L(lambda x, y, z: x * y + z, a, b, A64),
    )
    eq(
        run("shr.s64 {d},{0},{1};", [A64, pos], 64),
        L(lambda x, s: sg(x, 64) >> min(s, 63), A64, pos),
    )
    eq(
        run("shl.b64 {d},{0},{1};", [A64, pos], 64),
        L(lambda x, s: x << s if s < 64 else 0, A64, pos),
    )
    for s in (0, 1):
        eq(
            run("bfe.{}64 {{d}},{{0}},{{1}},{{2}};".format("us"[s]), [A64, pos, ln], 64),
            L(lambda x, p, l: bfe(x, p, l, 64, s), A64, pos, ln),
        )
    eq(
        run("bfi.b64 {d},{0},{1},{2},{3};", [A64, B64, pos, ln], 64),
        L(lambda f, x, p, l: bfi(f, x, p, l, 64), A64, B64, pos, ln),
    )
    eq(run("popc.b64 {d},{0};", [A64]), [bin(int(x)).count("1") for x in A64])
    eq(run("clz.b64 {d},{0};", [A64]), [64 - int(x).bit_length() for x in A64])
    eq(
        run(
            "{{.reg .b32 l1,h1,l2,h2; mov.b64 {{l1,h1}},{0}; mov.b64 {{l2,h2}},{1}; add.cc.u32 l1,l1,l2; addc.u32 h1,h1,h2; mov.b64 {d},{{l1,h1}};}}",
            [A64, B64],
            64,
        ),
        L(lambda x, y: x + y, A64, B64),
    )
    eq(
        run(
            "{{.reg .b32 l1,h1,l2,h2; mov.b64 {{l1,h1}},{0}; mov.b64 {{l2,h2}},{1}; sub.cc.u32 l1,l1,l2; subc.u32 h1,h1,h2; mov.b64 {d},{{l1,h1}};}}",
            [A64, B64],
            64,
        ),
        L(lambda x, y: x - y, A64, B64),
    )


def f32s(n=400):
    v = [
        0.0,
        -0.0,
        1,
        -1,
        0.5,
        -0.5,
        1.5,
        2.5,
        -2.5,
        3e38,
        -3e38,
        1e-40,
        -1e-40,
        math.inf,
        -math.inf,
        math.nan,
        2147483648.0,
        -2147483648.0,
        4294967296.0,
        1e-45,
        255.5,
        32767.5,
        65504.0,
        65520.0,
        1 + 2**-11,
        1 + 2**-12,
        1 + 3 * 2**-12,
    ]
    return np.concatenate(
        [np.array(v, "f"), (R.randn(n - len(v)) * 10.0 ** R.randint(-8, 9, n - len(v))).astype("f")]
    )


FX, FY, FZ = f32s(), perm(f32s()), perm(f32s())


def U(x):
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


def V(x):
    return x.view(np.float32)


def same(got, ref):
    got, ref = np.asarray(got, "f"), np.asarray(ref, "f")
    ok = (got.view(np.uint32) == ref.view(np.uint32)) | (np.isnan(got) & np.isnan(ref))
    assert ok.all(), (np.where(~ok)[0][:5], got[~ok][:5], ref[~ok][:5])


def rnd(fr, mode):  # exact rational -> float32 in the given direction (finite, normal range only)
    if fr == 0:
        return np.float32(0)
    s = -1 if fr < 0 else 1
    x = abs(fr)
    e = math.floor(math.log2(x)) if x < 2**1000 else 0
    while Fraction(2) ** e > x:
        e -= 1
    while Fraction(2) ** (e + 1) <= x:
        e += 1
    u = Fraction(2) ** (max(e, -126) - 23)
    q = x / u
    k = q.numerator // q.denominator
    r = q - k
    up = {
        "rn": r > Fraction(1, 2) or (r == Fraction(1, 2) and k & 1),
        "rz": False,
        "rm": s < 0 and r > 0,
        "rp": s > 0 and r > 0,
    }[mode]
    return np.float32(s * float((k + up) * u))


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_rounding(mode):
    x, y, z = (R.randn(3, 200) * 10.0 ** R.randint(-3, 4, (3, 200))).astype("f")

    def F(v):
        return Fraction(float(v))

    s = [U(x.copy()), U(y.copy()), U(z.copy())]
    same(
        V(run(f"fma.{mode}.f32 {{d}},{{0}},{{1}},{{2}};", s)),
        [rnd(F(p) * F(q) + F(r), mode) for p, q, r in zip(x, y, z, strict=False)],
    )
    same(
        V(run(f"add.{mode}.f32 {{d}},{{0}},{{1}};", s[:2])),
        [rnd(F(p) + F(q), mode) for p, q in zip(x, y, strict=False)],
    )
    same(
        V(run(f"mul.{mode}.f32 {{d}},{{0}},{{1}};", s[:2])),
        [rnd(F(p) * F(q), mode) for p, q in zip(x, y, strict=False)],
    )
    same(
        V(run(f"div.{mode}.f32 {{d}},{{0}},{{1}};", s[:2])),
        [rnd(F(p) / F(q), mode) for p, q in zip(x, y, strict=False)],
    )
    d = R.randn(200) * 10.0 ** R.randint(-3, 4, 200)
    same(
        V(run(f"cvt.{mode}.f32.f64 {{d}},{{0}};", [d.view(np.uint64)])),
        [rnd(F(v), mode) for v in d],
    )
    i = rnd32()
    same(V(run(f"cvt.{mode}.f32.s32 {{d}},{{0}};", [i])), [rnd(Fraction(sg(v)), mode) for v in i])
    same(
        V(run(f"cvt.{mode}.f32.u64 {{d}},{{0}};", [A64])),
        [rnd(Fraction(int(v)), mode) for v in A64],
    )


def test_minmax_sat_ftz():
    def mx(p, q, nan=False):
        if math.isnan(p) or math.isnan(q):
            return (
                math.nan
                if nan or (math.isnan(p) and math.isnan(q))
                else (q if math.isnan(p) else p)
            )
        if p == q == 0:
            return 0.0 if math.copysign(1, p) > 0 or math.copysign(1, q) > 0 else -0.0
        return max(p, q)

    s = [U(FX), U(FY)]
    same(
        V(run("max.f32 {d},{0},{1};", s)),
        [mx(float(p), float(q)) for p, q in zip(FX, FY, strict=False)],
    )
    same(
        V(run("max.NaN.f32 {d},{0},{1};", s)),
        [mx(float(p), float(q), True) for p, q in zip(FX, FY, strict=False)],
    )
    same(
        V(run("min.f32 {d},{0},{1};", s)),
        [-mx(-float(p), -float(q)) for p, q in zip(FX, FY, strict=False)],
    )
    same(
        V(run("add.sat.f32 {d},{0},{1};", s)),
        [0 if math.isnan(v) else min(1, max(0, v)) + 0.0 for v in (FX + FY)],
    )
    t = np.array([1e-40, -1e-40, 1e-38, 2e-38, 1], "f")
    same(V(run("add.ftz.f32 {d},{0},{1};", [U(t), U(t * 0)])), [0, -0.0, 0, t[3], 1])
    same(V(run("mul.ftz.f32 {d},{0},{1};", [U(t), U(t * 0 + 1)])), [0, -0.0, 0, t[3], 1])
    assert V(run("mul.f32 {d},{0},{1};", [U(t), U(t * 0 + 1)]))[0] == t[0]


@pytest.mark.parametrize("rm", ["rni", "rzi", "rmi", "rpi"])
@pytest.mark.parametrize("t", ["s32", "u32", "s16", "u8", "s64", "u64", "s8", "u16"])
def test_cvt_f2i(rm, t):
    bits = int(t[1:])
    lo, hi = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if t[0] == "s" else (0, 2**bits - 1)
    f = {"rni": lambda v: np.rint(v), "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rm]

    def ref(v):
        v = float(v)
        if math.isnan(v):
            return 2**63 if bits == 64 else 0
        if math.isinf(v):
            return hi if v > 0 else lo
        return max(lo, min(hi, int(f(v))))

    db = max(bits, 32)
    o = run(f"cvt.{rm}.{t}.f32 {{d}},{{0}};", [U(FX)], 64 if bits == 64 else 32)
    np.testing.assert_array_equal(o, [ref(v) & (2**db - 1) for v in FX])


def test_cvt_misc():
    eq = np.testing.assert_array_equal
    fin = np.isfinite(FX)
    with np.errstate(all="ignore"):
        eq(
            run("cvt.rn.f16.f32 {d},{0};", [U(FX)], 16)[fin],
            FX.astype(np.float16).view(np.uint16)[fin],
        )
    h = R.randint(0, 65536, 300).astype(np.uint16)
    same(V(run("cvt.f32.f16 {d},{0};", [h])), h.view(np.float16).astype("f"))
    same(V(run("cvt.f32.bf16 {d},{0};", [h])), (h.astype(np.uint32) << 16).view("f"))
    u = U(FX).astype(np.uint64)
    rb = ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16)
    eq(run("cvt.rn.bf16.f32 {d},{0};", [U(FX)], 16)[~np.isnan(FX)], rb[~np.isnan(FX)])
    eq(
        run("cvt.rna.tf32.f32 {d},{0};", [U(FX)])[fin],
        ((u + 0x1000) & 0xFFFFE000).astype(np.uint32)[fin],
    )
    p = run("cvt.rn.bf16x2.f32 {d},{0},{1};", [U(FX), U(FY)])
    ok = ~np.isnan(FX) & ~np.isnan(FY)
    uy = U(FY).astype(np.uint64)
    ry = ((uy + 0x7FFF + (uy >> 16 & 1)) >> 16).astype(np.uint32)
    eq(p[ok], (rb.astype(np.uint32) << 16 | ry)[ok])
    eq(run("cvt.sat.u8.s32 {d},{0};", [a]), [max(0, min(255, sg(v))) for v in a])
    eq(run("cvt.s8.s32 {d},{0};", [a]), [sg(v, 8) & M32 for v in a])
    eq(run("cvt.u32.u8 {d},{0};", [a]), [int(v) & 255 for v in a])
    eq(run("cvt.s64.s16 {d},{0};", [a], 64), [sg(v, 16) & M64 for v in a])
    eq(run("cvt.sat.s16.s32 {d},{0};", [a]), [max(-32768, min(32767, sg(v))) & M32 for v in a])
    same(V(run("cvt.rmi.f32.f32 {d},{0};", [U(FX)])), np.floor(FX))
    same(
        V(run("cvt.sat.f32.f32 {d},{0};", [U(FX)])),
        [0 if math.isnan(v) else min(1, max(0, v)) + 0.0 for v in FX],
    )


@pytest.mark.parametrize(
    "cmp",
    ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"],
)
def test_setp_f32(cmp):
    y = np.where(R.rand(len(FX)) < 0.3, FX, FY).astype("f")
    nn = np.isnan(FX) | np.isnan(y)
    base = {"eq": y == FX, "ne": y != FX, "lt": y > FX, "le": y >= FX, "gt": y < FX, "ge": y <= FX}
    r = (
        ~nn
        if cmp == "num"
        else nn
        if cmp == "nan"
        else (base[cmp] & ~nn if cmp in base else base[cmp[:2]] | nn)
    )
    o = run(
        f"setp.{cmp}.f32 %p|%pq,{{0}},{{1}}; selp.b32 {{d}},1,0,%p; selp.b32 %c,2,0,%pq; or.b32 {{d}},{{d}},%c;",
        [U(FX), U(y)],
    )
    np.testing.assert_array_equal(o, np.where(r, 1, 2))


def test_setp_bool():
    o = run(
        "setp.lt.s32 %p,{0},{1}; setp.gt.and.u32 %pq,{0},{2},!%p; selp.b32 {d},1,0,%pq;", [a, b, c]
    )
    np.testing.assert_array_equal(
        o, [int(int(x) > int(z) and not sg(x) < sg(y)) for x, y, z in zip(a, b, c, strict=False)]
    )
    o = run("set.lt.u32.s32 {d},{0},{1};", [a, b])
    np.testing.assert_array_equal(
        o, [M32 if sg(x) < sg(y) else 0 for x, y in zip(a, b, strict=False)]
    )
    o = run("slct.s32.s32 {d},{0},{1},{2};", [a, b, c])
    np.testing.assert_array_equal(
        o, [x if sg(z) >= 0 else y for x, y, z in zip(a, b, c, strict=False)]
    )


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 16, 8, 4])
@pytest.mark.parametrize("delta", [0, 1, 3, 7, 16])
def test_shfl(mode, width, delta):
    x = np.arange(100, 132).astype(np.uint32)
    cl = ((32 - width) << 8) | (0 if mode == "up" else 31)
    o = run(
        "shfl.sync.%s.b32 {d}|%%p,{0},%d,%d,0xffffffff; selp.b32 %%c,1000,0,%%p; add.s32 {d},{d},%%c;"
        % (mode, delta, cl),
        [x],
    )
    ref = []
    for l in range(32):
        seg = l // width * width
        j = {
            "up": l - delta,
            "down": l + delta,
            "bfly": l ^ delta,
            "idx": seg + (delta & (width - 1)),
        }[mode]
        ok = (
            seg <= j
            if mode == "up"
            else j < seg + width
            if mode != "bfly"
            else j <= seg + width - 1
        )
        ref.append((100 + j + 1000) if ok else 100 + l)
    np.testing.assert_array_equal(o, ref)


def test_half_arith():
    h = R.randint(0, 0x7C00, (3, 500)).astype(np.uint16) | (
        R.randint(0, 2, (3, 500)).astype(np.uint16) << 15
    )
    f = h.view(np.float16).astype("d")
    srcs = [x.copy() for x in h]
    with np.errstate(all="ignore"):
        for op, r in (
            ("add.f16 {d},{0},{1};", f[0] + f[1]),
            ("mul.f16 {d},{0},{1};", f[0] * f[1]),
            ("sub.f16 {d},{0},{1};", f[0] - f[1]),
        ):
            np.testing.assert_array_equal(
                run(op, srcs[:2], 16), r.astype(np.float16).view(np.uint16)
            )
        ref = [
            np.float16(float(Fraction(x) * Fraction(y) + Fraction(z)))
            for x, y, z in zip(*f, strict=False)
        ]
        o = run("fma.rn.f16 {d},{0},{1},{2};", srcs, 16)
        np.testing.assert_allclose(o.view(np.float16).astype("d"), np.array(ref, "d"), rtol=0)
