#!/usr/bin/env bash
# Everything that needs a GPU, in one call of about five minutes: build, tests, ladder, sanitizers, bench.
# Needs: an NVIDIA GPU, nvcc, Python with torch and numpy, this checkout. pytest and compute-sanitizer are
# used if present. Every step runs even if one before it fails; the exit status is the number of failed steps.
#
#   bench/gpu/run.sh [OUT [STEP...]]      logs to OUT (default: gpu-run), one per step
#   steps: facts build check tests memcheck initcheck racecheck ladder bench (default: all)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
OUT="${1:-gpu-run}"
STEPS=" ${*:2} "
PYTHON="${PYTHON:-python3}"
CACHE="$OUT/cache"
mkdir -p "$OUT" "$CACHE"
export PATH="$PATH:/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=0

step() {  # NAME SECONDS COMMAND...
  local name="$1" limit="$2"; shift 2
  [[ "$STEPS" =~ ^\ *$ || "$STEPS" == *" $name "* ]] || return 0
  echo "== $name"
  if timeout "$limit" "$@" 2>&1 | tee "$OUT/$name.log"; then
    echo "-- $name: passed"
  else
    echo "-- $name: FAILED"; failed=$((failed + 1))
  fi
}

facts() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem --format=csv
  nvcc --version | tail -2
  "$PYTHON" -c 'import torch; print("torch", torch.__version__, torch.cuda.get_device_name())'
}
export -f facts; export PYTHON

sanitize() {  # TOOL OPTIONS...
  local tool="$1"; shift
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool" 150 compute-sanitizer --tool "$tool" --error-exitcode 9 \
    "$@" "$PYTHON" bench/gpu/check.py "$CACHE" --cases 40
}

step facts 60 bash -c facts
step build 120 "$PYTHON" -m pdserve.kv.kernels --out "$OUT/library" --archs 80,90,100
step check 120 "$PYTHON" bench/gpu/check.py "$CACHE"
if "$PYTHON" -c 'import pytest' 2>/dev/null; then
  step tests 180 "$PYTHON" -m pytest tests/gpu -m gpu -rs -p no:cacheprovider
else
  echo "== tests: skipped, no pytest here (check.py covers the copies)"
fi
if command -v compute-sanitizer >/dev/null; then
  sanitize memcheck
  sanitize initcheck
  sanitize racecheck
else
  echo "== sanitizers: skipped, no compute-sanitizer on PATH"
fi
step ladder 120 "$PYTHON" cuda/dev/ladder.py --mb 256
step bench 240 "$PYTHON" bench/gpu/coalesce.py --cache "$CACHE"
echo "== failed steps: $failed"
exit "$failed"
