#!/bin/sh
# Tests and times everything on a machine with an NVIDIA GPU, without a network, within seconds that are known before.
#   usage: bench/gpu.sh OUT [A | B | rehearse | PART...]
# A answers whether it works and what it is worth, B measures everything that has a bar (both: 330 s each, of which no
# part takes more than its share; WHOLE=SECONDS says otherwise); without a plan both run. PARTs: kernels smoke first ncu
# tests meta general (A), steps compiled gradients memcheck racecheck sizes autotune (B). PYTHON (default python3) names
# an interpreter with a torch for CUDA. PREBUILT (default build/gpu), which bench/gpu_build.sh fills, saves the
# compilation where its key fits. It leaves in OUT: log.txt, sanitizer.txt, ncu*.txt and what bench/report.py writes. A
# part that fails or runs out of its time is said so in the table at the end, the rest goes on, and the exit status is 1.
# "rehearse" goes through the parts that need no GPU, small, on the CPU. Exits with 2 where there is no GPU.
set -u
usage() {
  sed -n '2,10p' "$0"
  exit 64
}
[ $# -ge 1 ] || usage
out=$1
shift
device=cuda
plan_a="kernels smoke first ncu tests meta general"
plan_b="steps compiled gradients memcheck racecheck sizes autotune"
whole=${WHOLE:-700}
case "${1:-}" in
  A) chosen=$plan_a whole=${WHOLE:-330} && shift ;;
  B) chosen=$plan_b whole=${WHOLE:-330} && shift ;;
  rehearse) chosen="smoke first steps" device=cpu && shift ;;
  *) chosen=${*:-$plan_a $plan_b} ;;
esac
for name in $chosen; do
  case " $plan_a $plan_b " in *" $name "*) ;; *) usage ;; esac
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root" || exit 1
python=$(command -v "${PYTHON:-python3}") || exit 1
# torch runs ninja as a program, and compiled rivals run a compiler.
export PATH="$(dirname "$python"):$PATH"
export PYTHONPATH="$root:$root/bench${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
prebuilt=${PREBUILT:-build/gpu}
begun=$(date +%s)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
log=$out/log.txt
: >"$log"
table=$work/table
: >"$table"
say() { printf '%s\n' "$*" | tee -a "$log"; }

# ---------------------------------------------------------------- what is there

missing=$("$python" - <<'PY'
import importlib.util as u
from importlib.metadata import version
need = ["torch", "numpy", "safetensors", "setuptools", "pybind11", "pytest", "pytest_benchmark"]
old = u.find_spec("setuptools") and int(version("setuptools").split(".")[0]) < 77
print(*[n for n in need if not u.find_spec(n)], *["setuptools>=77"] * bool(old))
PY
) || exit 1
if [ -n "$missing" ]; then
  echo "missing Python packages: $missing" >&2
  echo "Install them, or put them in a folder (pip install --target FOLDER ...) and that folder on PYTHONPATH." >&2
  exit 1
fi
has() { "$python" -c "import $1" 2>/dev/null; }
for extra in hypothesis matplotlib xdist pytest_timeout; do
  has $extra || say "without $extra: skipped tests, no picture, one process or no limit for a test"
done
ninja --version >/dev/null 2>&1 || say "without ninja: a slow build, if one is needed"
if [ $device = cuda ]; then
  arch=$("$python" -c 'import torch; assert torch.cuda.is_available(); print("%d.%d" % torch.cuda.get_device_capability())' 2>/dev/null) || {
    echo "no GPU: torch finds no CUDA device here, so there is nothing to measure" >&2
    exit 2
  }
  nvidia-smi >>"$log" 2>&1
fi
clocks() {
  [ $device = cuda ] && say "clocks now: $(nvidia-smi --query-gpu=clocks.sm,clocks.mem,temperature.gpu,power.draw --format=csv,noheader)"
}

# ---------------------------------------------------------------- parts

wants() { case " $chosen " in *" $1 "*) ;; *) return 1 ;; esac; }

# part NAME SECONDS COMMAND...: its output goes to the log; one line for the table at the end.
part() {
  name=$1
  limit=$2
  shift 2
  left=$((whole - $(date +%s) + begun))
  [ "$limit" -gt "$left" ] && limit=$left
  if [ "$limit" -le 5 ]; then
    printf '%-24s no time was left\n' "$name" | tee -a "$table"
    return 1
  fi
  start=$(date +%s)
  printf '\n===== %s\n' "$name" >>"$log"
  # An interrupt first: pytest then still writes what it has.
  timeout -s INT -k 5 "$limit" "$@" >"$work/part" 2>&1
  code=$?
  cat "$work/part" >>"$log"
  case $code in
    0) said="done" ;;
    124 | 137) said="stopped after $limit s" ;;
    *) said="FAILED ($code)" ;;
  esac
  printf '%-24s %-20s %4d s  %s\n' "$name" "$said" $(($(date +%s) - start)) "$(tail -n 1 "$work/part" | cut -c1-90)" | tee -a "$table"
  return $code
}

bench() { # bench NAME SECONDS PYTEST-ARGUMENTS..., the files among them
  name=$1
  limit=$2
  shift 2
  part "bench: $name" "$limit" "$python" -m pytest -p no:cacheprovider -rs --benchmark-quiet --device $device \
    --time-anyway --benchmark-json="$work/bench-$name.json" "$@"
}

