#!/usr/bin/env bash
# The update and rollout rows on one NVIDIA GPU, with what is installed there: benchmarks/gpu.sh [OUTPUT_FOLDER]
# Needs a Python environment with this package and a CUDA build of torch as `python`. Writes <OUTPUT_FOLDER>/gpu.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
output=${1:-runs/bench}
mkdir -p "$output"
python -c 'import sys, torch; sys.exit("No CUDA device: nothing is measured.") if not torch.cuda.is_available() else None'
export HF_HUB_OFFLINE=1
{
    echo "# On $(python -c 'import torch; print(torch.cuda.get_device_name(0), "· torch", torch.__version__)')"
    echo
    echo "## The packs' attention: \`pytest -m gpu\`"
    echo
    python -m pytest -q -m gpu tests/test_prefix_sharing.py | tail -1
    echo
    echo "## Update: \`benchmarks/update.py --device cuda\`"
    echo
    python benchmarks/update.py --device cuda
    echo
    echo "## Rollout and step: \`benchmarks/against_trl.py\`"
    echo
    if [ ! -d runs/quickstart/sft ]; then python -m arpo_trl.quickstart > "$output/quickstart.log" 2>&1; fi
    python benchmarks/against_trl.py 2> "$output/against_trl.log"
} | tee "$output/gpu.md"
