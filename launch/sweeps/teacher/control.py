"""The students of a teacher once more, in plain torch: on its texts, as the pipeline trains them, and on its logits.

    python launch/sweeps/teacher/control.py TEACHER_DIR [--seeds 3] [--steps 1600] [--csv FILE]

TEACHER_DIR is what make.py made (--base is not for this). Nothing of cola_ds is used: what it prints for texts is a second
opinion on the residuals of table.py, and what it prints for logits says how much of them is the noise of tokens that are drawn.
The learning rate is the best of three for seed 0; its loss on the held-out texts decides, and makes the residual, for both.
"""

import argparse
import csv
import json
import statistics
from itertools import pairwise
from pathlib import Path

import torch
from make import add_update, changed, loss_on
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

ARMS = {"lora-1": (1, 1), "lora-4": (1, 4), "lora-16": (1, 16), "chain-16x1": (16, 1), "chain-4x4": (4, 4)}
"""Links, and the rank of each."""
RATES = (3e-3, 1e-2, 3e-2)
BATCH = 16


def ids_of(folder: Path, name: str, tokens: int) -> torch.Tensor:  # -> (rows, tokens)
    """The texts of a file, as ids."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    with open(folder / f"{name}.jsonl", encoding="utf-8") as lines:
        return torch.tensor([tokenizer(json.loads(line)["text"]).input_ids[:tokens] for line in lines])


def loss_of(student: LlamaForCausalLM, teacher: LlamaForCausalLM, ids: torch.Tensor, on: str) -> torch.Tensor:
    """Mean loss of the predicted tokens of ids (rows, tokens): of the texts, or of the teacher's distributions over them."""
    said = student(input_ids=ids).logits[:, :-1].flatten(0, 1)
    if on == "texts":
        return F.cross_entropy(said, ids[:, 1:].flatten())
    with torch.no_grad():
        wanted = teacher(input_ids=ids).logits[:, :-1].flatten(0, 1).softmax(-1)
    return F.cross_entropy(said, wanted)


def train_link(student: LlamaForCausalLM, rank: int, loss, batches: list[torch.Tensor], lr: float) -> None:
    """Train B A of that rank beside each layer, alpha 2 r, the learning rate falling to zero; then merge it."""
    factors = []
    for layer in changed(student):
        out, width = layer.weight.shape
        A = (torch.randn(rank, width) / (3 * width) ** 0.5).requires_grad_()
        B = torch.zeros(out, rank, requires_grad=True)
        layer.forward = lambda x, W=layer.weight, A=A, B=B: F.linear(x, W) + 2 * F.linear(F.linear(x, A), B)
        factors += [A, B]
    optimizer = torch.optim.AdamW(factors, lr=lr, weight_decay=0.0)
    for step, ids in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / len(batches))
        optimizer.zero_grad()
        loss(student, ids).backward()
        torch.nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
    for layer, A, B in zip(changed(student), factors[::2], factors[1::2], strict=True):
        del layer.forward
        layer.weight.data += 2 * (B @ A).detach()


def main() -> None:
    """Train all arms and print what they leave; see the top of this file."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="TEACHER_DIR")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    if min(args.seeds, args.steps) < 1:
        parser.error("--seeds and --steps must be 1 or more")
    if not (args.folder / "teacher.json").is_file():
        parser.error(f"{args.folder} has no teacher.json: name a folder that make.py made")
    facts = json.loads((args.folder / "teacher.json").read_text(encoding="utf-8"))
    if facts.get("base") is not None:
        parser.error(f"{args.folder} was made with --base {facts['base']}: this is for the small Llama alone")
    teacher = AutoModelForCausalLM.from_pretrained(args.folder / "base", dtype=torch.float32).requires_grad_(False)
    add_update(teacher, facts["rank"], facts["norm"], 100 + facts["seed"])
    train, dev = (ids_of(args.folder, name, facts["tokens"]) for name in ("train", "dev"))
    held_out = dev.tolist()

    def residual(on: str, arm: str, lr: float, seed: int) -> float:
        """What that arm leaves of the way from the base's held-out loss to the teacher's."""
        links, rank = ARMS[arm]
        student = AutoModelForCausalLM.from_pretrained(args.folder / "base", dtype=torch.float32).requires_grad_(False)
        torch.manual_seed(seed)
        batches = [
            ids
            for _ in range(-(-args.steps * BATCH // len(train)))
            for ids in train[torch.randperm(len(train))].split(BATCH)
        ]
        knots = [args.steps * number // links for number in range(links + 1)]
        for begin, end in pairwise(knots):
            train_link(student, rank, lambda model, ids: loss_of(model, teacher, ids, on), batches[begin:end], lr)
        left = loss_on(student, held_out) - facts["teacher_loss"]
        return left / (facts["base_loss"] - facts["teacher_loss"])

    rows = []
    print("| targets | method | chosen | residual | seeds |\n| --- | --- | --- | --- | --- |", flush=True)
    for on in ("texts", "logits"):
        for arm in ARMS:
            by_rate = {lr: residual(on, arm, lr, 0) for lr in RATES}
            best = min(by_rate, key=lambda lr: by_rate[lr])
            found = [by_rate[best], *(residual(on, arm, best, seed) for seed in range(1, args.seeds))]
            rows += [(on, arm, lr, 0, f"{value:.5f}") for lr, value in by_rate.items()]
            rows += [(on, arm, best, seed, f"{value:.5f}") for seed, value in enumerate(found) if seed]
            spread = f"{min(found):.3f} to {max(found):.3f}"
            print(
                f"| {on} | {arm} | lr={best:g} | {statistics.fmean(found):.3f} ({spread}) | {len(found)} |", flush=True
            )
    if args.csv:
        with open(args.csv, "w", newline="", encoding="utf-8") as out:
            writer = csv.writer(out)
            writer.writerow(["targets", "method", "lr", "seed", "residual"])
            writer.writerows(rows)


if __name__ == "__main__":
    main()
