#!/usr/bin/env bash
# Everything that a GPU has to say about this package, in less than eight minutes: is it right, how
# fast is it beside its peers, and what bounds it. Needs no network.
#
#   scripts/gpu.sh [SECONDS] [again] [--device cpu] [--out FOLDER] [--steps STEP[:SECONDS]...]
#                  [--cases PART...]
#
# again         what an earlier run into the same folder has left over
# --device cpu  a rehearsal of all steps on tiny shapes, without a GPU
# --steps       only these, in this order; `tune` runs only where it is named
# --cases       only shapes whose key has one of these parts, such as S64 or w22
#
# Results go to the folder gpu-results (or FOLDER) as they come: results.jsonl, timings.csv, log.txt,
# and the summary that is printed at the end. `python -m tools.gpu take --label h100` puts them into
# benchmarks/results.
#
# Where the package is installed, that is all. Where it is not and nothing can be fetched, run
# scripts/gpu_pack.sh on another machine first: what it puts into .gpu is used here.
#
# PYTHON: the interpreter (default: .venv/bin/python if there is one, else python3).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-}
[ -n "$python" ] || { [ -x .venv/bin/python ] && python=.venv/bin/python || python=python3; }

if [ -f .gpu/pack.txt ]; then
  echo "using .gpu: $(head -1 .gpu/pack.txt)"
  built=$(sed -n 's/^csrc //p' .gpu/pack.txt)
  now=$(find csrc -type f -print0 | LC_ALL=C sort -z | xargs -0 cat | sha256sum | cut -c1-16)
  [ "$built" = "$now" ] || echo "warning: csrc has changed since scripts/gpu_pack.sh: run it again" >&2
  work=${TMPDIR:-/tmp}/salkernels-gpu-$(id -u)
  mkdir -p "$work"
  # Only where nothing was built here: an installed package knows better what it runs on.
  ls salkernels/_C_cuda.* >/dev/null 2>&1 || cp .gpu/lib/* salkernels/
  if ls .gpu/wheels/*.whl >/dev/null 2>&1; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
      --target "$work/site" .gpu/wheels/*.whl
    export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
  fi
  if [ -f .gpu/triton.tar.xz ]; then
    cache=${TRITON_CACHE_DIR:-$work/triton}
    if ! { mkdir -p "$cache" && [ -w "$cache" ]; } 2>/dev/null; then
      echo "warning: TRITON_CACHE_DIR, $cache, cannot be written; $work/triton is used" >&2
      cache=$work/triton
      mkdir -p "$cache"
    fi
    tar -C "$cache" -xJf .gpu/triton.tar.xz
    export TRITON_CACHE_DIR="$cache"
    # Its lists name the folder in which it was compiled, and Triton looks nowhere else.
    "$python" -m tools.gpu.triton_cache settle "$cache"
  fi
fi
words=()
while [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; do
  case $1 in again) words+=(--again) ;; *) words+=(--seconds "$1") ;; esac
  shift
done
export PYTHONUNBUFFERED=1
exec "$python" -m tools.gpu run "${words[@]}" "$@"
