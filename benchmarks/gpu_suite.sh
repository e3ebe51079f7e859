#!/usr/bin/env bash
# Everything that wants a GPU, in stages of less than ten minutes each:
#
#   benchmarks/gpu_suite.sh build              csrc with g++ and nvcc, then every operator's self-test
#   benchmarks/gpu_suite.sh test [pytest arguments]
#   benchmarks/gpu_suite.sh sync               the host waits for nothing
#   benchmarks/gpu_suite.sh graph              CUDA graphs: whole sampler runs, operators, an optimiser step
#   benchmarks/gpu_suite.sh bench [operator ...]   a few at a time, where a call has a limit: each compiles its rivals
#   benchmarks/gpu_suite.sh all                build, test, sync, graph, bench; what fails is named at the end
#
# --dry-run before the stage tries it on the CPU, small: for errors, not for numbers. PYTHON (python3, or .venv's) runs
# it from the sources, installed or not; results go to OUT (benchmarks/results; build/dry_run in a dry run), and all in
# one archive to PACK where that names a .tar.gz. Where nothing can be downloaded, WHEELS names a folder of wheels to
# use: the samplers of sync and graph need pydantic, pydantic_core, annotated-types and typing-inspection; a rival of
# attention_jvp is jvp_flash_attention (pip download --no-deps -d FOLDER NAME ...).
set -euo pipefail
cd "$(dirname "$0")/.."

device=cuda
extra=()
parallel=()
if [ "${1:-}" = "--dry-run" ]; then
    device=cpu
    extra=(--small)
    shift
fi
stage=${1:-help}
[ $# -gt 0 ] && shift

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
results=benchmarks/results
[ "$device" = cpu ] && results=build/dry_run
OUT=${OUT:-$results}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD/engine:$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "${WHEELS:-}" ]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --upgrade --target build/wheels "$WHEELS"/*.whl
    export PYTHONPATH="$PYTHONPATH:$PWD/build/wheels"
fi
# compiled Triton and Inductor kernels are kept between calls, beside the tests' own cache
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/.cache/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$PWD/.cache/inductor}

build() {
    [ "$device" = cpu ] || "$PYTHON" setup.py -q build_ext --inplace
    "$PYTHON" - <<'PYTHON'
import sys
import fewstep_kernels

print(*(f"{line['operator']:20} {line['device']:5} {line['backend']:10} {line['why']}" for line in fewstep_kernels.report()), sep="\n")
checks = fewstep_kernels.self_test()
print(*(check.problem or f"{check.operator:20} {check.device:5} {check.backend:10} {check.error:.1e}" for check in checks), sep="\n")
sys.exit(any(check.problem for check in checks))
PYTHON
}

tests() {
    if [ "$device" = cpu ]; then
        # collected and its imports done; the tests of the kernels themselves are tried by FEWSTEP_TEST_DEVICE=cpu
        "$PYTHON" -m pytest -q --collect-only -m gpu tests/kernels "$@" | tail -n 3
    else
        # some hundred kernels are compiled, which takes minutes on one core; references run on the cores too
        "$PYTHON" -c "import xdist" 2>/dev/null && parallel=(-n "$(($(nproc) * 3 / 4))")
        OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$PYTHON" -m pytest -q -m gpu tests/kernels "${parallel[@]}" "$@"
        "$PYTHON" -m pytest -q tests/kernels/test_self_test.py tests/kernels/test_backends.py
    fi
}

pack() {
    [ -z "${PACK:-}" ] || (cd "$OUT" && tar czf - -- *_gpu.*) >"$PACK"
}

case "$stage" in
build) build ;;
test) tests "$@" ;;
sync) "$PYTHON" benchmarks/gpu/sync.py --device "$device" ;;
graph) "$PYTHON" benchmarks/gpu/graph.py --device "$device" ;;
bench)
    trap pack EXIT # what there is of it, also where an operator fails
    "$PYTHON" benchmarks/gpu/bench.py "$@" --device "$device" --out "$OUT" "${extra[@]}"
    ;;
all)
    again=()
    [ "$device" = cpu ] && again=(--dry-run)
    failed=()
    for part in build test sync graph bench; do
        echo "== $part"
        benchmarks/gpu_suite.sh "${again[@]}" "$part" || failed+=("$part")
    done
    [ ${#failed[@]} -eq 0 ] || { echo "gpu_suite.sh: failed: ${failed[*]}" >&2; exit 1; }
    ;;
*)
    sed -n '2,17s/^# \{0,1\}//p' "$0"
    [ "$stage" = help ] || { echo "gpu_suite.sh: unknown stage '$stage'; choose build, test, sync, graph, bench or all." >&2; exit 2; }
    ;;
esac