check_memory() { # check_memory TOOL SECONDS
  command -v compute-sanitizer >/dev/null || { say "sanitizer: compute-sanitizer is not there" && return; }
  filter=
  compute-sanitizer --help 2>&1 | grep -q -e --kernel-name && filter="--kernel-name kns=l2l"
  # shellcheck disable=SC2086  # two words or none
  part "sanitizer: $1" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" $filter --error-exitcode 9 \
    "$python" bench/gpu_small.py --coordinates 300 --many
  [ $? -eq 9 ] && ! grep -q 'l2l::' "$work/part" && sed -i "/: $1 /s/FAILED (9)/not ours  /" "$table"
  { printf '\n===== %s\n' "$1" && head -c 4000000 "$work/part"; } >>"$out/sanitizer.txt"
}

profile() { # profile NAME COORDINATES KERNEL: of the second launch, every metric; and where its warps wait
  part "ncu: $1" 30 ncu --clock-control none --set full --import-source yes --kernel-name "regex:$3" --launch-skip 1 \
    --launch-count 1 -f -o "$work/$1" "$prebuilt/kernels" trace "$1" "$2" || return
  ncu -i "$work/$1.ncu-rep" --page details >>"$out/ncu.txt" 2>&1
  ncu -i "$work/$1.ncu-rep" --page raw 2>/dev/null | grep -e issue_stalled -e inst_executed_pipe >>"$out/ncu.txt"
  ncu -i "$work/$1.ncu-rep" --page source --csv --print-source sass 2>/dev/null | cut -c1-1500 | gzip >"$out/ncu-$1.csv.gz"
}

clocks
if [ $device = cuda ]; then
  key=$("$python" bench/gpu_key.py "$arch")
  if [ "$key" = "$(cat "$prebuilt/key" 2>/dev/null)" ] && cp "$prebuilt"/_C.*.so l2l_fast/; then
    say "built before: $key"
  else
    say "building, since $prebuilt has no module for $key"
    part build 200 env PYTHON="$python" ARCH="$arch" bench/gpu_build.sh "$prebuilt" || { tail -n 40 "$log"; exit 1; }
    cp "$prebuilt"/_C.*.so l2l_fast/
  fi
  wants kernels && part kernels 60 "$prebuilt/kernels"
fi
if wants smoke; then
  [ $device = cuda ] && blocking=1 || blocking=0
  part smoke 60 env CUDA_LAUNCH_BLOCKING=$blocking "$python" bench/gpu_small.py --device $device --many
fi
if wants first; then
  [ $device = cuda ] && parts="small rule backward" || parts="small"
  # shellcheck disable=SC2086  # several words
  part first 60 "$python" bench/gpu_first.py --device $device $parts
fi
if wants ncu; then
  if command -v ncu >/dev/null; then
    : >"$out/ncu.txt"
    profile float32 4000000 'step'
    profile bfloat16 4000000 'step'
    profile teams 16000 'step_by_teams'
    profile unroll 16000 'backward'
  else
    say "ncu is not there"
  fi
fi
if wants tests; then
  options="-q -p no:cacheprovider -p no:benchmark --durations=15"
  has xdist && options="$options -n 12"
  has pytest_timeout && options="$options --timeout=60 --timeout-method=thread"
  # shellcheck disable=SC2086  # several words
  part tests 110 env OMP_NUM_THREADS=2 "$python" -m pytest tests/cuda -m cuda $options
fi
wants meta && part meta 60 "$python" bench/gpu_first.py --device $device meta
wants general && part general 45 "$python" bench/gpu_first.py --device $device general
if wants steps; then
  if [ $device = cuda ]; then
    bench steps 80 bench/test_overhead.py bench/test_step.py --sizes 16k,10M -k "not compile and not SGD and not loop"
  else
    bench steps 100 bench/test_step.py --quick --sizes 1k -k "ours or fused"
  fi
fi
wants compiled && bench compiled 75 bench/test_step.py --sizes 16k,10M -k "compile and not autotune"
wants gradients && bench gradients 60 bench/test_meta_update.py bench/test_meta_gradient.py bench/test_training_step.py -k "not compile"
wants memcheck && : >"$out/sanitizer.txt" && check_memory memcheck 45
wants racecheck && check_memory racecheck 45
wants sizes && bench sizes 60 bench/test_step.py --sizes 1k,resnet,1M -k "not compile and not SGD and not loop"
wants autotune && bench autotune 60 bench/test_step.py bench/test_meta_gradient.py --sizes 10M -k "autotune or gradient and compile"
clocks

# ---------------------------------------------------------------- the report

: >"$work/report"
if ls "$work"/bench-*.json >/dev/null 2>&1; then
  "$python" bench/report.py "$work"/bench-*.json --out "$out" >"$work/report" 2>&1 || echo "report                   FAILED" >>"$table"
fi
{ printf '\n' && cat "$work/report" && printf '\n' && cat "$table" && echo "whole run: $(($(date +%s) - begun)) s"; } | tee -a "$log"
! grep -q -e FAILED -e stopped -e "no time" "$table"
