#!/bin/sh
# Runs the CPU kernels from many threads (tests/cpu_threads.cpp) with ThreadSanitizer.
#
#   scripts/threads.sh
#
# Half a minute of one core. It needs neither torch nor Python.
set -eu
cd "$(dirname "$0")/.."
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

jobs=
for source in tests/cpu_threads.cpp csrc/cpu/*.cpp; do
  ${CXX:-g++} -std=c++17 -O1 -g -ffp-contract=fast -fsanitize=thread -Wno-psabi \
    -Wno-ignored-attributes -c "$source" -o "$build/$(basename "$source" .cpp).o" &
  jobs="$jobs $!"
done
for job in $jobs; do wait "$job"; done
${CXX:-g++} -fsanitize=thread -pthread "$build"/*.o -o "$build/threads"

# The sanitizer refuses to start where addresses are randomised over more bits than it knows of.
TSAN_OPTIONS=halt_on_error=1 setarch "$(uname -m)" -R "$build/threads"
