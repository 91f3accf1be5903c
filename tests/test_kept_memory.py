"""Gradients of the cpu backend in memory that is kept between calls.

Every gradient is a multiple of one that was computed first, with a factor that is a power of two:
so its bits say whose it is, and memory that was lent twice shows.
"""

from __future__ import annotations

import copy
import os
import pickle
import random
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from targets import runs_on
from torch import Tensor

import salkernels
from salkernels.backends import cpu
from salkernels.reference import Outputs

pytestmark = [
    runs_on("cpu", "cpu"),
    pytest.mark.skipif(sys.platform != "linux", reason="memory is kept on Linux only"),
]
MB = 1 << 20
SIDE = 128  # of maps; 4 MB for 64 channels in fp32
WINDOW = (2, 2)
EPS = 1e-12


@pytest.fixture(autouse=True)
def _start_with_nothing_kept() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cpu.release_memory()
    yield
    assert cpu.kept_bytes() <= 160 * MB, "more is kept than any backward here needs"
    cpu.release_memory()
    torch.set_num_threads(threads)


def _maps(samples: int, channels: int, layout: str = "nchw") -> Tensor:
    """(1, samples, channels, SIDE, SIDE), 64 KB for each sample and channel."""
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(1, samples, channels, SIDE, SIDE, generator=generator)
    return x.movedim(2, -1).contiguous().movedim(-1, 2) if layout == "channels_last" else x


class Call:
    """Gradients of one forward, times any factor."""

    def __init__(self, query: Tensor, key: Tensor | None = None) -> None:
        self.query, self.key = query, key
        self.found = Outputs(*cpu.match(query, key, None, None, WINDOW, EPS))
        self.expected = [g if g is None else g.clone() for g in self.both(1.0)]

    def both(self, factor: float) -> tuple[Tensor, Tensor | None]:
        _, max_sim, argmax, norm = self.found
        grad_sim = torch.full_like(max_sim, factor)
        where = (max_sim, argmax, norm, WINDOW, EPS)
        return cpu.match_backward(grad_sim, self.query, self.key, None, None, *where)

    def __call__(self, factor: float = 1.0) -> Tensor:
        return self.both(factor)[0]

    def is_intact(self, grad: Tensor, factor: float, which: int = 0) -> bool:
        expected = self.expected[which]
        return expected is not None and torch.equal(grad, expected * factor)


@pytest.fixture(scope="module")
def call() -> Call:
    return Call(_maps(2, 256))  # 32 MB


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_memory_that_was_freed_is_used_again(layout):
    call = Call(_maps(2, 256, layout))
    grad = call(2.0)
    assert grad.stride() == call.query.stride()
    assert grad.dtype == torch.float32
    assert not grad.requires_grad
    address = grad.data_ptr()
    assert address % (2 * MB) == 0, "not in large pages"
    assert cpu.kept_bytes() == 0
    grad.fill_(float("nan"))  # an element that the next call does not write shows
    del grad
    assert cpu.kept_bytes() == 32 * MB
    again = call(4.0)
    assert again.data_ptr() == address
    assert call.is_intact(again, 4.0)
    assert cpu.kept_bytes() == 0


@pytest.mark.parametrize("seed", range(2))
def test_what_is_alive_is_never_lent_again(call, seed):
    """Gradients are made, kept whole or in part, and freed, in random order."""
    choose = random.Random(seed)
    alive: list[tuple[Tensor, float]] = []
    reused, addresses = 0, set()
    for step in range(16):
        factor = 2.0 ** choose.randrange(-20, 20)
        grad = call(factor)
        reused += grad.data_ptr() in addresses
        addresses.add(grad.data_ptr())
        alive.append((grad, factor))
        del grad
        while len(alive) > choose.randrange(4):
            alive.pop(choose.randrange(len(alive)))
        assert cpu.kept_bytes() <= 32 * MB, f"step {step}"
        assert all(call.is_intact(*one) for one in alive), f"step {step}"
    assert reused > 3, "hardly anything was used again: nothing was tested"


