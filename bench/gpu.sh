#!/bin/sh
# Builds, tests and times everything on a machine with an NVIDIA GPU, in under eight minutes and without a network.
#   usage: bench/gpu.sh OUT [rehearse | PART...]
# PART, to run some alone after the build: tests, steps, compiled, meta, ncu, sanitizer, rest.
# It needs a CUDA toolkit and a torch for CUDA; PYTHON (default python3) names the interpreter. It leaves in OUT, at most
# eight files: log.txt, tests.txt, sanitizer.txt, ncu.csv and what bench/report.py writes. A part that fails or runs out
# of its time is said so in the table at the end, and the rest goes on.
# "rehearse" goes through the parts that need no GPU, small, on the CPU. Exits with 2 where there is no GPU.
set -u
usage() {
  sed -n '2,8p' "$0"
  exit 64
}
[ $# -ge 1 ] || usage
out=$1
shift
device=cuda
all="tests steps compiled meta ncu sanitizer rest"
[ "${1:-}" = rehearse ] && device=cpu && shift
for name; do
  case " $all " in *" $name "*) ;; *) usage ;; esac
done
chosen=" ${*:-$all} "
mkdir -p "$out"
out=$(cd "$out" && pwd)
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root" || exit 1
python=${PYTHON:-python3}
export PYTHONPATH="$root:$root/bench${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
begun=$(date +%s)
whole=480 # seconds for everything
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
log=$out/log.txt
: >"$log"
table=$work/table
: >"$table"

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
for extra in ninja hypothesis matplotlib; do
  "$python" -c "import $extra" 2>/dev/null || echo "without $extra: a slow build, skipped tests or no picture" | tee -a "$log"
done
if [ $device = cuda ]; then
  arch=$("$python" -c 'import torch; assert torch.cuda.is_available(); print("%d.%d" % torch.cuda.get_device_capability())' 2>/dev/null) || {
    echo "no GPU: torch finds no CUDA device here, so there is nothing to measure" >&2
    exit 2
  }
  nvidia-smi >>"$log" 2>&1
fi

# ---------------------------------------------------------------- parts

wants() { case $chosen in *" $1 "*) ;; *) return 1 ;; esac; }

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
    --benchmark-json="$work/bench-$name.json" "$@"
}

check_memory() { # check_memory TOOL
  filter=
  # initcheck must see what other kernels write.
  [ "$1" != initcheck ] && compute-sanitizer --help 2>&1 | grep -q -e --kernel-name && filter="--kernel-name kns=l2l"
  # shellcheck disable=SC2086  # two words or none
  part "sanitizer: $1" 45 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" $filter --error-exitcode 9 \
    "$python" bench/gpu_small.py --coordinates 300 --many
  [ $? -eq 9 ] && ! grep -q 'l2l::' "$work/part" && sed -i "/: $1 /s/FAILED (9)/not ours  /" "$table"
  { printf '\n===== %s\n' "$1" && head -c 4000000 "$work/part"; } >>"$out/sanitizer.txt"
}

if [ $device = cuda ]; then
  # For this GPU alone: a third of the time. nvcc's -split-compile would be quicker still, and compile other code.
  part build 150 env FORCE_CUDA=1 L2L_FAST_REQUIRE_EXT=1 TORCH_CUDA_ARCH_LIST="$arch" \
    "$python" setup.py -q build_ext --inplace || { tail -n 40 "$log"; exit 1; }
  parallel=$("$python" -c "import xdist" 2>/dev/null && echo "-n 6")
  # By need: what comes last is what a slow machine goes without. The sizes that have bars first.
  if wants tests; then
    # shellcheck disable=SC2086  # two words or none
    part tests 120 env OMP_NUM_THREADS=2 "$python" -m pytest tests/cuda -m cuda -q -p no:cacheprovider $parallel
    cp "$work/part" "$out/tests.txt"
  fi
  if wants steps; then
    bench steps 80 bench/test_overhead.py bench/test_step.py --sizes 16k,10M -k "not compile"
  fi
  if wants compiled; then
    bench compiled 75 bench/test_step.py --sizes 16k,10M -k "compile and not autotune"
  fi
  if wants meta; then
    bench meta 60 bench/test_meta_update.py bench/test_meta_gradient.py bench/test_training_step.py -k "not compile"
  fi
  if wants ncu; then
    if command -v ncu >/dev/null; then
      metrics=gpu__time_duration.sum,dram__bytes.sum,dram__bytes.sum.per_second
      metrics=$metrics,dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__throughput.avg.pct_of_peak_sustained_elapsed
      sections="--section ComputeWorkloadAnalysis --section MemoryWorkloadAnalysis --section SchedulerStats"
      sections="$sections --section WarpStateStats --section LaunchStats"
      for state in float32 bfloat16; do
        # shellcheck disable=SC2086  # several words
        part "ncu: $state" 40 ncu --clock-control none --csv --kernel-name regex:step --launch-skip 1 --launch-count 1 \
          --metrics $metrics $sections \
          "$python" bench/gpu_small.py --only step --state $state --coordinates 10000000
        cat "$work/part" >>"$out/ncu.csv"
      done
    else
      echo "ncu                      is not there" | tee -a "$table"
    fi
  fi
  if wants sanitizer; then
    if command -v compute-sanitizer >/dev/null; then
      : >"$out/sanitizer.txt"
      for tool in memcheck racecheck initcheck; do check_memory $tool; done
    else
      echo "sanitizer                compute-sanitizer is not there" | tee -a "$table"
    fi
  fi
  if wants rest; then
    bench sizes 60 bench/test_step.py --sizes 1k,resnet,1M -k "not compile"
    bench autotune 90 bench/test_step.py bench/test_meta_gradient.py --sizes 10M -k "autotune or gradient and compile"
  fi
else
  part "small case" 60 "$python" bench/gpu_small.py --device cpu --many
  bench steps 100 bench/test_step.py --quick --sizes 1k -k "ours or fused"
fi

# ---------------------------------------------------------------- the report

: >"$work/report"
if ls "$work"/bench-*.json >/dev/null 2>&1; then
  "$python" bench/report.py "$work"/bench-*.json --out "$out" >"$work/report" 2>&1 || echo "report                   FAILED" >>"$table"
fi
{ printf '\n' && cat "$work/report" && printf '\n' && cat "$table" && echo "whole run: $(($(date +%s) - begun)) s"; } | tee -a "$log"
! grep -q -e FAILED -e stopped -e "no time" "$table"
