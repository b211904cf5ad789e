#!/usr/bin/env bash
# What to run on the day there is a GPU: the tests that need one, then what precision costs and brings there.
#
#     examples/benchmarks/on_gpu.sh [FOLDER]
#
# Nine minutes on one H200 at most. Each step has a time limit of its own, and none stops the others. FOLDER (default:
# $OUT, or results/gpu-DATE beside this script) gets steps.jsonl with a line per step, log.txt with all that they print,
# and the benchmarks' JSON, all written as it goes. The exit code is 1 if a step failed or ran out of its time. It
# installs nothing: a step whose packages are missing is skipped, by name. Packages can be carried to a machine without
# a network as wheels:
#
#     python3 -m pip download --no-deps --only-binary=:all: -d wheels pytest pluggy iniconfig hypothesis sortedcontainers
#     python3 -m pip install --no-index --no-deps --target site wheels/*.whl && export PYTHONPATH=$PWD/site     # there
#
# Environment: STEPS="tests-engine low_bits" runs these alone; SECONDS_IN_ALL (540); PATIENCE (1) times as long for each
# step; PYTHON (python3); COMMIT, where git is not at hand; ON_GPU_DEVICE=cpu runs everything in tiny sizes without a
# GPU, to see that it runs.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
here=$root/examples/benchmarks
device=${ON_GPU_DEVICE:-cuda}
python=${PYTHON:-python3}
out=${1:-${OUT:-$here/results/gpu-$(date +%Y-%m-%d)}}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$root" || exit 2
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
deadline=$((SECONDS + ${SECONDS_IN_ALL:-540}))
failed=0
: >"$out/steps.jsonl"
: >"$out/log.txt"

# record STEP STATUS SECONDS WHY
record() {
    printf '{"step": "%s", "status": "%s", "seconds": %d, "why": "%s"}\n' "$@" >>"$out/steps.jsonl"
    printf '%-20s %-12s %4d s  %s\n' "$@"
}

# step NAME LIMIT "PACKAGES" COMMAND...: run a command for LIMIT seconds at most, if Python has the packages.
step() {
    local name=$1 limit=$2 packages=$3 package left start lines code
    shift 3
    limit=$((limit * ${PATIENCE:-1}))
    [[ -n ${STEPS:-} && " $STEPS " != *" $name "* ]] && return
    left=$((deadline - SECONDS))
    if ((left < 5)); then
        record "$name" "skipped" 0 "no time is left of ${SECONDS_IN_ALL:-540} seconds"
        failed=1
        return
    fi
    for package in $packages; do
        if ! "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$package') is None)"; then
            record "$name" "skipped" 0 "the package $package is missing; it can be carried as a wheel"
            return
        fi
    done
    printf '\n== %s\n' "$name" >>"$out/log.txt"
    start=$SECONDS lines=$(wc -l <"$out/log.txt")
    timeout --kill-after=10 "$((limit < left ? limit : left))" "$@" >>"$out/log.txt" 2>&1 </dev/null
    code=$?
    if ((code == 0)); then
        record "$name" "passed" $((SECONDS - start)) ""
    elif ((code == 124 || code == 137)); then
        record "$name" "out of time" $((SECONDS - start)) "its limit is $limit seconds"
        failed=1
    else
        record "$name" "failed" $((SECONDS - start)) "exit code $code"
        failed=1
    fi
    tail -n "+$((lines + 1))" "$out/log.txt" | tail -n "$((code == 0 ? 1 : 30))"
}

# Warnings are shown and no errors here: which packages a machine has is not what is tested. What is slow is run, too.
tests() {
    step "$1" "$2" "torch lightning torchmetrics pytest hypothesis" "$python" -m pytest -o addopts= \
        --import-mode=importlib -p no:cacheprovider -m gpu -v -rfE --tb=short --durations=5 -W default \
        -W ignore::pytest.PytestConfigWarning --basetemp "${TMPDIR:-/tmp}/on-gpu-$1" "${@:3}"
}

