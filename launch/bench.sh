#!/usr/bin/env bash
# What knots cost on SmolLM2-135M, links of rank 8 on query and value projections: ties local and gathered, extensions, and three
# links beside one. About 50 minutes on two cores.
#   ./launch/bench.sh [section.key=value ...] [--processes N] [--knots K] [--pairs P] [--steps S] [--memory-pairs M]
# Two processes unless N says otherwise; overrides of launch/quickstart/run.yaml, e.g. model.path=... model.dtype=bf16.
#
# What a step takes on one GPU: LoRA on all linear layers of Llama-3-8B's shapes, rung by rung, and a chain beside one link. About seven
# minutes; the model's weights are random, nothing is downloaded.
#   ./launch/bench.sh gpu [section.key=value ...] [--model llama-3-8b] [--rungs NAME ...] [--rows B] [--max-length T] [--steps S]
#
# What evaluation takes: a task's candidates and answers one at a time, and as the project has them, on rows of random ids. A few
# minutes; without MODEL, a folder, on a model of random weights of SmolLM2-135M's shape; nothing is downloaded.
#   ./launch/bench.sh evaluation [MODEL] [--examples N] [--rounds R] [--batch-size B] [--processes P] [--deepspeed zero3]
# Where there is no .venv, these two take the interpreter that is there (PYTHON, or python3) if that has what is needed.
#
# LoRA by cola_ds beside LoRA by PEFT, Hugging Face's Trainer and DeepSpeed: rung by rung, each adding one thing, and where the time
# of a step goes at the top. On two cores three rungs of short rows take ten minutes
# with --steps 8, five of mixed ones forty, and the whole ladder hours.
#   ./launch/bench.sh ladder [MODEL] [--processes N] [--workload short|mixed|long] [--rungs NAME ...] [--repeats R] [--steps S]
# Two processes and short rows unless said otherwise. MODEL is a folder; without it, SmolLM2-135M. The rows are made there.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = gpu ] || [ "${1:-}" = evaluation ]; then
  bench=$1
  shift
  python=${PYTHON:-python3}
  if [ -d .venv ] || ! "$python" -c 'import cola_ds, deepspeed, transformers' >/dev/null 2>&1; then
    ./launch/setup.sh quickstart
    python=.venv/bin/python
  fi
  exec "$python" -m "tests.bench.$bench" "$@"
fi
if [ "${1:-}" = ladder ]; then
  shift
  ./launch/setup.sh test # peft comes with it
  # shellcheck disable=SC1091
  source .venv/bin/activate
  model=build/SmolLM2-135M-Instruct
  if [ $# -gt 0 ] && [[ $1 != -* ]]; then
    model=$1
    shift
  else
    python launch/quickstart/model.py "$model"
  fi
  exec python -m tests.bench.ladder "$model" "$@"
fi
./launch/setup.sh quickstart
# shellcheck disable=SC1091
source .venv/bin/activate
python launch/quickstart/model.py build/SmolLM2-135M-Instruct
[ -f build/quickstart/dev.jsonl ] || python launch/quickstart/data.py build/quickstart 800 64
exec python -m tests.bench.knots launch/quickstart/run.yaml lora.rank=8 lora.alpha=16 'lora.targets=[q_proj, v_proj]' "$@"
