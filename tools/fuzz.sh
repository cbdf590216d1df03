#!/usr/bin/env bash
# Builds the fuzz targets of csrc/fuzz and runs them, all at once. Usage: tools/fuzz.sh [SECONDS] | --check
# SECONDS: how long each target runs, 60 by default. --check: only say whether there is a compiler for them.
# Corpora grow from run to run in build/fuzz/corpus. Exits 1 on a finding, whose input is then in build/fuzz/findings.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

# The first clang++ that links a fuzz target; distributions ship libFuzzer apart from the compiler.
find_clang() {
    local candidate probe
    probe=$(mktemp -d)
    trap 'rm -rf "$probe"' RETURN
    echo 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }' >"$probe/probe.cpp"
    for candidate in clang++ clang++-{22..14}; do
        if "$candidate" -fsanitize=fuzzer,address,undefined "$probe/probe.cpp" -o "$probe/probe" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "fuzz: no clang++ with libFuzzer found (Debian: apt-get install clang-14 libclang-rt-14-dev)" >&2
    return 1
}

case "${1:-60}" in
    --check) find_clang; exit ;;
    *[!0-9]*) sed -n 2,4p "$0" >&2; exit 2 ;;
esac
seconds=${1:-60}
clang=$(find_clang)

build=build/fuzz
# RelWithDebInfo: optimised like a release, since that is what must survive, and findings have line numbers.
cmake -S . -B "$build" -DCMAKE_CXX_COMPILER="$clang" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DQCOMM_FUZZ=ON -DQCOMM_CUDA=OFF >/dev/null
cmake --build "$build" --parallel "$(nproc)" >"$build/build.log" 2>&1 || { cat "$build/build.log"; exit 1; }

trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
declare -A running
start() {  # target, longest input, seeds...
    local target=$1 max_len=$2
    shift 2
    mkdir -p "$build/corpus/$target" "$build/findings"
    "$build/$target" -max_total_time="$seconds" -max_len="$max_len" -timeout=20 -print_final_stats=1 \
        -artifact_prefix="$build/findings/$target-" "$build/corpus/$target" "$@" >"$build/$target.log" 2>&1 &
    running[$target]=$!
}
start fuzz_decompress 4096 tests/golden tests/corpus/decompress
start fuzz_round_trip 1024 tests/corpus/round_trip

findings=0
for target in "${!running[@]}"; do
    if wait "${running[$target]}"; then
        echo "fuzz: $target: $(grep '^Done' "$build/$target.log"), nothing found"
    else
        # From the message on; what precedes it are libFuzzer's lines of progress.
        sed -n '/violated\|runtime error\|ERROR:/,$p' "$build/$target.log" | head -n 40 || true
        echo "fuzz: $target: FOUND something; to see it again: $build/$target $build/findings/$target-..."
        findings=1
    fi
done
exit "$findings"
