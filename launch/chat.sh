#!/usr/bin/env bash
# Trains a real small chat model on conversations, packed, under DeepSpeed ZeRO-3: a chain of two links. Shows its answer to a
# question that it was not trained on, before and after. Installs on its first run only.
#   ./launch/chat.sh [N] [section.key=value ...]
# N processes, 1 or 2 (default: up to two of the GPUs it finds, or two on the CPU); overrides of launch/chat/run.yaml, e.g. optim.max_steps=80.
set -euo pipefail
cd "$(dirname "$0")/.."
./launch/setup.sh quickstart
# shellcheck disable=SC1091
source .venv/bin/activate
# shellcheck source=launch/common.sh
source launch/common.sh

model=build/SmolLM2-135M-Instruct
python launch/quickstart/model.py "$model"
[ -f build/chat/dev.jsonl ] || python launch/chat/data.py build/chat 600 32

if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  processes=$1
  shift
else
  processes=$(one_or_two)
fi
cola-ds data launch/chat/run.yaml "$@" --show 1
./launch/local.sh launch/chat/run.yaml "$processes" --fresh "$@"
rm -rf build/chat/model
cola-ds export runs/chat --to hf --out build/chat/model

question=$(cat build/chat/question.txt)
echo
echo "== asked:  $question"
echo "== before: $(python launch/chat/answer.py "$model" "$question")"
echo "== after:  $(python launch/chat/answer.py build/chat/model "$question")"
