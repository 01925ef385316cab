"""Optimizers and learning rates. The schedule belongs to the chain: it is a function of its step counts alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cola_ds.config.schema import OptimConfig
from cola_ds.config.steps import StepPlan
from cola_ds.lora.layers import lora_layers


def optimizer_of(config: OptimConfig, model: nn.Module) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    """What makes the optimizer of a model's trained parameters, as an engine asks for it: B by itself where its rate is its
    own."""
    return lambda params: make_optimizer(config, params, [layer.lora_B for layer in lora_layers(model).values()])


def make_optimizer(
    config: OptimConfig, params: Iterable[nn.Parameter], lora_Bs: Iterable[Tensor] = ()
) -> torch.optim.Optimizer:
    """A fresh torch optimizer; weight decay is decoupled for AdamW and an L2 term for SGD and AdaGrad, as in torch.

    Where optim.lr_ratio is not 1, those of the parameters that are among `lora_Bs` are a group with a rate of their own.
    """
    kinds: dict[str, Any] = {
        "adamw": partial(torch.optim.AdamW, fused=True),  # on the host too, where masters are that are offloaded
        "sgd": torch.optim.SGD,
        "adagrad": torch.optim.Adagrad,
    }
    make = partial(kinds[config.name], lr=config.lr, weight_decay=config.weight_decay)
    if config.lr_ratio == 1:
        return make(params)
    params, fast = list(params), {id(param) for param in lora_Bs}
    groups = [
        {
            "params": [param for param in params if (id(param) in fast) == is_B],
            "lr_ratio": config.lr_ratio if is_B else 1.0,
        }
        for is_B in (False, True)
    ]
    return make([group for group in groups if group["params"]])


def learning_rate(config: OptimConfig, step_plan: StepPlan, link: int, step_in_link: int) -> float:
    """The learning rate of the step with 0-based index `step_in_link` of `link` (from 1).

    linear falls from lr to 0 (reached one step after the last), cosine likewise, constant stays. The horizon is the chain
    or the link, as `schedule_over` says; the warm-up of each link multiplies it by 1/w, 2/w ... 1.
    """
    if config.schedule_over == "chain":
        begun = step_plan.knots[link - 2] if link > 1 else 0
        progress = (begun + step_in_link) / step_plan.total_steps
    else:
        progress = step_in_link / step_plan.link_steps(link)
    factor = 1.0
    if config.schedule == "linear":
        factor = 1.0 - progress
    elif config.schedule == "cosine":
        factor = 0.5 * (1.0 + math.cos(math.pi * progress))
    warm_up = min(1.0, (step_in_link + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return config.lr * factor * warm_up
