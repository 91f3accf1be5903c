#!/bin/sh
# Runs the tests of the CPU kernel with AddressSanitizer and UndefinedBehaviorSanitizer.
#
#   PYTHON=.venv/bin/python scripts/sanitize.sh [--quick] [pytest arguments]
#
# --quick: all tests at the highest level of vector instructions, those of memory access at the others.
#
# The library is built in a copy of the package, so that the installed one stays as it is. -O1 keeps
# the register kernels fast enough; leaks are not looked for, since Python itself is full of them.
# Only sys.stderr is captured: a sanitizer ends the process, and what it wrote has to be seen.
set -eu
quick=
[ "${1:-}" != --quick ] || { quick=yes; shift; }
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-python}")
case $python in /*) ;; *) python=$PWD/$python ;; esac # the tests run in another folder
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r salkernels tests pyproject.toml "$copy"
rm -f "$copy"/salkernels/_C_*.so

torch=$("$python" -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])")
cxx=${CXX:-g++}
$cxx -std=c++17 -O1 -g -ffp-contract=fast -fPIC -fno-omit-frame-pointer \
  -fsanitize=address,undefined -fno-sanitize-recover=undefined -Wno-psabi -Wno-ignored-attributes \
  -DTORCH_TARGET_VERSION=0x020a000000000000 -isystem "$torch/include" \
  csrc/register_cpu*.cpp csrc/cpu/*.cpp -shared -o "$copy/salkernels/_C_cpu.abi3.so" \
  -L"$torch/lib" -ltorch_cpu

# The runtime has to be the first library of the process, which is Python's. torch raises C++
# exceptions before libstdc++ would otherwise be known to it.
preload="$($cxx -print-file-name=libasan.so) $($cxx -print-file-name=libubsan.so)"
preload="$preload $($cxx -print-file-name=libstdc++.so)"
cd "$copy"
tests="not compile and not opcheck and not instruction and not large_memory and not fragments and not in_a_process"
for level in avx512 avx2 baseline; do
  if [ "$quick" ] && [ $level != avx512 ]; then
    tests="(parity and (float32 or bfloat16)) or mask or range or part or list" # one source: the levels differ in width
  fi
  echo "== at most $level"
  LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
    SALKERNELS_CPU_ISA=$level PYTHONPATH="$copy" \
    "$python" -m pytest -q -x --capture=sys -p no:cacheprovider tests/test_cpu_kernel.py tests/test_cpu_lse.py tests/test_kept_memory.py -k "$tests" "$@"
done
