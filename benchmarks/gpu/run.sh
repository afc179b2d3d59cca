#!/usr/bin/env bash
# TensorRT engines on this machine's GPU, from two prepared folders to records and a table.
#
#   benchmarks/gpu/run.sh MODELS IMAGES OUT [OPTIONS]
#
# MODELS and IMAGES: output of benchmarks/gpu/prepare.py. OUT: a folder for engines, records and table.md.
# Needs Python 3.10 or newer ($PYTHON, python3 if not set) with TensorRT 8.5 or newer, cuda-python, numpy, Pillow, onnx.
# OPTIONS: --no-library-tactics where cuBLAS and cuDNN are missing (shared/gpu/pack.sh), --budget SECONDS,
# --dry-run to use ONNX Runtime on the CPU instead; full list: benchmarks/gpu/run.sh --help
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
export PYTHONPATH="$here/../..${PYTHONPATH:+:$PYTHONPATH}"
if ! "$python" -c 'import sys; assert sys.version_info >= (3, 10); import numpy, onnx, PIL' 2>/dev/null; then
    echo "error: $python is not Python 3.10 or newer with numpy, onnx and Pillow; name another with PYTHON=…" >&2
    exit 2
fi
exec "$python" "$here/measure.py" "$@"
