#!/usr/bin/env bash
# Prepares scripts/gpu.sh for a machine without network, on one that needs no GPU: compiled libraries,
# wheels of what is missing there, and Triton's kernels, all into the ignored folder .gpu.
#
#   scripts/gpu_pack.sh [PACKAGE...]
#
# PACKAGE...: what the other machine lacks (default: what of the extras `training` and `bench` is
# seldom there), as pip takes it.
#
# PYTHON          an interpreter of the other machine's version with its torch and triton, since
#                 Triton's cache holds for one version only (default: .venv/bin/python)
# ARCHITECTURES   compute capabilities of the libraries (default: 9.0; see TORCH_CUDA_ARCH_LIST)
# TARGET          of the other machine, the Python of the wheels (default: PYTHON's)
# WARM_SECONDS    for Triton's kernels (default: 1800; 0 leaves them out)
# WARM_TUNE       if set, also those of the step `tune`, which takes several times as long
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-.venv/bin/python}")
case $python in /*) ;; *) python=$PWD/$python ;; esac
target=${TARGET:-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')}
architectures=${ARCHITECTURES:-9.0}
[ $# -gt 0 ] || set -- nibabel monai jsonargparse docstring-parser typeshed-client \
  importlib-resources late-interaction-kernels flash-maxsim
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p .gpu/lib .gpu/wheels

echo "libraries for compute capability $architectures"
# In a copy: the libraries of this machine stay as they are.
mkdir "$work/source"
cp -r csrc buildtools salkernels training pyproject.toml setup.py README.md LICENSE "$work/source"
commit=$(git rev-parse --short=10 HEAD 2>/dev/null || echo unknown commit)
built=$(cd "$work/source" && find csrc -type f -print0 | LC_ALL=C sort -z | xargs -0 cat | sha256sum | cut -c1-16)
rm -f "$work"/source/salkernels/_C_* "$work"/source/salkernels/_build_info.json
(cd "$work/source" && TORCH_CUDA_ARCH_LIST=$architectures SALKERNELS_BUILD_CUDA=1 SALKERNELS_BUILD_CPU=1 \
  "$python" setup.py -q build_ext --inplace >"$work/build.txt" 2>&1) || { cat "$work/build.txt" >&2; exit 1; }
cp "$work"/source/salkernels/_C_* "$work"/source/salkernels/_build_info.json .gpu/lib/

echo "wheels for Python $target: $*"
rm -f .gpu/wheels/*.whl
platforms=()
for tag in manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64; do
  platforms+=(--platform "$tag")
done
"$python" -m pip download -q --no-deps --only-binary=:all: --implementation cp \
  --python-version "$target" "${platforms[@]}" -d .gpu/wheels "$@"

if [ "${WARM_SECONDS:-1800}" != 0 ]; then
  echo "Triton's kernels"
  mkdir "$work/triton"
  TRITON_CACHE_DIR=$work/triton "$python" -m tools.gpu.warm --capability "${architectures%%[ ;+]*}" \
    --seconds "${WARM_SECONDS:-1800}" ${WARM_TUNE:+--tune}
  tar -C "$work/triton" -cJf .gpu/triton.tar.xz .
  # What its keys depend on: the step `report` says where that differs.
  TRITON_CACHE_DIR=$work/triton "$python" -m tools.gpu.triton_cache facts >.gpu/triton.json
fi

{
  echo "$commit, $(date -u +%F), compute capability $architectures, Python $target"
  echo "csrc $built"
  "$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
} >.gpu/pack.txt
cat .gpu/pack.txt
du -sh .gpu
