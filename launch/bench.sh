#!/usr/bin/env bash
# What knots cost on SmolLM2-135M: ties local and gathered, extensions, and three links beside one. About 50 minutes on two cores.
#   ./launch/bench.sh [section.key=value ...] [--processes N] [--knots K] [--pairs P] [--steps S] [--memory-pairs M]
# Two processes unless N says otherwise; overrides of launch/quickstart/run.yaml, e.g. model.path=... model.dtype=bf16.
set -euo pipefail
cd "$(dirname "$0")/.."
./launch/setup.sh quickstart
# shellcheck disable=SC1091
source .venv/bin/activate
python launch/quickstart/model.py build/SmolLM2-135M-Instruct
[ -f build/quickstart/dev.jsonl ] || python launch/quickstart/data.py build/quickstart 800 64
exec python -m tests.bench.knots launch/quickstart/run.yaml "$@"
