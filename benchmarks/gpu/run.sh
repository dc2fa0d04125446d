#!/bin/sh
# Train a Llama of 1.1 billion random parameters on the GPU, with peftcli, peft + Trainer and TRL: tokens a second and memory.
# Under 10 minutes on an H100, once .venv-gpu is there, which it builds; or name a Python that has TRL:
#
#   PYTHON=.venv-bench/bin/python benchmarks/gpu/run.sh [--shape tiny] [--rounds 3]
set -eu
cd "$(dirname "$0")/../.."
if [ -z "${PYTHON:-}" ]; then
  PYTHON=.venv-gpu/bin/python
  make --no-print-directory .venv-gpu/.installed
fi
"$PYTHON" configs/quickstart/fetch_model.py models/SmolLM2-135M-Instruct
exec "$PYTHON" benchmarks/gpu/compare.py "$@"
