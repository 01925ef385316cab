"""A chain with the switches of lora.init, lora.train, lora.scaling and optim.lr_ratio in plain torch, one process, whole
matrices: dense gradients, torch.linalg.svd, a base that a link's start is really taken out of. It shares with the pipeline the
draw of factors, the order of examples and the tokenizer."""

import math

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from cola_ds.lora.layers import draw_lora_A
from tests.support.reference import length, tokenized


def loss_of(model, batch):
    """Mean over the completions' tokens."""
    total, count = 0.0, 0
    for prompt, completion in batch:
        ids = torch.tensor([prompt + completion])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        total = total + F.cross_entropy(logits, torch.tensor(completion), reduction="sum")
        count += len(completion)
    return total / count


def svd(matrix):
    """U, S, V in fp64, V's largest entries positive."""
    U, S, Vh = torch.linalg.svd(matrix.detach().double(), full_matrices=False)
    signs = torch.stack([row[row.abs().argmax()].sign() for row in Vh])
    return U * signs, S, (Vh * signs[:, None]).T


def gradients(model, targets, batch):
    """The dense gradient of each target's weight."""
    weights = [module.weight.requires_grad_() for module in targets.values()]
    found = torch.autograd.grad(loss_of(model, batch), weights)
    model.requires_grad_(False)
    return dict(zip(targets, found, strict=True))


def start(name, module, link, r, scaling, init, train, earlier, gradient):
    """A, B, A0, B0 of a layer; zeros where a link starts at nothing."""
    rows, columns = module.weight.shape
    A, B = draw_lora_A(0, link, name, (r, columns), init == "kaiming"), torch.zeros(rows, r)
    if init == "orthogonal" and earlier:
        size, past = A.norm(), torch.cat(earlier).double()
        A = A.double() @ (torch.eye(columns, dtype=torch.float64) - torch.linalg.pinv(past) @ past)
        A = (A * (size / A.norm())).float()
    if init == "pissa":
        U, S, V = svd(module.weight)
        B, A = U[:, :r] * (S[:r] / scaling) ** 0.5, (V[:, :r] * (S[:r] / scaling) ** 0.5).T
    elif init == "gradient":
        U, S, V = svd(gradient)
        B, A = (rows**0.25 / 4 * part for part in (U[:, r : 2 * r], V[:, :r].T))
    elif train == "A":
        A, B = torch.zeros_like(A), draw_lora_A(0, link, f"{name}.lora_B", (rows, r), init == "kaiming")
    A, B = A.float().clone(), B.float().clone()
    elsewhere = init in ("pissa", "gradient")
    return A, B, *((A.clone(), B.clone()) if elsewhere else (torch.zeros_like(A), torch.zeros_like(B)))


@torch.no_grad()
def decay(learnt, rates, weight_decay):
    """Decoupled as AdamW's, but to where a link began, which is zero but where it starts at factors of its own."""
    for A, B, A0, B0, _ in learnt:
        for factor, began, rate in ((A, A0, rates[0]), (B, B0, rates[1])):
            if factor.requires_grad:
                factor -= rate * weight_decay * (factor - began)


def switched_chain(config, knots):
    """Train as a run's dict says. Returns the losses, the merged model, and each link's (A, B, A0, B0, scaling) by layer."""
    model = AutoModelForCausalLM.from_pretrained(config["model"]["path"], dtype=torch.float32)
    data = tokenized(config["data"]["train"], AutoTokenizer.from_pretrained(config["model"]["path"]))
    lora, optim, size = config["lora"], config["optim"], config["optim"]["global_batch_size"]
    init = lora.get("init", "gaussian")
    targets = {n: m for n, m in model.named_modules() if n.endswith(("q_proj", "v_proj"))}
    model.requires_grad_(False)

    def batch(step):
        epoch, i = divmod(step, math.ceil(len(data) / size))
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(epoch)).tolist()
        return sorted((data[k] for k in order[i * size : (i + 1) * size]), key=length)

    losses, links, begin = [], [], 0
    for link, knot in enumerate(knots, start=1):
        r, train = lora["rank"][link - 1], lora["train"][link - 1]
        scaling = lora["alpha"] / (r if lora.get("scaling") != "alpha/sqrt(r)" else r**0.5)
        grads = gradients(model, targets, batch(begin)) if init == "gradient" else {}
        learnt = {}
        for name, module in targets.items():
            earlier = [past[name][0] for past in links]
            A, B, A0, B0 = start(name, module, link, r, scaling, init, train, earlier, grads.get(name))
            learnt[name] = (A.requires_grad_(train != "B"), B.requires_grad_(train != "A"), A0, B0, scaling)
            module.weight -= scaling * B0 @ A0
            module.forward = lambda x, m=module, a=A, b=B, s=scaling: F.linear(x, m.weight + s * b @ a)
        groups = [
            {"params": [each[0] for each in learnt.values() if train != "B"], "lr": 0.0, "times": 1},
            {
                "params": [each[1] for each in learnt.values() if train != "A"],
                "lr": 0.0,
                "times": optim.get("lr_ratio", 1),
            },
        ]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
        for step in range(begin, knot):
            loss = loss_of(model, batch(step))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], optim["max_grad_norm"])
            rate = optim["lr"] * (1 - step / knots[-1])
            for group in optimizer.param_groups:
                group["lr"] = rate * group["times"]
            decay(learnt.values(), (rate, rate * optim.get("lr_ratio", 1)), optim.get("weight_decay", 0.0))
            optimizer.step()
            losses.append(loss.item())
        with torch.no_grad():
            for name, module in targets.items():
                module.weight += scaling * learnt[name][1] @ learnt[name][0]
                del module.forward
        links.append({name: (A.detach(), B.detach(), *rest) for name, (A, B, *rest) in learnt.items()})
        begin = knot
    return losses, model, links
