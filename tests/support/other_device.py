"""`python -m tests.support.other_device`: arithmetic of the package on a device beside the host, by torch's fake tensors.

They hold nothing, know where they are, and raise where two of them that are apart meet. For
tests/distributed/test_accelerator.py, in a process of its own: torch gets another device for good.
"""

import itertools
import os
from dataclasses import fields

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from cola_ds.config.dtypes import DTYPES
from cola_ds.data import batch as types
from cola_ds.data.batch import Batch, CandidateBatch, PackedBatch
from cola_ds.evaluation import fused_loss
from cola_ds.evaluation.loss import loss_sum
from cola_ds.lora import tie
from cola_ds.lora.layers import LoRALinear, inject, inner_product, lora_layers, start_link
from cola_ds.lora.remainders import Remainder

_setup_privateuseone_for_python_backend("abacus")
THERE, HERE = torch.device("abacus:0"), torch.device("cpu")


def check(found: torch.Tensor, where: torch.device) -> None:
    assert found.device == where, (found.device, where)


def ties() -> None:
    """The base weight is on the device, or on the host as parameters that are offloaded are; the remainder is on the host."""
    # How many there are depends on values, which this device has not: none.
    torch.Tensor.nonzero = lambda self: torch.zeros(0, 1, dtype=torch.long, device=self.device)
    for where in (HERE, THERE):
        layer = LoRALinear(nn.Linear(8, 6, bias=False, device=where, dtype=torch.bfloat16), 0.0, False)
        layer.reset(torch.randn(2, 8), 2.0, THERE)
        check(layer.lora_A, THERE)
        for exact in (True, False):
            weight = layer.weight.data.view(-1)
            kept = Remainder.of(weight, exact)
            check(kept.kept, HERE)
            for before, after in ((None, kept), (kept, kept), (kept, None), (None, None)):
                factors = (*layer.factors(), layer.scaling)
                check(tie._add_link(factors, layer.transposed, weight, 0, before, after, exact), THERE)
        check(layer.weight, where)
        check(inner_product(*[(layer.lora_A, layer.lora_B, 2.0)] * 2), THERE)


def losses() -> None:
    """Forward and backward pass over tokens, packed ones and candidates, in every dtype: plain, and with a fused loss and LoRA's
    own product."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = AutoConfig.for_model("llama", vocab_size=300, attn_implementation="eager", **sizes)

    def ids(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.long)

    batches = (
        Batch(ids(2, 9), ids(2, 9) + 1, ids(4), ids(2, 4)),
        PackedBatch(ids(1, 9), ids(1, 9), ids(4), ids(1, 4), torch.tensor([0, 5, 9], dtype=torch.int32), 5),
        CandidateBatch(
            input_ids=ids(2, 9),
            position_ids=ids(2, 9),
            branches=ids(2, 9),
            positions=ids(4),
            labels=ids(2, 4),
            counts=ids(2, 3),
            correct=ids(2),
        ),
    )
    for dtype, fused in itertools.product(DTYPES.values(), (False, True)):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype.torch_name))
        for module in model.modules():
            for name, param in module._parameters.items():
                module._parameters[name] = param if param is None else nn.Parameter(param.detach().to(THERE))
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer.to(THERE)
        inject(model, ["model.layers.0.self_attn.q_proj"], dropout=0.0 if fused else 0.1, train_bias=False)
        start_link(model, 1, 4, 8.0, 0, THERE)
        if fused:
            fused_loss._FUSED.add(model)
        for batch in batches:
            moved = batch.to(THERE)
            for field in fields(moved):
                if field.name != "longest":
                    check(getattr(moved, field.name), THERE)
            loss = loss_sum(model, moved)
            check(loss, THERE)
            if not isinstance(moved, PackedBatch):  # where its first example ends is read from the device
                check(moved.first().counted(), THERE)
            loss.backward()
            for layer in lora_layers(model).values():
                check(layer.lora_B.grad, THERE)


def apart() -> None:
    """That any of this can fail."""
    try:
        torch.zeros(2) + torch.zeros(2, device=THERE)
    except RuntimeError as error:
        assert "same device" in str(error)
    else:
        raise AssertionError("tensors that are apart have met")


def main() -> None:
    pinned = []
    types._move = lambda tensor, device: pinned.append(tensor) or tensor.to(device)
    with FakeTensorMode():
        apart()
        with torch.no_grad():
            ties()
        losses()
    print("all on their devices", flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)  # autograd's thread for a device made in Python cannot end: the interpreter would abort
