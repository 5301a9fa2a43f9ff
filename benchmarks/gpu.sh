#!/bin/sh
# One command on a machine with an NVIDIA GPU: `sh benchmarks/gpu.sh`. It checks for CUDA, installs what is missing into
# the Python at hand (PYTHON names another), runs the tests of the Triton kernels on the GPU, and then the benchmark,
# whose last line on stdout is one JSON object; all else goes to stderr. Arguments go to the benchmark.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

"$PYTHON" -c 'import torch' 2>/dev/null || {
    echo "got no torch in $PYTHON, expected a build of torch for CUDA: install one from pytorch.org, or set PYTHON" >&2
    exit 2
}
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "got no CUDA device in $PYTHON, expected one: run this on a machine with an NVIDIA GPU" >&2
    exit 2
}
"$PYTHON" -c 'import attnpred.hf, hypothesis, pytest, triton, typer' 2>/dev/null ||
    "$PYTHON" -m pip install --quiet --editable '.[gpu]' pytest hypothesis >&2

tests=passed
unset TRITON_INTERPRET
"$PYTHON" -m pytest -q -p no:cacheprovider tests/kernels/test_triton.py >&2 || tests=failed
"$PYTHON" -m benchmarks.gpu --tests "$tests" "$@"
[ "$tests" = passed ]
