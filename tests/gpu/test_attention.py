"""Varlen and packed rows on a GPU: losses and gradients of padded rows under Transformers' own attention, and of the CPU."""

import pytest
import torch

from cola_ds.config.loading import load_config
from cola_ds.data.batch import IGNORED
from cola_ds.data.order import Order
from tests.gpu.support import DTYPES, ON_CPU, run, three_links
from tests.gpu.test_chains import LOSS
from tests.support.toys import rows

# How far one token's loss may lie from the CPU's in fp32, and a gradient, as a part of its norm.
TOKEN_LOSS = {"bf16": 6e-2, "fp16": 1e-2}
GRADIENT = {"bf16": 6e-2, "fp16": 1e-2}
LENGTHS = (8, 5, 30, 2, 17, 61, 3, 20)


def has_varlen(dtype):
    """Whether model.attention auto is varlen: torch's own on CUDA lacks fp32."""
    return ON_CPU or dtype != "fp32"


@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_is_varlen_where_torch_has_it(process, toy, tmp_path, dtype):
    from cola_ds.errors import UserError
    from cola_ds.evaluation.attention import VARLEN
    from cola_ds.training.prepare import prepare

    path, _ = three_links(toy, tmp_path, "zero3", dtype)
    assert prepare(load_config(path), 1).attention == (VARLEN if has_varlen(dtype) else None)
    path, _ = three_links(toy, tmp_path, "zero3", dtype, model={"dtype": dtype, "attention": "varlen"})
    if has_varlen(dtype):
        assert prepare(load_config(path), 1).attention == VARLEN
    else:
        with pytest.raises(UserError, match="bf16 or fp16"):
            prepare(load_config(path), 1)


def adapted(toy, dtype, attention, device):
    """The toy with a link whose A and B are not zero, its values those of the dtype; computed in fp32 on the CPU."""
    from transformers import AutoModelForCausalLM

    from cola_ds.lora.layers import inject, lora_layers, start_link
    from cola_ds.lora.targets import find_targets

    model = AutoModelForCausalLM.from_pretrained(toy[0], dtype=DTYPES[dtype], attn_implementation=attention)
    inject(model, find_targets(model, "all-linear"), dropout=0.0, train_bias=False)
    start_link(model, 1, 8, 16, seed=0, device=torch.device("cpu"))
    for seed, layer in enumerate(lora_layers(model).values()):
        values = torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(seed))
        layer.lora_B.data.copy_(0.02 * values)
    return model.float() if device is None else model.to(device)


def losses_and_gradients(model, batch):
    """Each labelled token's loss, example after example, and the gradient of their sum in A and B."""
    from cola_ds.evaluation.fused_loss import token_losses

    losses = token_losses(model, batch)
    trained = [param for param in model.parameters() if param.requires_grad]
    gradients = torch.autograd.grad(losses.sum(), trained)
    return losses[batch.labels != IGNORED].detach().cpu(), [gradient.cpu().float() for gradient in gradients]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_joined_rows_are_padded_ones(process, toy, tmp_path, dtype):
    from cola_ds.data.collate import collate
    from cola_ds.data.packing import collate_packed
    from cola_ds.distributed import accelerator
    from cola_ds.training.prepare import prepare

    path, _ = three_links(toy, tmp_path, "zero2", dtype)
    varlen = prepare(load_config(path), 1).attention  # which registers it
    ids = [[3 + (7 * place + 31 * number) % 256 for place in range(length)] for number, length in enumerate(LENGTHS)]
    examples = [(each, [(len(each) // 3, len(each))]) for each in ids]
    expected, gradients = losses_and_gradients(adapted(toy, dtype, "sdpa", None), collate(examples))
    here = accelerator.device()
    found = {
        "padded": (adapted(toy, dtype, "sdpa", here), collate(examples)),
        "one row": (adapted(toy, dtype, varlen, here), collate_packed([examples])),
        "two rows": (adapted(toy, dtype, varlen, here), collate_packed([examples[:4], examples[4:]])),
        "two rows, padded": (adapted(toy, dtype, "sdpa", here), collate_packed([examples[:4], examples[4:]])),
    }
    for name, (model, batch) in found.items():
        losses, others = losses_and_gradients(model, batch.to(here))
        torch.testing.assert_close(
            losses, expected, rtol=0, atol=TOKEN_LOSS[dtype], msg=lambda text, of=name: of + text
        )
        assert abs(float((losses - expected).mean())) < LOSS[dtype], name
        for one, other in zip(others, gradients, strict=True):
            assert float((one - other).norm()) < GRADIENT[dtype] * float(other.norm()), name


@pytest.mark.parametrize(
    ("engine", "dtype"), [("zero3", "bf16"), ("zero2", "bf16"), ("zero3", "fp16"), ("zero3", "fp32")]
)
def test_joined_and_packed_rows_train_as_padded_ones(process, toy, tmp_path, monkeypatch, engine, dtype):
    """Every step trains all forty examples: padded in micro batches of eight, joined, or packed, as many rows as they fill."""
    if dtype == "fp16" and ON_CPU:
        pytest.skip("DeepSpeed's CPU accelerator lacks fp16")
    from cola_ds.evaluation import fused_loss

    def train(name, attention, packing, rows_a_step, rows_a_micro_batch):
        path, _ = three_links(
            toy, tmp_path / name, engine, dtype, model={"dtype": dtype, "attention": attention},
            data={"max_length": 32, "packing": packing}, chain={"length": 1}, lora={"rank": 8},
            optim={"global_batch_size": rows_a_step, "micro_batch_size": rows_a_micro_batch, "max_steps": 6},
        )  # fmt: skip
        with run(process, path, monkeypatch) as (chain, prepared):
            # No proof has failed on this device.
            assert chain.train.joined == (attention == "auto" and has_varlen(dtype))
            assert chain.engine.module in fused_loss._FUSED
        return prepared, [row["loss"] for row in rows(tmp_path / name / "run/metrics.jsonl")]

    prepared, expected = train("padded", "sdpa", "none", 40, 8)
    assert len(expected) == 6
    count = Order(prepared.train.lengths, capacity=32).count(0, 0)
    assert count < 20
    if has_varlen(dtype):
        _, found = train("joined", "auto", "none", 40, 8)
        assert found == pytest.approx(expected, abs=LOSS[dtype])
    prepared, found = train("packed", "auto", "best_fit", count, 1)
    assert len(prepared.order.rows(0, 0)) == count
    assert found == pytest.approx(expected, abs=LOSS[dtype])
