"""Compiled CUDA kernels against numpy, for two architectures."""

from __future__ import annotations

from math import erf, erfc, lgamma

import numpy as np
import pytest
from programs import HERE, bf16, compiled, tf32
from programs import from_bf16 as fbf

from tools import ptxemu


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def m(architecture):
    return supported("kernels.cu", architecture)


@pytest.fixture(scope="module")
def pointwise(architecture):
    return supported("pointwise.cu", architecture)


def supported(name, architecture):
    """Compiled, with no instruction that the emulator does not know."""
    module = compiled(HERE / name, architecture)
    assert not module.unsupported, module.unsupported
    return module


@pytest.fixture
def rng():
    return np.random.default_rng(5)


@pytest.mark.parametrize("n", [1, 31, 32, 37, 128, 1000, 4099])
def test_add(m, n, rng):
    a, b = (rng.random(n, "f") for _ in range(2))
    c = np.full(n, 7, "f")
    s = m.launch("add", (n + 127) // 128, 128, [c, ptxemu.ReadOnly(a), ptxemu.ReadOnly(b), n])
    np.testing.assert_array_equal(c, a + b)
    assert s.classes["fp32_add"][1] == n
    assert s.global_ld["lanes"] == 2 * n
    assert s.global_st["lanes"] == n
    assert s.unique_read_sectors == 2 * ((4 * n + 31) // 32)
    assert s.unique_write_sectors == (4 * n + 31) // 32


PW = [
    np.exp,
    np.tanh,
    np.sin,
    lambda x: np.log(abs(x) + np.float32(1e-3)),
    np.vectorize(erf),
    lambda x: abs(x) ** 1.7,
    np.exp,
    lambda x: 1 / np.sqrt(abs(x) + np.float32(1e-3)),
    lambda x: np.log1p(x * x),
    np.floor,
    np.rint,
    lambda x: np.fmod(x, 3),
    lambda x: np.cos((x.astype("f") * np.float32(1000)).astype("d")),
    np.expm1,
    lambda x: 1 / x,
    lambda x: np.sqrt(abs(x)),
    np.cbrt,
    lambda x: np.trunc(x + np.copysign(0.5, x)),
    np.trunc,
    lambda x: np.arctan2(x, 2),
    np.ceil,
    lambda x: np.sin((x.astype("f") * np.float32(1e7)).astype("d")),
    lambda x: x / 3,
    np.vectorize(lambda v: 1 - erf(v) if v < 2 else erfc(v)),
    np.vectorize(lambda v: lgamma(abs(np.float32(v)) + np.float32(0.1))),
    lambda x: np.log2(abs(x) + np.float32(0.1)),
    np.exp2,
    lambda x: np.arcsin(x / 20),
    lambda x: np.hypot(x, 3),
    lambda x: np.nextafter(x.astype("f"), np.float32(100)),
]


@pytest.mark.parametrize("w", range(len(PW)))
def test_pointwise(pointwise, w):
    n = 777
    x = (np.random.default_rng(w).standard_normal(n) * 4).astype("f")
    o = np.zeros(n, "f")
    pointwise.launch("pw", (n + 255) // 256, 256, [o, x, n, w])
    ref = PW[w](x.astype("d"))
    np.testing.assert_allclose(
        o,
        ref,
        rtol=2e-6 if w not in (6,) else 1e-5,
        atol=3e-6 if w in (2, 3, 12, 21, 24, 25) else 1e-9 if w not in (23,) else 1e-6,
    )


PD = [
    np.exp,
    np.tanh,
    np.sin,
    lambda x: np.log(abs(x) + 1e-3),
    np.vectorize(erf),
    lambda x: abs(x) ** 1.7,
    lambda x: np.sqrt(abs(x)),
    lambda x: 1 / np.sqrt(abs(x) + 1e-3),
    lambda x: 1 / x,
    np.floor,
    lambda x: np.fmod(x, 3),
    lambda x: np.cos(x * 1e7),
    lambda x: x / 3,
    np.rint,
    np.cbrt,
    lambda x: x * x + 1,
]


@pytest.mark.parametrize("w", range(len(PD)))
def test_pointwise_f64(pointwise, w):
    n = 333
    x = np.random.default_rng(w).standard_normal(n) * 4
    o = np.zeros(n)
    pointwise.launch("pwd", (n + 255) // 256, 256, [o, x, n, w])
    np.testing.assert_allclose(o, PD[w](x), rtol=1e-14, atol=1e-15 if w not in (2, 11) else 1e-14)


@pytest.mark.parametrize(
    ("n", "g", "b"), [(1, 1, 32), (1000, 1, 256), (100003, 7, 512), (5000, 3, 1024)]
)
def test_reduce(m, n, g, b, rng):
    x = rng.random(n, "f")
    o = np.zeros(1, "f")
    s = m.launch("red", g, b, [o, x, n], order="random", random_schedule=True)
    np.testing.assert_allclose(o[0], x.astype("d").sum(), rtol=1e-5)
    assert s.classes["atom"][1] == g


@pytest.mark.parametrize("shape", [(16, 16, 16), (33, 47, 29), (64, 80, 100), (1, 1, 1)])
def test_matmul_f32(m, shape, rng):
    A, B, K = shape
    a = rng.standard_normal((A, K), "f")
    b = rng.standard_normal((K, B), "f")
    c = np.zeros((A, B), "f")
    s = m.launch("mm", ((B + 15) // 16, (A + 15) // 16), (16, 16), [c, a, b, A, B, K])
    np.testing.assert_allclose(c, a.astype("d") @ b.astype("d"), atol=2e-5, rtol=1e-4)
    assert s.fp32_flops >= 2 * A * B * K
    assert s.shared_ld["requests"] > 0


@pytest.mark.parametrize(
    "shape", [(64, 32, 32), (64, 32, 128), (100, 40, 72), (5, 8, 16), (130, 72, 200)]
)
@pytest.mark.parametrize("k", ["mma_nt", "mma_nn"])
def test_mma_pipeline(m, shape, k, rng):
    A, B, K = shape
    a = rng.standard_normal((A, K), "f")
    b = rng.standard_normal((K, B), "f")
    c = np.zeros((A, B), "f")
    bb = bf16(b if k == "mma_nn" else np.ascontiguousarray(b.T))
    s = m.launch(
        k, ((B + 31) // 32, (A + 63) // 64), 128, [c, bf16(a), bb, A, B, K], random_schedule=True
    )
    np.testing.assert_allclose(c, fbf(bf16(a)).astype("d") @ fbf(bf16(b)).astype("d"), atol=2e-4)
    assert s.classes["cp_async"][1] > 0
    assert s.classes["ldmatrix"][0] > 0
    assert s.shared_ld["conflicts"] == 0
    assert s.cp_async_pending_at_exit == 0
    # Rows of 80 bytes: ldmatrix has no conflict, but each quarter of a warp, which writes 16 bytes
    # per lane by cp.async, hits banks 0 to 3 twice.
    assert s.shared_st["conflicts"] == s.shared_st["ideal"]


def test_mma_misc(m, rng):
    a = tf32(rng.standard_normal((16, 8)))
    b = tf32(rng.standard_normal((8, 8)))
    c = np.zeros((16, 8), "f")
    ha = rng.standard_normal((16, 8)).astype(np.float16)
    hb = rng.standard_normal((8, 8)).astype(np.float16)
    hc = np.zeros((16, 8), np.float16)
    ia = rng.integers(-128, 128, (16, 16), np.int8)
    ib = rng.integers(-128, 128, (16, 8), np.int8)
    ic = np.zeros((16, 8), np.int32)
    s = m.launch("mma_misc", 1, 32, [c, a, b, hc, ha, hb, ic, ia, ib])
    np.testing.assert_allclose(c, a.astype("d") @ b, atol=1e-5)
    np.testing.assert_allclose(hc, ha.astype("d") @ hb, atol=2e-2)
    np.testing.assert_array_equal(ic, ia.astype(int) @ ib.astype(int))
    assert len(s.mma) == 3


@pytest.mark.parametrize("n", [32, 256, 512])
def test_atomics(m, n):
    i = np.zeros(16, np.int32)
    i[6] = -1
    f = np.zeros(1, "f")
    d = np.zeros(1)
    u = np.zeros(2, np.uint64)
    h = np.zeros(2, np.float16)
    b = np.zeros(2, np.uint16)
    m.launch("atomics", n // 32 if n < 256 else n // 256, min(n, 256), [i, f, d, u, h, b, n])
    t = np.arange(n)
    expected = [t.sum(), n - 1, -(n - 1), -1, np.bitwise_xor.reduce(t), n % 7, -256, 3 * n]
    assert list(i[:8]) == expected
    assert f[0] == n / 2
    assert d[0] == 0.25 * t.sum()
    assert u[0] == int(t.sum()) << 30
    assert u[1] == (n - 1) << 33
    assert h[0] == n
    assert fbf(b)[0] == min(n, 256)
    assert (i[8:] == n // 8).all()


def test_divergence(m, rng):
    n = 1000
    x = rng.integers(1, 5000, n, np.int32)
    o = np.zeros(2 * n, np.int32)
    s = m.launch("collatz", 8, 128, [o, x, n])

    def cz(v):
        c = 0
        while v != 1:
            v = 3 * v + 1 if v & 1 else v >> 1
            c += 1
        return c

    assert (o[:n] == [cz(int(v)) for v in x]).all()
    assert (o[n : n + 992] == 32).all()
    assert s.divergent_branches > 0
    o = np.zeros(n, np.int32)
    m.launch("nested", 8, 128, [o, n])

    def ne(i):
        s = 0
        for a in range(i % 7):
            for b in range(i % 5):
                if (a + b) % 3 == 0:
                    continue
                if a * b > 10:
                    return s
                s += a * b + 1
            s += 100
        return s

    assert (o == [ne(i) for i in range(n)]).all()


def test_switch(m, rng):
    n = 777
    x = rng.integers(-2, 14, n, np.int32)
    o = np.zeros(n, np.int32)
    m.launch("sw", 4, 256, [o, x, n])

    def brev(v):
        return int(f"{v:032b}"[::-1], 2)

    for i in range(n):
        v = int(x[i])
        r = {
            0: n * 7,
            1: n * n,
            2: bin(n).count("1") + 100,
            3: brev(n) ^ 3,
            4: n // (i + 1),
            5: n % (i + 1),
            6: (n & -n).bit_length(),
            7: i,
            8: -n,
            9: 32 - (i + 1).bit_length(),
            10: ((n << 32 | i) << 5 >> 32),
        }.get(v, 12345)
        assert o[i] == np.uint32(r & 0xFFFFFFFF).astype(np.int32), (i, v)


def test_int64(m, rng):
    n = 300
    x = rng.integers(-(2**62), 2**62, n)
    q = np.zeros(n, np.int64)
    u = np.zeros(n, np.uint64)
    m.launch("i64", 3, 128, [q, u, x, n])
    W = 2**64

    def s64(v):
        v %= W
        return v - W if v >= W // 2 else v

    for i in range(n):
        a, b = int(x[i]), int(x[n - 1 - i])
        d = b | 1
        qd = abs(a) // abs(d) * (1 if (a < 0) == (d < 0) else -1)
        t = qd
        t += a - qd * d
        t ^= (a * b) >> 64
        t = s64(t + (a >> (i & 63)))
        t ^= (b % W) >> (i & 63)
        assert q[i] == s64(t)
        w = (a % W) * (b % W) + i
        assert int(u[i]) == (w >> 64) ^ (w % W)


@pytest.mark.parametrize("k", [1, 5, 77])
def test_structs(m, k, rng):
    xs, p, o0 = (rng.random(size, "f") for size in (8, 64, 64))
    o = o0.copy()
    tab = m.global_view("tab", np.float32)
    tab[:] = np.arange(16)
    g = m.global_view("gctr", np.int32)
    g[0] = 0
    P = ptxemu.Struct(*[("f", v) for v in xs], ("i", 5), ("Q", p))
    s = m.launch(
        "structs",
        1,
        64,
        [P, o, k],
        shared_bytes=256,
        uninit_local=True if k % 2 and k != 77 else "warn",
    )
    xq = xs.copy()
    xq[k & 7] += 1
    local = np.zeros(32, "f")
    for i in range(32):
        local[(i * k) & 31] = i * 0.5
    v = (
        sum(xq[(i + k) & 7] * o0 for i in range(5))
        + (1 if k > 3 else 0)
        + np.tile(local, 2)
        + xs[k & 7]
        + np.tile(np.arange(16), 4)
        + p
    )
    np.testing.assert_allclose(o, v + v[np.arange(64) ^ 1], rtol=1e-5)
    assert g[0] == 64
    assert s.printed == (f"hello 77 {o0[3]:.2f} str\n" if k == 77 else "")
    assert s.local_st_bytes > 0


def test_halves(m, rng):
    n = 500
    x = 2 * rng.standard_normal(n, "f")
    a = np.zeros(n, np.float16)
    b = np.zeros(n, np.uint16)
    c = np.zeros((n, 2), np.float16)
    d = np.zeros((n, 2), np.uint16)
    m.launch("halves", 2, 256, [a, b, c, d, x, n])
    h = x.astype(np.float16).astype("d")
    g = fbf(bf16(x)).astype("d")
    np.testing.assert_allclose(a, np.where(h > 1, np.exp(h), h * h + h), rtol=3e-3, atol=1e-3)
    np.testing.assert_allclose(fbf(b), g * g + g, rtol=2e-2, atol=1e-2)
    np.testing.assert_array_equal(c[:, 0], (h * 2 + 1).astype(np.float16))
    np.testing.assert_array_equal(fbf(d[:, 0]), np.maximum(g, 0.25).astype("f"))
    np.testing.assert_array_equal(fbf(d[:, 1]), np.maximum(-g, 0.5).astype("f"))


def test_votes(m, rng):
    T = 96
    x = rng.integers(0, 9, T, np.int32)
    o = np.zeros(3 * T, np.uint32)
    m.launch("votes", 1, T, [o, x])
    for t in range(T):
        w = x[t // 32 * 32 :][:32]
        lane = t % 32
        r = sum(1 << i for i in range(32) if w[i] > 3) + int(w.sum()) * 3
        r ^= sum(1 << i for i in range(32) if w[i] == w[lane])
        r += int((w > 5).any()) * 17 + int((w >= 0).all()) * 29
        assert o[t] == r & 0xFFFFFFFF
        assert o[T + t] == (x > 1).sum() * 100 + int((x == 7).any()) * 10 + int((x < 9).all())
        assert o[2 * T + t] == (
            max(i for i in range(32) if i % 2 and w[i] == w[lane]) + t // 32 * 32
            if t % 2
            else w[lane & ~3]
        )


@pytest.mark.parametrize(("stride", "sectors"), [(1, 4), (2, 8), (8, 32), (32, 32), (0, 1)])
def test_sectors_of_a_stride(m, rng, stride, sectors):
    x = rng.random(32 * max(stride, 1), "f")
    found = m.launch("strided", 1, 32, [np.zeros(32, "f"), x, stride])
    assert found.global_ld["sectors"] == sectors
    used = 4 if stride == 0 else 128  # bytes
    assert abs(found.load_efficiency - used / (32 * sectors)) < 1e-9


@pytest.mark.parametrize(
    ("stride", "wavefronts"), [(1, 1), (2, 2), (4, 4), (32, 32), (33, 1), (17, 1), (0, 1)]
)
def test_wavefronts_of_a_stride(m, stride, wavefronts):
    """In shared memory; lanes at one address share one access."""
    arguments = [np.zeros(32, "f"), stride]
    size = 4 * 32 * max(stride, 1)
    found = m.launch("strided_shared", 1, 32, arguments, shared_bytes=size)
    assert found.shared_ld["wavefronts"] == wavefronts
    assert found.shared_st["conflicts"] == wavefronts - 1


def test_sectors_of_vectors(m, rng):
    x, o = rng.random(128, "f"), np.zeros(128, "f")
    found = m.launch("vectors", 1, 32, [o, x])
    assert (o == x).all()
    assert found.global_ld["sectors"] == 16
    assert found.load_efficiency == 1


def test_blocks_that_wait_for_each_other(m):
    c = np.zeros(1, np.int32)
    x = np.zeros(6, np.int32)
    o = np.zeros(6, np.int32)
    m.launch("grid_sync", 6, 1, [c, x, o], resident_blocks=6)
    assert list(o) == [2, 3, 4, 5, 6, 1]
    c[:] = 0
    with pytest.raises(ptxemu.Deadlock):
        m.launch("grid_sync", 6, 1, [c, x, o], max_warp_insns=200000)
