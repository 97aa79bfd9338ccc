#!/usr/bin/env bash
# What only a GPU can say, in at most 14 minutes: every part has a time limit and writes its result as it ends.
#
#   bash benchmarks/gpu_day.sh              on a machine with an NVIDIA GPU (one H100 or H200)
#   bash benchmarks/gpu_day.sh --rehearse   the same parts on a CPU, on a tiny model: that the script runs
#
# Results go to $OUT, else build/gpu-day: a JSON file and a log for each part, and summary.txt.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python3
vllm=${VLLM_PYTHON:-.venv-vllm/bin/python}
[ -x "$vllm" ] || vllm=$python
out=${OUT:-build/gpu-day}
mkdir -p "$out"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 VLLM_NO_USAGE_STATS=1 PYTHONPATH="$PWD"
began=$SECONDS
limit_all=840
rehearse=
slower=1
if [ "${1:-}" = --rehearse ]; then
  rehearse=1
  slower=${SLOWER:-4} # a shared CPU takes longer to import and to start
fi
limit_all=$((limit_all * slower))

# part, its longest time in seconds, the Python that runs it
run() {
  local left=$((limit_all - (SECONDS - began)))
  local limit=$(($2 * slower < left ? $2 * slower : left))
  if [ "$limit" -lt 10 ]; then
    echo "$1: not run, the 14 minutes are over" | tee -a "$out/summary.txt"
    return
  fi
  timeout --kill-after=5 "$limit" "$3" benchmarks/gpu_day.py "$1" --out "$out" ${rehearse:+--rehearse} \
    >"$out/$1.log" 2>&1
  local code=$?
  case $code in
    0) echo "$1: done" ;;
    3) echo "$1: not run: $(tail -n 1 "$out/$1.log")" ;;
    124 | 137) echo "$1: over its $limit s, what it measured by then is in $1.json" ;;
    *) echo "$1: failed with code $code: $(tail -n 1 "$out/$1.log")" ;;
  esac | tee -a "$out/summary.txt"
}

: >"$out/summary.txt"
run memory 170 "$python"
run scoring 80 "$python"
run candidates 170 "$vllm"
run exhausted 90 "$vllm"
run kernels 130 "$vllm"
run artefact 110 "$vllm"
run serving 80 "$vllm"
echo "all parts: $((SECONDS - began)) s" | tee -a "$out/summary.txt"
