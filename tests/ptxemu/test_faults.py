"""Every planted fault is reported, and its twin without the fault runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from programs import HERE, bf16, compiled, ptx_of

from tools import ptxemu


@pytest.fixture(scope="module")
def m():
    return compiled(HERE / "faults.cu")


def F(n, v=1.0):
    return np.full(n, v, "f")


OOB, MIS, UN, RACE, DL = (
    ptxemu.OutOfBounds,
    ptxemu.Misaligned,
    ptxemu.UninitRead,
    ptxemu.RaceError,
    ptxemu.Deadlock,
)
CASES = [
    ("oob_r", 32, lambda: [F(32), F(40), 9], 0, OOB),
    ("oob_r", 32, lambda: [F(32), F(41), 9], 0, None),
    ("oob_w", 64, lambda: [F(40), 40], 0, OOB),
    ("oob_w", 64, lambda: [F(41), 40], 0, None),
    ("oob_neg", 32, lambda: [F(32), F(32)], 0, OOB),
    ("nullp", 1, lambda: [F(1), None], 0, OOB),
    ("ovf", 32, lambda: [F(32), F(64), 50000], 0, OOB),
    ("misal", 8, lambda: [F(32), F(40), 1], 0, MIS),
    ("misal", 8, lambda: [F(32), F(40), 4], 0, None),
    ("misal", 8, lambda: [F(32), F(41)[1:], 0], 0, MIS),
    ("misal_sh", 32, lambda: [F(32), 2], 0, MIS),
    ("misal_sh", 32, lambda: [F(32), 4], 0, None),
    ("sh_oob", 32, lambda: [F(32), 33], 0, OOB),
    ("sh_oob", 32, lambda: [F(32), -1], 0, OOB),
    ("dyn_oob", 64, lambda: [F(64)], 128, OOB),
    ("dyn_oob", 64, lambda: [F(64)], 256, None),
    ("uninit", 128, lambda: [F(128)], 0, UN),
    ("race_wr", 128, lambda: [F(128), F(128)], 0, (RACE, UN)),
    ("race_rw", 128, lambda: [F(128), F(128), 2], 0, RACE),
    ("race_rw", 128, lambda: [F(128), F(128), 1], 0, None),
    ("race_ww", 64, lambda: [F(64)], 0, RACE),
    ("race_ww", 32, lambda: [F(64)], 0, None),
    ("race_named", 128, lambda: [F(128)], 0, (RACE, UN)),
    ("ok_named", 128, lambda: [F(128)], 0, None),
    ("pc_ok", 64, lambda: [F(32), 3], 0, None),
    ("pc_bad", 64, lambda: [F(32), 1], 0, (RACE, UN)),
    ("ok_half", 64, lambda: [np.zeros(64, np.uint16)], 0, None),
    ("ok_warp", 128, lambda: [F(128)], 0, None),
    ("cp_nowait", 32, lambda: [F(128), F(128)], 0, RACE),
    ("cp_nobar", 64, lambda: [F(256), F(256)], 0, (RACE, UN)),
    ("cp_overwrite", 64, lambda: [F(256), F(256), 2], 0, RACE),
    ("cp_overwrite", 64, lambda: [F(256), F(256), 1], 0, None),
    ("cp_oob", 32, lambda: [F(128), F(127)], 0, OOB),
    ("cp_oob", 32, lambda: [F(128), F(128)], 0, None),
    ("divbar", 32, lambda: [F(32)], 0, DL),
    ("missbar", 128, lambda: [F(128)], 0, DL),
    ("badshfl", 32, lambda: [F(32)], 0, DL),
    ("locun", 32, lambda: [F(32), 1], 0, UN),
    ("locun", 8, lambda: [F(32), 1], 0, None),
    ("asrt", 32, lambda: [np.arange(32, dtype=np.int32), 31], 0, ptxemu.DeviceAssert),
    ("asrt", 32, lambda: [np.arange(32, dtype=np.int32), 32], 0, None),
    ("trapk", 1, lambda: [np.array([5], np.int32)], 0, ptxemu.PtxEmuError),
    ("wmask", 32, lambda: [ptxemu.ReadOnly(F(32)), F(32)], 0, OOB),
    ("readun", 32, lambda: [F(32), ptxemu.Uninit(F(32)), 31], 0, UN),
    ("readun", 32, lambda: [F(32), ptxemu.Uninit(F(32)), 32], 0, None),
]


@pytest.mark.parametrize(
    ("name", "block", "arguments", "shared_bytes", "error"),
    CASES,
    ids=[f"{i}-{case[0]}-{'ok' if case[4] is None else 'bug'}" for i, case in enumerate(CASES)],
)
def test_case(m, name, block, arguments, shared_bytes, error):
    if error is None:
        m.launch(name, 1, block, arguments(), shared_bytes=shared_bytes)
        return
    with pytest.raises(error) as found:
        m.launch(name, 1, block, arguments(), shared_bytes=shared_bytes)
    assert name in str(found.value)
    assert "line" in str(found.value)


def test_deleted_sync_is_reported():
    """Right PTX without one of its synchronisations: every deletion that matters is reported."""
    lines = ptx_of(HERE / "kernels.cu").split("\n")
    entries = [i for i, line in enumerate(lines) if ".visible .entry" in line]
    begin = next(i for i in entries if "mma_nt(" in lines[i])
    end = min([i for i in entries if i > begin] + [len(lines)])
    rows, columns, depth = 70, 40, 128
    rng = np.random.default_rng(6)
    x, y = (bf16(rng.standard_normal((n, depth))) for n in (rows, columns))
    places = [
        i for i in range(begin, end) if "bar.sync" in lines[i] or "cp.async.wait_group" in lines[i]
    ]
    assert len(places) >= 4
    for i in places:
        module = ptxemu.Module("\n".join([*lines[:i], "//", *lines[i + 1 :]]))
        arguments = [np.zeros((rows, columns), "f"), x, y, rows, columns, depth]
        with pytest.raises((RACE, UN)):
            module.launch("mma_nt", (2, 2), 128, arguments, random_schedule=True)


def test_oob_message(m):
    with pytest.raises(OOB) as e:
        m.launch("oob_r", 1, 32, [F(32), F(40), 9])
    s = str(e.value)
    assert "arg1" in s
    assert "thread (31,0,0)" in s
    assert "block (0,0,0)" in s
    assert "byte offset 160" in s
    assert "ld.global" in s
    assert ".cu:" in s


def test_uninit_across_blocks(m):
    with pytest.raises(UN):
        m.launch("uninit2", 2, 128, [F(128), 0])
    m.launch("uninit2", 1, 128, [F(128), 0])
    m.launch("uninit2", 2, 128, [F(128), 0], uninit_shared=False)


def test_race_record(m):
    s = m.launch("race_rw", 1, 128, [F(128), F(128), 3], races="record")
    assert s.race_count > 0
    assert s.races[0]["kind"] in ("read->write", "write->read")
    assert "shared" in s.races[0]["text1"]
    assert m.launch("race_rw", 1, 128, [F(128), F(128), 3], races="off").race_count == 0


def test_global_ww(m):
    assert m.launch("gww", 2, 32, [F(1)]).global_ww_conflicts > 0
    s = m.launch("gww_same", 2, 32, [F(1)])
    assert s.global_ww_conflicts == 0
    assert s.global_ww_same_value > 0
    assert m.launch("gww_ok", 3, 64, [F(3)]).global_ww_conflicts == 0


def test_infinite_loop(m):
    with pytest.raises(DL):
        m.launch("inf", 1, 32, [np.zeros(2, np.int32)], max_warp_insns=100000)


def test_views(m):
    b = np.zeros(100, "f")
    v = b[10:20]
    with pytest.raises(OOB):
        m.launch("oob_w", 1, 32, [v, 10])
    m.launch("oob_w", 1, 32, [b[10:21], 10])
    assert b[10:21].all()
    assert not b[:10].any()
    assert not b[21:].any()
    t = torch.zeros(100)
    with pytest.raises(OOB):
        m.launch("oob_w", 1, 32, [t[10:20], 10])
    m.launch("oob_w", 1, 32, [t[10:21], 10])
    assert t.sum() > 0
    assert t[:10].sum() == 0


def test_unsupported_is_loud():
    good = ptx_of('extern "C" __global__ void k(int*o){o[0]=o[1]+1;}')
    m = ptxemu.Module(good.replace("st.global", "st.frobnicate.global"))
    assert m.unsupported
    with pytest.raises(ptxemu.Unsupported) as e:
        m.launch("k", 1, 1, [np.zeros(2, np.int32)])
    assert "frobnicate" in str(e.value)
    # Also one that it reads but does not know.
    unknown = "vadd4.u32.u32.u32 %r1, %r2, %r2, %r2;\n\tret;"
    assert "vadd4" in str(ptxemu.Module(good.replace("ret;", unknown)).unsupported)


def test_global_read_race(m):
    s = m.launch("halo", 4, 32, [F(128)])
    assert s.global_rw_unordered == 3
    assert "unordered" in s.warnings[0]
    assert m.launch("halo", 1, 32, [F(32)]).global_rw_unordered == 0


def test_table_of_pointers(m):
    a, b = F(32, 9), F(32, 9)
    m.launch("through_table", 1, 32, [ptxemu.PtrTable([a, None, b]), 3])
    assert (a == 0).all()
    assert (b == 2).all()
    with pytest.raises(OOB):
        m.launch("through_table", 1, 32, [ptxemu.PtrTable([a, F(31)]), 2])
    with pytest.raises(OOB):
        m.launch("through_table", 1, 32, [ptxemu.PtrTable([a]), 2])
