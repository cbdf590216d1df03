#!/usr/bin/env bash
# Builds the fuzz targets of csrc/fuzz and runs them, all at once. Usage: tools/fuzz.sh [SECONDS [TARGET...]] | --check
# SECONDS: how long each target runs, 60 by default. --check: only say whether there is a compiler for them.
# TARGET: decompress, round_trip (libFuzzer, sanitizers), decompress_plain, round_trip_plain (csrc/fuzz/driver.cpp).
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
make_targets() {  # folder, options...
    cmake -S . -B "$1" -DQCOMM_FUZZ=ON -DQCOMM_CUDA=OFF "${@:2}" >/dev/null
    cmake --build "$1" --parallel "$(nproc)" >"$1/build.log" 2>&1 || { cat "$1/build.log"; exit 1; }
}
# RelWithDebInfo: optimised like a release, since that is what must survive, and findings have line numbers.
make_targets "$build" -DCMAKE_CXX_COMPILER="$clang" -DCMAKE_BUILD_TYPE=RelWithDebInfo
make_targets "$build/plain" -DCMAKE_BUILD_TYPE=Release -DQCOMM_FUZZ_DRIVER=ON

trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
declare -A running
start() {  # name, seeds...
    local name=$1 target=fuzz_${1%_plain} max_len=4096
    local corpus=$build/corpus/$target
    [[ " $wanted " == *" $name "* ]] || return 0
    shift
    mkdir -p "$corpus"
    if [[ $name == *_plain ]]; then
        exec "$build/plain/$target" "$seconds" 1000000000000 "$RANDOM" "$build/findings/$name" "$corpus" "$@"
    else
        [ "$name" = round_trip ] && max_len=1024
        exec "$build/$target" -max_total_time="$seconds" -max_len="$max_len" -timeout=20 -print_final_stats=1 \
            -artifact_prefix="$build/findings/$name-" "$corpus" "$@"
    fi >"$build/$name.log" 2>&1 &
    running[$name]=$!
}
start decompress tests/golden tests/corpus/decompress
start decompress_plain tests/golden tests/corpus/decompress
start round_trip tests/corpus/round_trip
start round_trip_plain tests/corpus/round_trip

findings=0
for target in "${!running[@]}"; do
    if wait "${running[$target]}"; then
        echo "fuzz: $target: $(grep '^Done' "$build/$target.log"), nothing found"
    else
        # From the message on; what precedes it are libFuzzer's lines of progress.
        sed -n '/violated\|runtime error\|ERROR:/,$p' "$build/$target.log" | head -n 40 || true
        echo "fuzz: $target: FOUND something; its input is in $build/findings"
        findings=1
    fi
done
exit "$findings"
