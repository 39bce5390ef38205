#!/usr/bin/env bash
# The first half hour on a real GPU: all that no machine without one can tell. Runs to its end
# whatever fails, and says so; without a GPU it says what is missing. Writes results/gpu-*.json.
#
#     bash tests/gpu.sh            then: python evaluate.py report
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python}

if ! "$python" -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then
    echo "no CUDA device here: nothing to do; on a machine with one this takes half an hour"
    exit 0
fi

failed=""
try() {
    echo "== $*"
    "$@" || failed="$failed; $*"
}

try "$python" -m pytest -q -m gpu
try "$python" -c "import flash_attn"
try "$python" lab/gpu.py --parts parity
try "$python" lab/gpu.py --parts decoders
try "$python" lab/gpu.py --parts segment
try "$python" lab/gpu.py --parts pipeline
try "$python" play.py --check --preset 5b --weights random

echo "failed: ${failed:-nothing}"
