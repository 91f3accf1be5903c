#!/bin/sh
# Installs what `make demo` needs into a virtual environment, and no more:
#
#     scripts/install_demo.sh VENV TORCH
#
# Where no GPU is visible that is the CPU build of torch, if the index has one for this system, and no
# CUDA kernels. TORCH is the requirement, such as "torch>=2.10".
#
# TORCH_CPU_INDEX   where the CPU builds of torch are; empty takes torch from the usual index
set -eu
python=$1/bin/python torch=$2
index=${TORCH_CPU_INDEX-https://download.pytorch.org/whl/cpu}
began=$(date +%s)

say() { printf '\n== %s\n' "$*"; }
installed() { "$python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null; }

if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
    say "A GPU is visible: torch with CUDA, and kernels for this GPU where nvcc is found." \
        "About 3 GB to download and 6 GB on disk, 5 to 15 minutes."
    index=
else
    export SALKERNELS_BUILD_CUDA="${SALKERNELS_BUILD_CUDA:-0}"
    say "No GPU is visible: the CPU build of torch, no CUDA kernels." \
        "About 0.3 GB to download and 1.3 GB on disk, 1 to 5 minutes."
fi

say "1 of 2: torch"
if ! installed >/dev/null && [ -n "$index" ]; then
    # Alone: its index has nothing else. Without pip's own settings, whose indexes have other builds.
    PIP_CONFIG_FILE=/dev/null "$python" -m pip install --no-deps --only-binary :all: \
        --timeout 10 --retries 1 --index-url "$index" "$torch" ||
        say "No CPU build there: torch from the usual index, on Linux with CUDA's libraries:" \
            "about 3 GB to download and 5 GB on disk."
fi
"$python" -m pip install "$torch"

say "2 of 2: salkernels with what training needs; its C++ kernels are compiled, which takes a minute"
"$python" -m pip install -e ".[training]"

say "Installed in $(($(date +%s) - began)) s: torch $(installed), $(du -sh "$1" | cut -f1) in $1"
