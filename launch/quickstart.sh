#!/usr/bin/env bash
# Fine-tunes a real small Llama on the documentation of Python's standard library: zero-shot, LoRA of rank 192, and a chain of
# three links of rank 64, which makes an update of the same rank in less memory. The same steps and learning rate, under DeepSpeed
# ZeRO-3. Installs on its first run only.
#   ./launch/quickstart.sh [N] [section.key=value ...]
# N processes, 1 or 2 (default: up to two of the GPUs it finds, or two on the CPU); overrides of launch/quickstart/run.yaml, e.g. optim.max_steps=90.
set -euo pipefail
cd "$(dirname "$0")/.."
./launch/setup.sh quickstart
# shellcheck disable=SC1091
source .venv/bin/activate
# shellcheck source=launch/common.sh
source launch/common.sh

python launch/quickstart/model.py build/SmolLM2-135M-Instruct
[ -f build/quickstart/dev.jsonl ] || python launch/quickstart/data.py build/quickstart 800 64

# The batch of 8 divides over one or two processes of 4.
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  processes=$1
  shift
else
  processes=$(one_or_two)
fi
for method in zero-shot lora cola; do
  echo "== $method"
  rank=() length=() # the chain is as run.yaml has it
  if [ "$method" != cola ]; then
    rank=(lora.rank=192 lora.alpha=384) length=(chain.length=1) # the rank of its three links, at once
  fi
  ./launch/local.sh launch/quickstart/run.yaml "$processes" --fresh "${rank[@]}" "$@" \
    "method=$method" "${length[@]}" "run.dir=runs/quickstart/$method"
done

echo
cola-ds report runs/quickstart/{zero-shot,lora,cola} --plot runs/quickstart/loss.png
echo
echo "loss curves:             runs/quickstart/loss.png"
echo "export the merged model: cola-ds export runs/quickstart/cola --to hf --out build/quickstart-cola"
echo "(first: source .venv/bin/activate)"
