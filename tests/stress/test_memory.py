"""Little memory gives an error that says so, and many calls leave nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

# Each limit in a fork of its own. One thread: OpenMP ends a process that cannot start another,
# whatever operator asked for it.
LIMITED = """
import json, os, resource, sys, torch, salkernels
backend, form, limits = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
torch.set_num_threads(1)
pairs = ~torch.eye(6, dtype=torch.bool)
small = torch.randn(6, 4, 6, 6)
expected = salkernels.wla_set_loss(small, pairs, 2, backend=backend)
x = torch.randn(6, 64, 96, 96).requires_grad_()  # 13.5 MiB
loss = salkernels.wla_set_loss(x, pairs, 2, backend=backend) if form == "backward" else None

def attempt():
    if form == "forward":
        return salkernels.wla_set_loss(x, pairs, 2, backend=backend)
    return torch.autograd.grad(loss, x)

for limit in limits:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        pages = int(open("/proc/self/statm").read().split()[0])
        size = pages * resource.getpagesize() + int(limit * 2**20)
        resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
        try:
            attempt()
            answer = "fine"
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        after = torch.equal(salkernels.wla_set_loss(small, pairs, 2, backend=backend), expected)
        print(json.dumps([limit, answer, after]), flush=True)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status:
        print(json.dumps([limit, f"the process ended with status {status}", False]))
"""

LEAKS = """
import gc, json, resource, sys, tracemalloc, torch, salkernels
calls = int(sys.argv[1])
torch.set_num_threads(1)
pairs = ~torch.eye(4, dtype=torch.bool)
weights = torch.rand(4, 4)
features = torch.randn(4, 16, 8, 8).requires_grad_()
flat = torch.randn(4, 32).requires_grad_()

def call(number):
    which = number % 5
    if which == 0:
        salkernels.wla_set_loss(features, pairs, 2).backward()
    elif which == 1:
        salkernels.wla_loss(features[:2], features[2:], 3).backward()
    elif which == 2:
        salkernels.wla_set_loss(features, weights, 8).backward()
    elif which == 3:
        salkernels.gp_loss(flat, pairs).backward()
    else:  # errors, from the checks and from the kernel
        try:
            salkernels.wla_loss(features, features[:, :3], 2)
        except ValueError:
            pass
        try:
            wrong = torch.tensor([3, 1])
            salkernels.library.match(features[None], None, wrong, None, (2, 2), 1e-12, "cpu")
        except RuntimeError:
            pass
    features.grad = flat.grad = None

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

for number in range(1000):
    call(number)
gc.collect()
objects = len(gc.get_objects())  # a list of its own: before the memory is measured
before = resident()
for number in range(calls):
    call(number)
gc.collect()
after, objects_after = resident(), len(gc.get_objects())
tracemalloc.start()
for number in range(200):
    call(number)
gc.collect()
python = tracemalloc.get_traced_memory()[0]
for number in range(1000):
    call(number)
gc.collect()
python = tracemalloc.get_traced_memory()[0] - python
print(json.dumps({"rss": after - before, "objects": objects_after - objects, "python": python}))
"""


def run(code: str, *arguments: str) -> list:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@LINUX
@pytest.mark.parametrize("form", ["forward", "backward"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_little_memory_is_an_error_that_says_so(backend, form):
    # The outputs of the forward are 1.3 MiB, the gradient is 13.5 MiB; then scratch memory fails.
    limits = [0, 0.5, 1, 1.5, 2, 8, 13.3, 13.7, 14.2, 1000]
    answers = run(LIMITED, backend, form, json.dumps(limits))
    assert [limit for limit, *_ in answers] == limits
    for limit, answer, works_after in answers:
        assert answer == "fine" or (
            answer.startswith(("RuntimeError", "MemoryError")) and "memory" in answer
        ), f"{limit} MiB: {answer}"
        assert works_after, f"{limit} MiB: {answer}"
    assert answers[0][1] != "fine"
    assert answers[-1][1] == "fine"


@LINUX
def test_calls_leave_nothing_behind():
    (growth,) = run(LEAKS, "10000")
    # Fifty bytes a call. It is 0 as a rule: allocators and caches may move a little.
    assert growth["rss"] < 500_000, growth
    assert growth["objects"] < 50, growth
    assert growth["python"] < 20_000, growth
