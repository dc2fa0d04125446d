#!/bin/sh
# Train a Llama of 1.1 billion random parameters on the GPU, with peftcli, peft + Trainer and TRL: tokens a second and memory.
# Needs TRL, and the tokenizer that `make quickstart` fetches. Under 10 minutes on an H100.
#
#   PYTHON=.venv-bench/bin/python benchmarks/gpu/run.sh [--shape tiny] [--rounds 3]
set -eu
cd "$(dirname "$0")/../.."
exec "${PYTHON:-python}" benchmarks/gpu/compare.py "$@"
