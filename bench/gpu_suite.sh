#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command and about ten minutes, with nothing to download: builds in place,
# tests, sanitizes and measures, and writes one JSON. Usage: bench/gpu_suite.sh [JSON], by default
# bench/results/gpu.json.
#
# Needs nvcc, cmake, a C++ compiler, and a Python with its headers, torch (CUDA), numpy and pytest; without pybind11 the
# headers inside torch serve, without ninja make, without hypothesis the tests that need it are left out. A stage that
# fails is recorded, and the others still run. Exits 77 where there is no GPU, and 1 where a stage failed.
#
# Variables: PYTHON (by default python3), CUDA_ARCHITECTURES (by default the GPU's own).
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

json=${1:-bench/results/gpu.json}
python=${PYTHON:-python3}
work=build/gpu_suite
export PATH="$PATH:/usr/local/cuda/bin" PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=passive
PYTHONPATH=".:tests${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH

if ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L 2>/dev/null | grep -q GPU; then
    echo "gpu_suite: there is no NVIDIA GPU here (nvidia-smi finds none)" >&2
    exit 77
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_suite: $python has no torch that sees the GPU; name one that has with PYTHON=..." >&2
    exit 77
fi
mkdir -p "$work" "$(dirname "$json")"
rm -f "$work"/*.log "$work"/bench.json "$work"/stages.tsv
failed=0

# record NAME STATUS SECONDS NOTE; the JSON is written each time, for a later stage may end the machine's time
record() {
    printf '%s\t%s\t%s\t%s\n' "$@" >>"$work/stages.tsv"
    "$python" bench/gpu_collect.py "$work" "$json" || failed=1
    echo "gpu_suite: $1: status $2 after $3 s${4:+ ($4)}"
}

# stage NAME LIMIT NOTE COMMAND...: LIMIT in seconds
stage() {
    local name=$1 limit=$2 note=$3 begin=$SECONDS status=0
    shift 3
    timeout -k 10 "$limit" "$@" >"$work/$name.log" 2>&1 || status=$?
    [ "$status" -eq 0 ] || { failed=1; tail -n 25 "$work/$name.log"; }
    record "$name" "$status" $((SECONDS - begin)) "$note"
}

skip() { record "$1" 77 0 "$2"; }

# build ON|OFF: with the kernels, or without
# shellcheck disable=SC2329 # stages run it
build() {
    local architectures options=(-S . -B "$work/cmake-$1" -DCMAKE_BUILD_TYPE=Release "-DQCOMM_CUDA=$1")
    architectures=${CUDA_ARCHITECTURES:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)}
    options+=("-DCMAKE_CUDA_ARCHITECTURES=$architectures" "-DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$PWD/qcomm")
    options+=("-DPython_EXECUTABLE=$("$python" -c 'import sys; print(sys.executable)')")
    if command -v ninja >/dev/null; then options+=(-G Ninja); fi
    if ! "$python" -m pybind11 --cmakedir >/dev/null 2>&1; then
        options+=("-DQCOMM_PYBIND11_INCLUDE=$("$python" -c 'import torch, pathlib; print(pathlib.Path(torch.__file__).parent / "include")')")
    fi
    cmake "${options[@]}" && cmake --build "$work/cmake-$1" --parallel
}
export -f build
export work python

has() { "$python" -c "import $1" 2>/dev/null; }
# shellcheck disable=SC2329 # stages run it
tests() { PYTHONPATH="$PWD/tests/support${PYTHONPATH:+:$PYTHONPATH}" "$python" -m pytest -q -p no:cacheprovider -c "$work/pytest.ini" --rootdir . "$@"; }
export -f tests
# Not the project's own settings, which ask for a recent pytest.
printf '[pytest]\nmarkers =\n    gpu\n    slow\n    world\n' >"$work/pytest.ini"

# First of all what needs no kernels: gradients of the GPU in host memory.
stage build_cpu 120 "without the kernels" bash -c 'build OFF'
stage test_staging 120 "the way through host memory" bash -c 'tests -m gpu tests/staging tests/ddp/test_ddp_staged.py'
stage build 180 "" bash -c 'build ON'
if ! "$python" -c 'from qcomm.codec import core; core()' >"$work/import.log" 2>&1; then
    tail -n 5 "$work/import.log"
    record import 1 0 "the modules cannot be imported; nothing else was run"
    exit 1
fi
stage test_gpu 90 "" bash -c 'tests tests/collectives_cuda/test_gpu.py'
if has hypothesis; then
    stage test_device 40 "" bash -c 'tests -m gpu tests/codec/test_device.py'
    stage test_cpu 60 "codec and packets on this machine's processor" \
        bash -c 'tests tests/codec/test_codec.py tests/codec/test_packet.py tests/codec/test_golden.py tests/codec/test_entropy.py'
else
    skip test_device "hypothesis is not installed"
    stage test_cpu 60 "hypothesis is not installed: golden files only" bash -c 'tests tests/codec/test_golden.py'
fi
for tool in memcheck racecheck synccheck; do
    if command -v compute-sanitizer >/dev/null; then
        # torch's allocator would put small tensors side by side, where memcheck cannot see a step from one to the next;
        # and torch asks the driver some things that fail.
        stage "$tool" 60 "a short selection" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 bash -c \
            "PYTHONPATH=$PWD/tests/support compute-sanitizer --tool $tool --error-exitcode 9 --report-api-errors no --target-processes all \"$python\" \
            -m pytest -q -c $work/pytest.ini --rootdir . tests/collectives_cuda/test_gpu.py \
            -k 'bytes_of_the_cpu and float32 and (0.9 or paper) or damaged or sum_of_packets'"
    else
        skip "$tool" "compute-sanitizer is not installed"
    fi
done
stage bench 120 "" "$python" bench/bench_gpu.py --json "$work/bench.json"
echo "gpu_suite: wrote $json"
exit "$failed"
