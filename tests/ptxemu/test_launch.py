"""The emulator's front: what it says where it cannot run, and how arguments become bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tools import ptxemu
from tools.ptxemu import library
from tools.ptxemu.memory import Memory, pack
from tools.ptxemu.module import Options


def test_a_machine_without_the_means_gets_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    assert ptxemu.obstacle() == "no g++ on this machine"
    monkeypatch.setattr(library.shutil, "which", lambda name: "/usr/bin/g++")
    monkeypatch.setattr(library.platform, "machine", lambda: "arm64")
    assert "x86-64" in ptxemu.obstacle()
    monkeypatch.setattr(library.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(library.sys, "platform", "linux")
    monkeypatch.setattr(library, "CPU_INFO", tmp_path / "cpuinfo")
    library.CPU_INFO.write_text("processor: 0\nflags\t\t: sse2 avx f16c fma\n")
    assert "AVX2" in ptxemu.obstacle()
    library.CPU_INFO.write_text("processor: 0\nflags\t\t: sse2 avx avx2 f16c fma\n")
    assert ptxemu.obstacle() is None


def parameter(kind, size, array=False):
    return {"name": "p", "type": kind, "size": size, "array": array}


@pytest.mark.parametrize(
    ("kind", "size", "value", "packed"),
    [
        ("u32", 4, 7, b"\7\0\0\0"),
        ("s32", 4, -1, b"\xff" * 4),
        ("f32", 4, 1.0, np.float32(1).tobytes()),
        ("b32", 4, 1.0, np.float32(1).tobytes()),
        ("b16", 2, 1.0, np.float16(1).tobytes()),
        ("u64", 8, None, bytes(8)),
        ("u16", 2, np.uint16(513), b"\1\2"),
    ],
)
def test_scalars(kind, size, value, packed):
    assert pack(parameter(kind, size), value, Memory(), 0) == packed


def test_a_float_is_no_integer():
    with pytest.raises(ptxemu.PtxEmuError, match=r"arg3\(p\): a float .* \.u32"):
        pack(parameter("u32", 4), 1.5, Memory(), 3)


def test_a_structure_is_aligned_as_in_c():
    value = ptxemu.Struct(("f", 1.0), ("q", 5))
    packed = pack(parameter("b8", 24, array=True), value, Memory(), 0)
    assert packed == np.float32(1).tobytes() + bytes(4) + b"\5" + bytes(7 + 8)
    with pytest.raises(ptxemu.PtxEmuError, match="16 bytes for a parameter of 12"):
        pack(parameter("b8", 12, array=True), value, Memory(), 0)


@pytest.mark.parametrize("whole", [np.zeros(16, "f"), torch.zeros(16)], ids=["numpy", "torch"])
def test_views_share_the_storage_of_their_base(whole):
    memory = Memory()
    first, second = memory.add(whole[4:6], "a"), memory.add(whole[5:10], "b")
    assert second - first == 4
    assert len(memory) == 1
    (region,) = memory.regions()
    assert region.name == b"a+b"
    assert region.number_of_intervals == 1, "they overlap"
    begin = region.intervals[0]
    assert region.intervals[1] - begin == 6 * 4
    assert region.va + begin == first


def test_words_of_options_are_known():
    assert Options().numbers()[0] == 1, "races are recorded"
    assert Options(races="off", order="random").numbers()[0] == 0
    with pytest.raises(ValueError, match="order must be one of"):
        Options(order="backwards")