@pytest.mark.parametrize(
    "hold",
    [
        lambda grad: grad[0, 1, 3:5],
        lambda grad: grad.detach().view(-1),
        lambda grad: grad.numpy(),
        lambda grad: grad.untyped_storage(),
        lambda grad: torch.from_dlpack(grad.__dlpack__()),
        lambda grad: memoryview(grad.numpy()),
    ],
    ids=["slice", "view", "numpy", "storage", "dlpack", "memoryview"],
)
def test_any_holder_keeps_it(call, hold):
    grad = call()
    address = grad.data_ptr()
    held = hold(grad)
    del grad
    assert cpu.kept_bytes() == 0
    assert call(2.0).data_ptr() != address
    cpu.release_memory()
    del held
    assert cpu.kept_bytes() == 0, "released: nothing is kept before the next backward"


def test_at_rest_there_is_no_more_than_the_latest_backward_needed(call):
    several = [call(2.0**i) for i in range(4)]
    assert len({grad.data_ptr() for grad in several}) == 4
    assert all(call.is_intact(grad, 2.0**i) for i, grad in enumerate(several))
    del several
    assert cpu.kept_bytes() == 32 * MB
    larger = Call(_maps(2, 384))()  # 48 MB, for which 32 MB are too small
    assert cpu.kept_bytes() == 0, "what does not fit goes back before it is replaced"
    del larger
    assert cpu.kept_bytes() == 48 * MB
    call()  # 32 MB would waste a third of it
    assert cpu.kept_bytes() == 32 * MB


def test_a_block_that_is_little_too_large_is_used(call):
    larger = Call(_maps(2, 304))()  # 38 MB
    address = larger.data_ptr()
    del larger
    for factor in (1.0, 2.0):
        grad = call(factor)
        assert grad.data_ptr() == address
        assert call.is_intact(grad, factor)
        del grad
        assert cpu.kept_bytes() == 38 * MB


def test_queries_and_keys_have_a_block_each():
    call = Call(_maps(2, 256), _maps(3, 256))  # 32 MB and 48 MB
    addresses = set()
    for factor in (1.0, 2.0, 4.0):
        query, key = call.both(factor)
        assert key is not None
        assert call.is_intact(query, factor)
        assert call.is_intact(key, factor, which=1)
        addresses.add((query.data_ptr(), key.data_ptr()))
        assert cpu.kept_bytes() == 0
        del query, key
        assert cpu.kept_bytes() == 80 * MB
    assert len(addresses) == 1
    one = Call(_maps(2, 256))()  # which needs one of the two
    assert cpu.kept_bytes() == 0
    del one


def test_small_gradients_are_left_to_malloc(call):
    call()
    small = Call(_maps(2, 248))()  # 31 MB
    assert cpu.kept_bytes() == 32 * MB, "and what is kept is not given up for them"
    del small
    assert cpu.kept_bytes() == 32 * MB


@pytest.mark.parametrize(
    "strange",
    [
        lambda x: x[:, :, :256],
        lambda x: x[..., :1].expand(1, 2, 512, SIDE, SIDE),
        lambda x: torch.cat((x, x), dim=-1)[..., ::2],
    ],
    ids=["slice", "expanded", "every other"],
)
def test_features_with_gaps_get_the_layout_of_empty_like(strange):
    x = strange(_maps(2, 512))
    grad = Call(x)()
    assert grad.stride() == torch.empty_like(x).stride()
    del grad
    assert cpu.kept_bytes() == 0


def test_dense_features_keep_their_layout():
    x = _maps(2, 256).permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    grad = Call(x)()
    assert grad.stride() == x.stride() == torch.empty_like(x).stride()
    del grad
    assert cpu.kept_bytes() == 32 * MB


