#!/usr/bin/env bash
# Builds the fuzz targets of csrc/fuzz and runs them, all at once. Usage: tools/fuzz.sh [SECONDS [TARGET...]] | --check
# SECONDS: how long each target runs, 60 by default. --check: only say whether there is a compiler for them.
# TARGET: decompress, round_trip (with sanitizers), decompress_plain, round_trip_plain (many times as fast without).
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
    *[!0-9]*) sed -n 2,5p "$0" >&2; exit 2 ;;
esac
seconds=${1:-60}
[ $# -gt 0 ] && shift
wanted=${*:-decompress round_trip decompress_plain round_trip_plain}
clang=$(find_clang)

build=build/fuzz
mkdir -p "$build/findings"
make_targets() {  # folder, sanitizers, further flags
    # RelWithDebInfo: optimised like a release, since that is what must survive, and findings have line numbers.
    cmake -S . -B "$1" -DCMAKE_CXX_COMPILER="$clang" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DQCOMM_FUZZ=ON -DQCOMM_CUDA=OFF \
        -DQCOMM_SANITIZE="$2" -DCMAKE_CXX_FLAGS="${3:-}" >/dev/null
    cmake --build "$1" --parallel "$(nproc)" >"$1/build.log" 2>&1 || { cat "$1/build.log"; exit 1; }
}
make_targets "$build" fuzzer-no-link,address,undefined
# Comparisons are traced with sanitizers; without, executions are what counts.
make_targets "$build/plain" fuzzer-no-link -fno-sanitize-coverage=trace-cmp

trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
declare -A running binary
start() {  # name, folder, target, longest input, seeds...
    local name=$1 corpus=$build/corpus/$3 max_len=$4 entropic=1
    binary[$name]=$2/$3
    # Counting how rare each feature is would take a third of the time of an execution.
    [[ $name == *_plain ]] && entropic=0
    shift 4
    mkdir -p "$corpus"
    "${binary[$name]}" -max_total_time="$seconds" -max_len="$max_len" -timeout=20 -entropic="$entropic" -print_final_stats=1 \
        -artifact_prefix="$build/findings/$name-" "$corpus" "$@" >"$build/$name.log" 2>&1 &
    running[$name]=$!
}
start_if_wanted() {  # the same
    [[ " $wanted " == *" $1 "* ]] && start "$@" || true
}
start_if_wanted decompress "$build" fuzz_decompress 4096 tests/golden tests/corpus/decompress
start_if_wanted decompress_plain "$build/plain" fuzz_decompress 4096 tests/golden tests/corpus/decompress
start_if_wanted round_trip "$build" fuzz_round_trip 1024 tests/corpus/round_trip
start_if_wanted round_trip_plain "$build/plain" fuzz_round_trip 1024 tests/corpus/round_trip

findings=0
for target in "${!running[@]}"; do
    if wait "${running[$target]}"; then
        echo "fuzz: $target: $(grep '^Done' "$build/$target.log"), nothing found"
    else
        # From the message on; what precedes it are libFuzzer's lines of progress.
        sed -n '/violated\|runtime error\|ERROR:/,$p' "$build/$target.log" | head -n 40 || true
        echo "fuzz: $target: FOUND something; to see it again: ${binary[$target]} $build/findings/$target-..."
        findings=1
    fi
done
exit "$findings"
