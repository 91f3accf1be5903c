#!/usr/bin/env bash
# What a release must pass: sdist and wheel, built clean, installed outside the repository, and used.
#
#     scripts/check_release.sh                     builds, then tries every row of the matrix
#     scripts/check_release.sh 3.12: 3.10:2.10.0   these rows: PYTHON:TORCH, an empty TORCH is the newest
#     scripts/check_release.sh --quick             the wheel alone, beside the packages of .venv (CI)
#
# A row makes an environment of its own, which takes gigabytes and minutes where torch comes with
# CUDA. The first row is also what the wheel is built against: the oldest torch that is supported.
# Pythons come from the PATH, pyenv or, where one is missing, uv; a row without one is skipped aloud.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/elsewhere"
export PYTHONNOUSERSITE=1 SALKERNELS_BUILD_CUDA=0

say() { printf '\n== %s\n' "$*"; }

find_python() { # a command that runs Python $1, or nothing
    local found
    for found in "python$1" "$HOME/.pyenv/versions/$1"*/bin/python; do
        if "$found" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null; then
            echo "$found"
            return
        fi
    done
    if command -v uv >/dev/null; then uv python find "$1" 2>/dev/null || true; fi
}

smoke() { # uses the package that the environment $1 has, from a folder that holds nothing
    cd "$work/elsewhere"
    local bin=$1/bin
    EXPECT_CPU=${2:-1} "$bin/python" - "$root" <<'PYTHON'
import importlib.metadata, os, sys
from pathlib import Path

import torch

import salkernels

assert not Path(salkernels.__file__).is_relative_to(sys.argv[1] + "/salkernels"), salkernels.__file__
assert salkernels.__version__ == importlib.metadata.version("salkernels")
built = {status.name: status.available for status in salkernels.backends()}
assert built["cpu"] == bool(int(os.environ["EXPECT_CPU"])), salkernels.backends()
features = torch.randn(6, 16, 8, 8).requires_grad_()
pairs = ~torch.eye(6, dtype=torch.bool)
results = []
for backend in (None, "reference"):
    loss = salkernels.wla_set_loss(features, pairs, 2, backend=backend)
    results.append((loss, *torch.autograd.grad(loss, features)))
for ours, expected in zip(*results):
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)

embeddings = torch.randn(6, 5, requires_grad=True)
columns = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 2, 4, 1, 2, 5], [9, 9, 9, 8, 8, 8]]).unbind()


def objective(x, e):
    with torch.autocast("cpu", torch.bfloat16):
        mixed = salkernels.wla_loss(x, x.flip(0).bfloat16(), 2, valid=x.detach()[:, 0] > -1)
    return salkernels.sal_loss(x, e, *columns, 2).loss + mixed + salkernels.GPLoss()(e, pairs)


compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
for ours, expected in zip(*(
    (loss := call(features, embeddings), *torch.autograd.grad(loss, (features, embeddings)))
    for call in (compiled, objective)
)):
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
print(f"python {sys.version.split()[0]}, torch {torch.__version__}: loss {loss.item():.4f}")
PYTHON
    "$bin/python" -m salkernels >"$work/report.txt"
    grep -q "^salkernels " "$work/report.txt"
    if [ -x "$bin/salkernels-train" ] && "$bin/python" -c "import monai, jsonargparse" 2>/dev/null; then
        "$bin/salkernels-train" --help | grep -q pretrain
    fi
    cd "$root"
}

if [ "${1:-}" = --quick ]; then
    python=$root/.venv/bin/python
    say "wheel"
    # -O0: that it compiles and works is the point, and the tests have the optimised one.
    CXXFLAGS="-O0" "$python" -m pip wheel --quiet --no-deps --wheel-dir "$work/dist" "$root"
    ls "$work/dist"
    say "installed in an environment of its own"
    "$python" -m venv "$work/env"
    "$work/env/bin/python" -m pip install --quiet --no-deps "$work"/dist/*.whl
    # The dependencies are those of .venv: on the path, so its links to this repository are not read.
    "$python" -c "import sysconfig; print(sysconfig.get_path('purelib'))" >"$(
        "$work/env/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))"
    )/dependencies.pth"
    has_compiler=0
    for cxx in "${CXX:-}" c++ g++ clang++; do
        if [ -n "$cxx" ] && command -v "$cxx" >/dev/null; then has_compiler=1; fi
    done
    smoke "$work/env" "$has_compiler"
    say "release check (quick): passed"
    exit
fi

rows=("$@")
[ ${#rows[@]} -gt 0 ] || rows=(3.10:2.10.0 3.12:2.11.0 3.11:2.13.0 3.11: 3.12: 3.13:)
skipped=()
wheel=
for row in "${rows[@]}"; do
    version=${row%%:*} torch=${row#*:}
    python=$(find_python "$version")
    if [ -z "$python" ]; then
        skipped+=("$row: no Python $version")
        continue
    fi
    say "Python $version, torch ${torch:-newest}"
    env=$work/env-$version-${torch:-newest}
    "$python" -m venv "$env"
    "$env/bin/pip" install --quiet "torch${torch:+==$torch}"
    if [ -z "$wheel" ]; then
        say "sdist and wheel, against the torch of this row"
        "$python" -m venv "$work/tools"
        "$work/tools/bin/pip" install --quiet build twine abi3audit check-wheel-contents
        SALKERNELS_TORCH_DIR=$("$env/bin/python" -c "import torch; print(torch.__path__[0])")
        export SALKERNELS_TORCH_DIR
        git -C "$root" diff --quiet HEAD || say "note: the work tree has changes, and they are built"
        SALKERNELS_BUILD_CPU=1 "$work/tools/bin/python" -m build --outdir "$work/dist" "$root"
        ls -l "$work/dist"
        "$work/tools/bin/twine" check --strict "$work"/dist/*
        "$work/tools/bin/check-wheel-contents" "$work"/dist/*.whl
        wheel=$(ls "$work"/dist/*.whl)
        # Not every system finds the list that it compares with: its absence is no failure of ours.
        "$work/tools/bin/abi3audit" --strict --report "$wheel" >"$work/abi3.json" ||
            { cat "$work/abi3.json"; exit 1; }
        say "from the sdist"
        "$env/bin/pip" install --quiet "$work"/dist/*.tar.gz
        "$env/bin/pip" check
        smoke "$env"
        "$env/bin/pip" uninstall --quiet --yes salkernels
    fi
    "$env/bin/pip" install --quiet "$wheel"
    "$env/bin/pip" check
    smoke "$env"
    if "$env/bin/pip" uninstall --quiet --yes triton 2>/dev/null; then
        say "the same without triton"
        smoke "$env"
    fi
    if [ "$row" = "${rows[0]}" ]; then
        say "with the training extra"
        "$env/bin/pip" install --quiet "$wheel[training]"
        "$env/bin/pip" check
        smoke "$env"
    fi
    rm -rf "$env"
done
[ -n "$wheel" ] || { echo "no row could be tried: ${skipped[*]}"; exit 1; }
say "release check: passed"
for row in "${skipped[@]+"${skipped[@]}"}"; do echo "not tried: $row"; done
