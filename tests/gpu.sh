#!/usr/bin/env bash
# Runs everything that waits for a real GPU, within 25 minutes, and writes a table.
#
#     tests/gpu.sh [FILE]
#
# FILE (gpu.txt) gets the table, FILE.log all output. PYTHON names the Python with mixchat,
# LLAMA_PYTHON one with llama-cpp-python built for the GPU, and gguf; LAYERS (32) is the count of
# layers with Mixtral's shapes. Without a GPU, or llama.cpp, the table says what was left out.
set -euo pipefail
cd "$(dirname "$0")/.."

table=${1:-gpu.txt}
log=$table.log
python=${PYTHON:-python}
llama=${LLAMA_PYTHON:-$python}
layers=${LAYERS:-32}
end=$((SECONDS + ${SECONDS_IN_ALL:-1500}))
failed=0

row() {
    printf '%-34s %-9s %s\n' "$@" | tee -a "$table"
}

# step NAME COMMAND...: a row with the result of a command, which ends with the time for all.
step() {
    local name=$1 left=$((end - SECONDS)) output status=0
    shift
    if ((left <= 0)); then
        row "$name" skipped "no time left"
        return
    fi
    output=$(mktemp)
    timeout --kill-after=10 "$left" "$@" >"$output" 2>&1 || status=$?
    { echo "== $name: $*"; cat "$output"; } >>"$log"
    if ((status == 0)); then
        row "$name" done "$(summary "$output")"
    else
        failed=1
        row "$name" "failed $status" "$(tail -n 1 "$output")"
    fi
    rm -f "$output"
}

# summary FILE: the figures of a bench (JSON), else the last line.
summary() {
    "$python" - "$1" <<'PROGRAM'
import json, statistics, sys

text = open(sys.argv[1], encoding="utf-8", errors="replace").read()
try:
    tasks = json.loads(text[text.index("{\n") :])["tasks"]
except (KeyError, ValueError):
    print((text.strip().splitlines() or [""])[-1])
else:
    for task in tasks:
        numbers = [f"{task['name']}: {statistics.median(task['mixchat']):.1f} tok/s"]
        if task["llama.cpp"]:
            numbers.append(f"(llama.cpp {statistics.median(task['llama.cpp']):.1f})")
        print(*numbers, end="  ")
PROGRAM
}

bench() {
    local name=$1
    shift
    step "$name" "$python" -m mixchat bench --synthetic "$layers" --rounds 3 --json "$@"
}

: >"$table"
: >"$log"
row STEP RESULT FIGURES
step "paper GPUs" "$python" -m pytest -q tests/loading/test_paper_gpu.py tests/loading/test_several_gpus.py
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>>"$log"; then
    row "GPU" skipped "torch sees none: tests marked gpu, bench (resident, 8, 12, 24 GB, several GPUs), llama.cpp"
    exit "$failed"
fi
row "GPU" found "$("$python" -c 'import torch; print(torch.cuda.get_device_name())')"
step "tests marked gpu" "$python" -m pytest -q -m gpu
bench "resident" --device cuda:0
for size in 8 12 24; do
    bench "offloaded, $size GB" --device cuda:0 --device-memory "${size}GB"
done
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
if ((gpus > 1)); then
    for size in 8 12; do
        bench "$gpus GPUs, $size GB each" --device cuda --device-memory "${size}GB"
    done
else
    row "several GPUs" skipped "torch sees one"
fi
if "$llama" -c 'import llama_cpp, gguf' 2>>"$log"; then
    step "beside llama.cpp" "$python" tests/benchmarks/side_by_side.py \
        --synthetic "$layers" --python "$llama" --rounds 3 --json
else
    row "beside llama.cpp" skipped "$llama has no llama-cpp-python and gguf"
fi
exit "$failed"
