"""The GPU tests and compute-sanitizer, side by side: nothing is timed meanwhile."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from .inputs import BF16, F32, SMALL, call
from .record import Context, OutOfTime
from .told import VARIABLE, progress

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = "tools.gpu.told"
TOOLS = ("memcheck", "racecheck", "synccheck")
EVERY_BACKEND = [
    f"tests/test_{name}.py"
    for name in (
        "parity", "edges", "ties", "dtypes", "determinism", "gradients", "library", "valid",
    )
]  # fmt: skip
# Tests are named [backend-device-...]: those on the GPU, and not again what CI does on a CPU. Those
# for which Triton compiles most come last.
SUITES = {
    "tests of cuda": (
        ["tests/cuda/test_on_gpu.py", "tests/test_cuda_backend.py", *EVERY_BACKEND],
        "on_a_gpu or cuda-cuda or cuda_graph or test_cuda_backend",
    ),
    "tests of triton": (
        [*EVERY_BACKEND, "tests/test_triton_match.py", "tests/test_triton.py"],
        "triton-cuda or (test_triton and not interpreter and not offline)",
    ),
}
REHEARSED = {"tests of cuda": (["tests/cuda/test_on_gpu.py"], "without_a_gpu")}
GRACE = 8  # seconds for what is cut short to say what it has found
FINDINGS = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")


@dataclass
class Check:
    name: str
    command: list[str]
    log: Path
    variables: dict[str, str]
    told: Path | None = None  # of pytest: where each test is told
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env={**os.environ, **self.variables},
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=_listen,
            )


def _listen() -> None:
    """Started by a shell in the background, processes ignore interrupts; pytest is to hear ours."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def checks(context: Context) -> None:
    """Starts all at once, and writes for each what it found."""
    wanted = [check for check in planned(context) if check.name not in context.finished]
    running = []
    for check in wanted:
        with context.measuring(f"start of {check.name}"):
            check.start()
            running.append(check)
    while any(check.process.poll() is None for check in running) and context.left > GRACE:
        time.sleep(0.2)
    late = [check.name for check in running if check.process.poll() is None]
    for check in running:
        if check.name in late:
            # pytest then says what it has found so far.
            check.process.send_signal(signal.SIGINT)
    for check in running:
        _conclude(context, check, cut=check.name in late)
    if late:
        raise OutOfTime(f"the end of {', '.join(late)}")


def _conclude(context: Context, check: Check, cut: bool) -> None:
    try:
        code = check.process.wait(GRACE / 2 if cut else None)
    except subprocess.TimeoutExpired:
        check.process.kill()
        code = check.process.wait()
    text = check.log.read_text("utf-8", "replace")
    print(f"--- {check.name}, exit status {code}\n{text[-6000:]}", flush=True)
    if not cut:
        with context.measuring(check.name, exit=code) as row:
            row.update(verdict(check.name, code, text))
            if check.told is not None:
                row["failures"] = _failures(check.told) or row["failures"]
        return
    with context.measuring(f"{check.name}, cut short") as row:
        row.update(so_far(check, code, text))


def so_far(check: Check, code: int, text: str) -> dict[str, object]:
    """Of a check that was cut short: bad is what has failed, and not what has not been done."""
    if check.told is None:
        try:
            found = verdict(check.name, code, text)
        except RuntimeError:  # no summary yet
            return {"summary": "cut short before it said anything"}
        return found | {"ok": not found.get("failures") and not found.get("findings")}
    found = progress(check.told)
    counts = f"{found['passed']} passed, {found['failed']} failed"
    return {
        "ok": not found["failures"],
        "summary": f"cut short at {found['share']:.0%}, {counts}",
        "failures": _failures(check.told),
    }


def _failures(told: Path) -> list[str]:
    return [line[:200] for line in progress(told)["failures"][:20]]


def verdict(name: str, code: int, text: str) -> dict[str, object]:
    """What a check's output says: whether all is well, and the lines that say what is not."""
    if name in TOOLS:
        found = [int(a or b) for a, b in FINDINGS.findall(text)]
        if not found:
            last = text.strip().splitlines()[-1:] or ["nothing was written"]
            raise RuntimeError(f"{name} has no summary; its last line: {last[0][:200]}")
        return {"ok": code == 0 and sum(found) == 0, "findings": sum(found)}
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)$", text, re.MULTILINE)
    summary = re.findall(
        r"^=* ?(.*\d+ (?:passed|failed|skipped|error).*?) ?=*$", text, re.MULTILINE
    )
    if not summary:
        raise RuntimeError(f"pytest ended with {code} and no summary: {text.strip()[-200:]}")
    return {
        # 5: no test was selected, which is no success.
        "ok": code == 0 and "passed" in summary[-1],
        "summary": summary[-1],
        "failures": [line[:160] for line in failed[:20]],
    }


def planned(context: Context) -> list[Check]:
    logs = Path(tempfile.mkdtemp(prefix="salkernels-checks-"))
    parallel = importlib.util.find_spec("xdist") is not None
    cores = os.cpu_count() or 2
    # Under a sanitizer Python takes a while to start.
    limit = int(max(10, context.left - 3 * GRACE))
    found = []
    for name, (files, expression) in (SUITES if context.on_gpu else REHEARSED).items():
        # What compiles has more of them.
        workers = max(1, cores // 2 if "triton" in name else cores // 5)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", PLUGIN]
        command += [*files, "-k", expression, *(["-n", str(workers)] if parallel else [])]
        log = logs / f"{name.replace(' ', '-')}.txt"
        lines = log.with_suffix(".jsonl")
        found.append(Check(name, command, log, {VARIABLE: str(lines)}, lines))
    target = [sys.executable, "-m", "tools.gpu", "step", "sanitized", "--device", context.device]
    target += ["--out", str(context.folder), "--seconds", str(limit)]
    for tool in TOOLS if context.on_gpu else ():
        if shutil.which("compute-sanitizer") is None:
            context.emit(tool, failed="compute-sanitizer is not on the PATH; it comes with CUDA")
            continue
        # Our kernels alone: torch's own have been through it. Each allocation by itself, so that
        # an access beyond one is an error and not the next tensor.
        words = ["compute-sanitizer", "--tool", tool, "--kernel-name", "kns=salkernels"]
        words += ["--print-limit", "20", "--error-exitcode", "9", *target]
        variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        found.append(Check(tool, words, logs / f"{tool}.txt", variables))
    if not context.on_gpu:
        found.append(Check("sanitized calls", target, logs / "sanitized.txt", {}))
    return found


def sanitized(context: Context) -> None:
    """What compute-sanitizer looks at: each way to tile, both passes."""
    import torch

    from salkernels.backends import get
    from salkernels.reference import Outputs

    name = context.backends[0]
    backend = get(name)
    count = 0
    for form, dtype in itertools.product(SMALL, (F32, BF16)):
        form = form._replace(dtype=dtype)
        if context.left < 2:
            print(f"out of time before {form.key}", flush=True)
            break
        given = call(form, context.device)
        found = Outputs(*backend.match(*given))
        saved = (given.pairs, given.valid, *found[1:], given.window, given.eps)
        backend.match_backward(torch.ones_like(found.max_sim), given.query, given.key, *saved)
        context.synchronise()
        count += 1
        print(f"{time.monotonic() - context.begin:5.1f} s {form.key}", flush=True)
    print(f"{count} passed", flush=True)  # in pytest's words, which `verdict` reads