def test_release_gives_back_what_is_kept(call):
    grad = call()
    assert salkernels.release_memory() == 0, "it is in use"
    assert call.is_intact(grad, 1.0)
    del grad
    assert cpu.kept_bytes() == 0
    call()
    before = _resident()
    assert salkernels.release_memory() == 32 * MB
    assert before - _resident() > 28 * MB
    assert cpu.kept_bytes() == salkernels.release_memory() == 0
    assert call.is_intact(call(2.0), 2.0)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_threads_do_not_share_a_block(call):
    wrong: list[float] = []

    def work(seed: int) -> None:
        choose = random.Random(seed)
        last = call(1.0), 1.0
        for _ in range(4):
            factor = 2.0 ** choose.randrange(-20, 20)
            grad = call(factor)
            wrong.extend(f for g, f in ((grad, factor), last) if not call.is_intact(g, f))
            last = grad, factor

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cpu.kept_bytes() == 32 * MB


# ---- What torch does with gradients --------------------------------------------------------------


def _features(layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    x = torch.randn(2, 256, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=layout).requires_grad_()


PAIRS = ~torch.eye(2, dtype=torch.bool)


def _loss(x: Tensor) -> Tensor:
    return salkernels.wla_set_loss(x, PAIRS, 2, backend="cpu")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_accumulate(layout):
    x = _features(layout)
    _loss(x).backward()
    first = x.grad.clone()
    held = x.grad
    address = held.data_ptr()
    for count in (2, 3, 4):
        _loss(x).backward()
        torch.testing.assert_close(x.grad, count * first)
        assert x.grad.data_ptr() == address, "the caller's gradient was moved"
    x.grad = None
    _loss(x).backward()
    assert x.grad.data_ptr() != address
    torch.testing.assert_close(held, 4 * first)


def test_a_hook_may_keep_the_gradient():
    x = _features()
    kept: list[Tensor] = []
    x.register_hook(kept.append)
    for factor in (1.0, 2.0, 4.0):
        torch.autograd.grad(factor * _loss(x), x)
    assert torch.equal(kept[1], 2 * kept[0])
    assert torch.equal(kept[2], 4 * kept[0])


def test_compiled_steps():
    x = _features()
    (expected,) = torch.autograd.grad(3 * _loss(x * 2), x)
    step = torch.compile(lambda x: 3 * _loss(x * 2), fullgraph=True, backend="aot_eager")
    held = [torch.autograd.grad(step(x), x)[0] for _ in range(3)]
    for grad in held:
        torch.testing.assert_close(grad, expected)


def test_an_optimizer_on_the_features_themselves():
    """Momentum starts as a copy; decay and averages change the gradient in place."""
    paths = []
    for keep in (True, False):
        x = torch.nn.Parameter(_features().detach())
        optimizer = torch.optim.SGD([x], lr=10.0, momentum=0.9, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad(set_to_none=True)
            _loss(x).backward()
            torch.nn.utils.clip_grad_norm_([x], 1e-3)
            if not keep:
                x.grad = x.grad.clone()
            optimizer.step()
        paths.append(x.detach())
    assert torch.equal(*paths)


def test_copies_are_copies(call):
    grad = call()
    copies = [copy.deepcopy(grad), pickle.loads(pickle.dumps(grad)), grad.clone()]
    del grad
    call(2.0)
    assert all(call.is_intact(one, 1.0) for one in copies)


def test_shared_memory_is_a_copy(call):
    """As a queue of `torch.multiprocessing` makes one; the block is free then."""
    grad = call()
    address = grad.data_ptr()
    grad.share_memory_()
    assert grad.is_shared()
    assert call.is_intact(grad, 1.0)
    assert cpu.kept_bytes() == 32 * MB
    again = call(2.0)
    assert again.data_ptr() == address
    assert call.is_intact(again, 2.0)
    assert call.is_intact(grad, 1.0)


def test_it_can_shrink_and_be_set_but_not_grow(call):
    grad = call()
    grad.resize_(1, 1, 256, SIDE, SIDE)
    assert torch.equal(grad, call.expected[0][:, :1])
    with pytest.raises(RuntimeError, match="not resizable"):
        grad.resize_(1, 4, 256, SIDE, SIDE)
    grad = call(2.0)
    grad.set_(torch.ones(3))
    assert torch.equal(grad, torch.ones(3))
    assert cpu.kept_bytes() == 32 * MB


# ---- Processes -----------------------------------------------------------------------------------

START = """
    import os, sys
    import torch
    sys.path.insert(0, {tests!r})
    from test_kept_memory import MB, Call, _maps, cpu
    torch.set_num_threads(1)
    call = Call(_maps(2, 256))
    """


def _run(code: str, folder: Path | None = None, **variables: str) -> None:
    start = textwrap.dedent(START).format(tests=str(Path(__file__).parent))
    run = subprocess.run(
        [sys.executable, "-c", start + textwrap.dedent(code)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_switched_off_in_a_process():
    code = """
        held = call(2.0)
        assert call.is_intact(held, 2.0) and held.untyped_storage().resizable()
        del held
        assert cpu.kept_bytes() == cpu.release_memory() == 0
        """
    _run(code, SALKERNELS_KEEP_MEMORY="0")


def test_a_mistyped_switch_is_said(monkeypatch):
    monkeypatch.setenv("SALKERNELS_KEEP_MEMORY", "off")
    with pytest.warns(UserWarning, match="must be 0 or 1, got 'off'; memory is kept"):
        cpu._tell_unknown_switch()


def test_a_fork_has_copies_of_its_own_in_a_process():
    """The child's gradients go to the same addresses, and the parent's must not change."""
    code = """
        import threading, time
        held = call(2.0)
        call(4.0)
        assert cpu.kept_bytes() == 32 * MB
        running = True
        def churn():
            while running:
                call(16.0)
        other = threading.Thread(target=churn)
        other.start()  # forks meet the pool in any state
        for _ in range(6):
            child = os.fork()
            if child == 0:
                ok = call.is_intact(held, 2.0)
                held.mul_(2)
                ok = ok and call.is_intact(call(8.0), 8.0) and call.is_intact(held, 4.0)
                del held
                ok = ok and cpu.kept_bytes() == 32 * MB == cpu.release_memory()
                os._exit(0 if ok else 1)
            for _ in range(4000):
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    break
                time.sleep(0.05)
            assert done, "the child hangs"
            assert status == 0
            assert call.is_intact(held, 2.0)
        running = False
        other.join()
        # Gradients that outlive everything else.
        import atexit, builtins
        builtins.held = [call(1.0), held]
        atexit.register(lambda: builtins.held.append(call(4.0)))
        """
    _run(code)


def test_where_memory_ends_in_a_process():
    """What is kept makes room for a gradient that needs another size; then the error is clear."""
    code = """
        import resource
        larger = Call(_maps(2, 384))
        call()
        assert cpu.kept_bytes() == 32 * MB
        def limit(megabytes):
            used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * MB, -1))
        limit(25)  # 48 + 2 MB fit where 32 MB go
        grad = larger(1.0)
        assert grad.data_ptr() % (2 * MB) == 0 and not grad.untyped_storage().resizable()
        del grad
        cpu.release_memory()
        limit(10)
        try:
            larger(2.0)
        except RuntimeError as error:
            wanted = f"out of memory: no room for a gradient of {48 * MB} bytes"
            assert wanted in str(error), error
        else:
            raise AssertionError("48 MB in 10 MB")
        """
    _run(code)


def test_a_torch_that_takes_no_memory_of_others_in_a_process(tmp_path):
    """torch 2.10 has no such function: a library that asks for an unknown one stands in for it."""
    package = tmp_path / "salkernels"
    source = Path(salkernels.__file__).parent
    package.mkdir()
    for path in source.iterdir():
        if not path.name.startswith("_C_"):
            (package / path.name).symlink_to(path)
    library = next(source.glob("_C_cpu.*"))
    content = library.read_bytes()
    assert b"\0torch_from_blob\0" in content
    content = content.replace(b"\0torch_from_blob\0", b"\0torch_from_nowh\0")
    (package / library.name).write_bytes(content)
    code = """
        from pathlib import Path
        library, = Path(cpu.__file__).parents[1].glob("_C_cpu.*")
        assert b"torch_from_nowh" in library.read_bytes()
        held = call(2.0)
        assert call.is_intact(held, 2.0) and held.untyped_storage().resizable()
        del held
        assert cpu.kept_bytes() == 0
        """
    _run(code, tmp_path, PYTHONPATH=str(tmp_path))