# benchmark NAME LIMIT "PACKAGES" SCRIPT "ARGUMENTS ON CUDA" "ARGUMENTS IN TINY SIZES"
benchmark() {
    local arguments=$5
    [[ $device == cuda ]] || arguments=$6
    # shellcheck disable=SC2086
    step "$1" "$2" "torch lightning torchmetrics $3" "$python" "$here/$4" --device "$device" $arguments --output "$out/$1.json"
}

step versions 30 "torch lightning torchmetrics" "$python" -c "
import importlib.metadata, json, pathlib, sys
sys.path.insert(0, '$here')
import measuring
about = measuring.machine('$device')
for package in importlib.metadata.distributions():
    name = package.metadata['Name']
    if name in ('torchmetrics', 'torchvision', 'triton', 'pytest', 'hypothesis', 'ml_dtypes', 'ml-dtypes', 'numpy'):
        about[name] = package.version
pathlib.Path('$out/versions.json').write_text(json.dumps(about, indent=1) + '\n')"
cat "$out/versions.json" 2>/dev/null
step devices 30 "torch" "$python" -m lightning_mixprec.numerics.devices

# The tests that tell most come first: casts and steps, numbers, then what watches, compiled code, and several ranks.
tests tests-engine 60 tests/engine/test_gpu.py tests/plugin/test_uniform.py tests/optim/test_gradients.py \
    tests/optim/test_loss_scaling.py tests/plugin/test_precision.py tests/plugin/test_late_steps.py \
    tests/optim/test_skipped_buffers.py tests/plugin/test_arguments.py tests/engine/test_transfer.py
tests tests-eight-bits 30 tests/engine/backends/test_scaled_products.py tests/engine/test_narrow.py
tests tests-numerics 30 tests/numerics/test_devices.py tests/numerics/test_rounding.py tests/numerics/test_exponents.py \
    tests/numerics/test_similarity.py tests/numerics/test_metrics.py tests/numerics/test_flat_batches.py
tests tests-evidence 40 tests/evidence/instruments/test_exact_fp32.py tests/evidence/instruments/test_trace.py \
    tests/evidence/instruments/test_sandbox.py tests/evidence/test_snapshot.py \
    tests/evidence/instruments/test_probe.py tests/evidence/test_step_window.py \
    tests/evidence/instruments/test_memory.py tests/evidence/test_short_of_memory.py \
    tests/evidence/measuring/test_traced.py
tests tests-deploy 50 tests/deploy/test_used_memory.py tests/deploy/test_compare.py tests/deploy/test_plan.py \
    tests/deploy/test_export_gpu.py
tests tests-callbacks 50 tests/callbacks/test_host_waits.py tests/callbacks/test_monitors_gpu.py \
    tests/callbacks/test_overflow_late.py tests/callbacks/test_adaptive_gpu.py
tests tests-compiled 50 tests/compiled/test_gpu.py
tests tests-distributed 30 tests/distributed/test_ddp_gpu.py tests/distributed/test_fsdp_gpu.py

benchmark overhead 50 torchvision overhead.py "--formats bf16 fp16 --fused yes --rounds 4 --steps 20 --warmup 5" \
    "--quick --models tiny --formats bf16"
benchmark monitors 40 torchvision monitors.py "--formats bf16 --modes eager --rounds 2 --steps 200" \
    "--quick --models tiny --formats bf16 --modes eager"
benchmark low_bits 70 torchvision low_bits.py "--rounds 5 --steps 5 --warmup 3" "--quick --models gpt"
benchmark low_bits-compiled 50 "" low_bits.py \
    "--models gpt --formats bf16 again fp8 fp8-row int8 --modes compiled --rounds 3 --steps 10 --warmup 3" \
    "--quick --models gpt --formats bf16 again --modes compiled --backend aot_eager"
benchmark rescue 50 "" rescue.py \
    "--cases rotary rms-norm outlier offset dice prices tasks mask alignment covariance clock fourier --controls \
    --seeds 1 --rounds 0" "--cases offset --controls --seeds 1 --rounds 0"
benchmark optimizers 90 "" optimizers.py "--rounds 5 --length 20" "--quick --models gpt"

printf '\nwritten: %s\n' "$out"
cat "$out/steps.jsonl"
exit $failed
