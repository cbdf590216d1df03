#!/usr/bin/env bash
# Measures again what docs/measurements.md shows of networks, with plots and tables: bench/run_all.sh [STEP ...], or make results.
# As root on Linux, for the limited links; on an otherwise idle machine, because ranks and hosts share its cores.
# Interpreter: PYTHON, otherwise .venv's, otherwise python3. Without STEP all of them, with minutes on two idle cores:
#   allreduce 8    all methods on 25 MiB: 100 Mb/s and 1 Gb/s, 2 and 4 hosts
#   feedback  3    the same with error feedback, 1 Gb/s, 2 hosts
#   planner   2    what qcomm plan predicts of the first of these
#   slices    2    25 MiB in 1, 2, 4 and 8 slices: 100 Mb/s and 1 Gb/s, 2 and 4 hosts
#   sizes     3    64 KiB to 256 MiB: 1 Gb/s, 2 hosts
#   pairs     4    auto against fp32 and bf16 without a limit, 2 and 4 ranks
#   step      2    a ResNet-18 step over 100 Mb/s, 2 hosts, and its trace
#   scaling   4    weak and strong, 1 to 4 ranks of this machine, torchrun and mpirun
#   bitrate   1    bits by layer over a training run
#   accuracy  8    time to 90 % over 100 Mb/s, 2 hosts
#   verify    4    what comparing means costs, 2 ranks of this machine
#   sealed    5    what sealed messages cost: without a limit, 1 Gb/s and 100 Mb/s, 2 ranks
#   wan_check 12   whether links with delay and loss have what was asked for
#   wan       3    a step of five buckets between 4 hosts, 100 Mb/s and 50 ms
#   wan_lossy 9    1 to 16 connections over 100 Mb/s, 80 ms there and back and 0.1 % loss, with cubic
#   wan_auto 9     connections="auto" against fixed numbers on four kinds of links
#   async     6    all-reduces under way against one after another: 100 Mb/s and 1 Gb/s, without delay and with 50 ms
#   planner_wan 30 what qcomm plan predicts of steps between distant hosts: 32 scenes
#   plots     0    PNGs, and the tables of README and docs/measurements.md
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=$(command -v "$python" || command -v python3)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
results=bench/results
steps=("${@:-all}")
[ "${steps[*]}" != all ] || steps=(allreduce feedback planner slices sizes pairs step scaling bitrate accuracy verify sealed wan_check wan wan_lossy wan_auto async planner_wan plots)

run() {
    echo "run_all: bench/$*"
    "$python" "bench/$@"
}

step() {
    case "$1" in
        allreduce) run bench_allreduce.py --repeats 15 --json $results/allreduce.json ;;
        feedback) run bench_allreduce.py --repeats 21 --error-feedback --rates 1gbit --worlds 2 \
            --json $results/allreduce_feedback.json ;;
        planner) run check_planner.py --json $results/planner_check.json || true ;;  # it fails where the planner is off
        slices) run bench_slices.py --json $results/slices.json ;;
        sizes) run bench_allreduce.py --repeats 5 --rates 1gbit --worlds 2 --sizes 64K 256K 1M 4M 25M 64M 256M \
            --json $results/allreduce_sizes.json ;;
        pairs) run bench_allreduce.py --pairs 400 --rates none --worlds 2 4 --sizes 1M 25M \
            --json $results/allreduce_pairs.json ;;
        step) run bench_scaling.py --rates 100mbit --worlds 2 --modes weak --steps 6 \
            --methods fp32 bf16 "powersgd r=2" "qcomm k=2" "qcomm k=1" --trace $results/step_trace.json \
            --json $results/step.json ;;
        scaling) run bench_scaling.py --launchers torchrun mpirun --worlds 4 --stem-stride 2 --steps 8 \
            --json $results/scaling.json ;;
        bitrate) run bench_bitrate.py --steps 66 --every 3 --json $results/bitrate.json ;;
        verify) run bench_verify.py --steps 30 --json $results/verify.json ;;
        sealed) run bench_sealed.py --json $results/sealed.json ;;
        wan_check) run check_wan.py --json $results/wan_check.json ;;
        wan) run bench_wan.py --json $results/wan.json ;;
        wan_lossy)
            lossy=(--hosts 2 --delay-ms 40 --loss 0.1% --control cubic)
            run bench_wan.py "${lossy[@]}" --methods "qcomm k=0.5" --connections 1 4 8 16 --buckets 8 --width 2500 \
                --json $results/wan_lossy.json
            run bench_wan.py "${lossy[@]}" --methods fp32 --buckets 1 --json $results/wan_lossy_fp32.json ;;
        wan_auto)
            auto=(--hosts 2 --methods "qcomm k=0.5" --buckets 8 --width 2500)
            run bench_wan.py "${auto[@]}" --delay-ms 40 --loss 0.1% --control cubic --connections 1 8 auto \
                --json $results/wan_auto.json
            run bench_wan.py "${auto[@]}" --delay-ms 40 --control cubic --connections 1 auto 1 auto \
                --json $results/wan_auto_clean.json
            run bench_wan.py "${auto[@]}" --delay-ms 0.5 --control cubic --connections 1 auto 8 \
                --json $results/wan_auto_short.json
            run bench_wan.py "${auto[@]}" --delay-ms 40 --loss 0.1% --control bbr --connections 1 auto 8 \
                --json $results/wan_auto_bbr.json ;;
        async) run bench_async.py --turns 9 --json $results/async.json ;;
        planner_wan) run check_planner_wan.py --json $results/planner_wan.json || true ;;  # as planner
        accuracy) run bench_time_to_accuracy.py --json $results/time_to_accuracy.json ;;
        plots) run plots.py && "$python" tools/make_tables.py ;;
        *) sed -n '2,23p' "$0" >&2; exit 2 ;;
    esac
}

for name in "${steps[@]}"; do
    step "$name"
done
