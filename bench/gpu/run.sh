#!/usr/bin/env bash
# What is to be run first on a GPU, at most ten minutes: what would be wrong comes before what would be slow.
# Needs: an NVIDIA GPU, nvcc, Python with torch and numpy, this checkout. pytest, compute-sanitizer, and NIXL
# with SGLang for the transfers, are used if present. Every step runs even if one before it fails, its raw
# output is kept as OUT/STEP.log; the exit status is the number of failed steps.
#
#   bench/gpu/run.sh [--dry-run] [OUT [STEP...]]      OUT: default gpu-run; --dry-run only lists the steps
#   steps: facts build check transfer tests memcheck initcheck ladder bench (default: all)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
DRY=""; if [[ "${1:-}" == --dry-run ]]; then DRY=1; shift; fi
OUT="${1:-gpu-run}"
STEPS=" ${*:2} "
PYTHON="${PYTHON:-python3}"
CACHE="$OUT/cache"
LIMIT_S="${LIMIT_S:-600}"  # of the whole run: a step gets what is left of it
mkdir -p "$OUT" "$CACHE"
export PATH="$PATH:/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=0
SECONDS=0

step() {  # NAME SECONDS COMMAND...
  local name="$1" limit="$2" status=0; shift 2
  [[ "$STEPS" =~ ^\ *$ || "$STEPS" == *" $name "* ]] || return 0
  if (( limit > LIMIT_S - SECONDS )); then limit=$(( LIMIT_S - SECONDS )); fi
  echo "== $name (at most $limit s): $*"
  if [[ -n "$DRY" ]]; then return 0; fi
  if (( limit < 5 )); then
    echo "no time left of $LIMIT_S s" | tee "$OUT/$name.log"
    status=124
  else
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$OUT/$name.log" || status=$?
  fi
  if (( status == 0 )); then echo "-- $name: passed"; else
    echo "-- $name: FAILED ($status)"; failed=$((failed + 1))
  fi
}

skip() {  # NAME REASON
  echo "== $1: skipped, $2"
  if [[ -z "$DRY" ]]; then echo "skipped: $2" > "$OUT/$1.log"; fi
}

has() { "$PYTHON" -c "import $1" 2>/dev/null; }

facts() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem --format=csv
  nvcc --version | tail -2
  "$PYTHON" -c 'import torch; print("torch", torch.__version__, torch.cuda.get_device_name())'
}
export -f facts; export PYTHON

sanitize() {  # TOOL
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$1" 90 compute-sanitizer --tool "$1" --error-exitcode 9 \
    "$PYTHON" bench/gpu/check.py "$CACHE" --cases 40
}

step facts 30 bash -c facts
step build 60 "$PYTHON" -m pdserve.kv.kernels --out "$OUT/library" --archs 80,90,100
step check 60 "$PYTHON" bench/gpu/check.py "$CACHE" --cases 60
# Two processes over cuda_ipc: outbox, CudaPageCopier and NIXL on GPU memory, every byte compared, and the cost law.
if has nixl && has sglang; then
  step transfer 150 "$PYTHON" bench/transfer.py --gpu 0 --geometry llama8b --tokens 500,8000 --free 0.05 --rounds 5
else
  skip transfer "no nixl with sglang here"
fi
if has pytest; then
  step tests 90 "$PYTHON" -m pytest tests/gpu -m gpu -rs -p no:cacheprovider
else
  skip tests "no pytest here (check.py covers the copies)"
fi
for tool in memcheck initcheck; do
  if command -v compute-sanitizer >/dev/null; then sanitize "$tool"; else skip "$tool" "no compute-sanitizer"; fi
done
step ladder 60 "$PYTHON" cuda/dev/ladder.py --mb 256
step bench 90 "$PYTHON" bench/gpu/coalesce.py --cache "$CACHE"
echo "== failed steps: $failed, after $SECONDS s"
exit "$failed"
