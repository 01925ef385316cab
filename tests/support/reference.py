"""Algorithm 1 of COLA (arXiv 2401.04151) in plain torch, one process: what the pipeline is measured against.

It shares with the pipeline only the draw of A, the order of examples and the tokenizer; forward, loss, update and merge are
written again, on whole batches and whole matrices.
"""

import json
import math

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from cola_ds.lora.layers import draw_lora_A


def tokenized(path, tokenizer):
    with open(path, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [
        (tokenizer(r["prompt"]).input_ids, [*tokenizer(r["completion"], add_special_tokens=False).input_ids, 2])
        for r in rows
    ]


def length(example):
    return sum(map(len, example))


def hand_over(before, optimizer, at_knot):
    """Give a new optimizer the state of the one before; if that is pruned, without the part whose second moment is smallest."""
    pairs = zip(before.param_groups[0]["params"], optimizer.param_groups[0]["params"], strict=True)
    for old, new in pairs:
        optimizer.state[new] = dict(before.state[old])
        if at_knot != "keep":
            state = optimizer.state[new]
            order = (state["exp_avg_sq"] if "exp_avg_sq" in state else state["sum"]).flatten().argsort()
            for moment in (value for value in state.values() if value.numel() > 1):
                moment.view(-1)[order[: round(at_knot["prune"] * len(order))]] = 0


def chain_of_lora(config, knots, chosen=None):
    """Train as a run's dict says. Returns the losses and the model, with every link merged into it.

    `chosen(lengths, step)` names a step's examples where their order is not that of an epoch: of packed rows.
    """
    model = AutoModelForCausalLM.from_pretrained(config["model"]["path"], dtype=torch.float32)
    data = tokenized(config["data"]["train"], AutoTokenizer.from_pretrained(config["model"]["path"]))
    optim, alpha, size = config["optim"], config["lora"]["alpha"], config["optim"]["global_batch_size"]
    ranks = config["lora"]["rank"]
    targets = {n: m for n, m in model.named_modules() if n.endswith(("q_proj", "v_proj"))}
    model.requires_grad_(False)
    losses, start, optimizer = [], 0, None
    at_knot, weights = config["chain"].get("optimizer_at_knot", "reset"), config["chain"].get("merge_weight", 1.0)
    for link, knot in enumerate(knots, start=1):
        r = ranks[link - 1] if isinstance(ranks, list) else ranks
        A = {n: draw_lora_A(0, link, n, (r, m.in_features)).requires_grad_() for n, m in targets.items()}
        B = {n: torch.zeros(m.out_features, r, requires_grad=True) for n, m in targets.items()}
        for name, module in targets.items():
            module.forward = lambda x, m=module, a=A[name], b=B[name], s=alpha / r: (
                F.linear(x, m.weight, m.bias) + s * F.linear(F.linear(x, a), b)
            )
        params = [*A.values(), *B.values()]
        kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}[optim["name"]]
        before, optimizer = optimizer, kind(params, lr=optim["lr"], weight_decay=0.0)
        if before is not None and at_knot != "reset":
            hand_over(before, optimizer, at_knot)
        for step in range(start, knot):
            epoch, i = divmod(step, math.ceil(len(data) / size))
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(epoch)).tolist()
            examples = chosen(list(map(length, data)), step) if chosen else order[i * size : (i + 1) * size]
            # In the order of their lengths: the sum is the same, and the last bit of it too.
            batch = sorted((data[k] for k in examples), key=length)
            width = max(len(p) + len(c) for p, c in batch)
            ids = torch.tensor([p + c + [0] * (width - len(p) - len(c)) for p, c in batch])
            labels = torch.tensor([[-100] * len(p) + c + [-100] * (width - len(p) - len(c)) for p, c in batch])
            mask = torch.tensor([[1] * (len(p) + len(c)) + [0] * (width - len(p) - len(c)) for p, c in batch])
            counted = (labels[:, 1:] != -100).any(0).nonzero().flatten()
            logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=counted, use_cache=False).logits
            labels = labels[:, 1:][:, counted]
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / (labels != -100).sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, optim["max_grad_norm"] or math.inf)
            for group in optimizer.param_groups:
                group["lr"] = optim["lr"] * (1 - step / knots[-1])
            optimizer.step()
            losses.append(loss.item())
        weight = weights[link - 1] if isinstance(weights, list) else weights
        with torch.no_grad():
            for name, module in targets.items():
                module.weight += weight * alpha / r * (B[name] @ A[name])
                del module.forward
        start = knot
    return losses, model
