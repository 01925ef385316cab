"""What runs in every layer and at every label, on the device: varlen, LoRA's product, the fused loss; against plain formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cola_ds.data.batch import IGNORED
from tests.gpu.support import DTYPES, ON_CPU

# How far a result may lie from one in fp64 of the same inputs, as a part of its norm: a few roundings of 24, 8 and 11 bits.
OFF = {"fp32": 1e-5, "bf16": 1.5e-2, "fp16": 2e-3}
LENGTHS = (1, 7, 64, 33, 150, 2, 63)  # two rows of 160


def device():
    from cola_ds.distributed import accelerator

    return accelerator.device()


def drawn(*shape, dtype, scale=1.0, seed=0):
    """Numbers of the dtype, on the device, that want a gradient; the same at every call with this shape and seed."""
    values = scale * torch.randn(*shape, generator=torch.Generator().manual_seed(1000 * seed + sum(shape)))
    return values.to(device(), DTYPES[dtype]).requires_grad_()


def in_fp64(*tensors):
    """The same values in fp64 on the CPU."""
    return [tensor.detach().cpu().double().requires_grad_() for tensor in tensors]


def is_near(found, expected, dtype):
    off = float((found.detach().cpu().double() - expected.detach()).norm() / expected.detach().norm())
    assert off < OFF[dtype], off


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("key_heads", [8, 4, 1])
def test_varlen_is_causal_attention_within_each_example(process, dtype, key_heads):
    from cola_ds.evaluation.attention import varlen_attention

    places = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32, device=device())
    inputs = [drawn(2, heads, 160, 64, dtype=dtype, seed=seed) for seed, heads in enumerate((8, key_heads, key_heads))]
    weights = drawn(2, 160, 8, 64, dtype=dtype).detach()

    def attend(query, key, value):
        return varlen_attention(
            nn.Identity(), query, key, value, None, scaling=0.2, cu_seq_lens_q=places, max_length_q=max(LENGTHS)
        )[0]

    found = attend(*inputs)
    assert found.shape == (2, 160, 8, 64)
    gradients = torch.autograd.grad((found * weights).sum(), inputs)

    plain = in_fp64(*inputs)
    query, key, value = (part.transpose(1, 2).flatten(0, 1) for part in plain)  # (T, heads, 64)
    key, value = (part.repeat_interleave(8 // key_heads, dim=1) for part in (key, value))
    parts = []
    for q, k, v in zip(*(part.split(LENGTHS) for part in (query, key, value)), strict=True):
        scores = 0.2 * torch.einsum("qhd,khd->hqk", q, k)
        scores = scores.masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), -torch.inf)
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v))
    expected = torch.cat(parts).view(2, 160, 8, 64)
    is_near(found, expected, dtype)
    for one, other in zip(
        gradients, torch.autograd.grad((expected * weights.cpu().double()).sum(), plain), strict=True
    ):
        is_near(one, other, dtype)

    # Another example changes not a bit of this one.
    changed = [part.detach().clone() for part in inputs]
    for part in changed:
        part[0, :, 8:72] = 3.0  # the third
    again, before = attend(*changed).flatten(0, 1), found.detach().flatten(0, 1)
    assert torch.equal(again[:8], before[:8])
    assert torch.equal(again[72:], before[72:])
    assert not torch.equal(again[8:72], before[8:72])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_contiguous", [True, False])
def test_loras_product_is_its_formula(process, dtype, is_contiguous):
    from cola_ds.lora.layers import LoRALinear

    base = nn.Linear(192, 320).to(device(), DTYPES[dtype])
    layer = LoRALinear(base, dropout=0.0, train_bias=True)
    layer.reset(torch.zeros(16, 192), 0.5, device())
    with torch.no_grad():
        layer.lora_A.copy_(drawn(16, 192, dtype=dtype, scale=0.1))
        layer.lora_B.copy_(drawn(320, 16, dtype=dtype, scale=0.5))
    x = drawn(3, 50, 192, dtype=dtype) if is_contiguous else drawn(50, 3, 192, dtype=dtype)
    weights = drawn(3, 50, 320, dtype=dtype).detach()
    inputs = (x, layer.lora_A, layer.lora_B, layer.bias)
    found = layer(x if is_contiguous else x.transpose(0, 1))
    gradients = torch.autograd.grad((found * weights).sum(), inputs)

    x, lora_A, lora_B, bias = plain = in_fp64(*inputs)
    (weight,) = in_fp64(layer.weight)
    x = x if is_contiguous else x.transpose(0, 1)
    expected = F.linear(x, weight, bias) + 0.5 * F.linear(F.linear(x, lora_A), lora_B)
    is_near(found, expected, dtype)
    for one, other in zip(
        gradients, torch.autograd.grad((expected * weights.cpu().double()).sum(), plain), strict=True
    ):
        assert one.dtype == DTYPES[dtype]
        is_near(one, other, dtype)


TOKENS, HIDDEN, VOCABULARY = (200, 16, 3_000) if ON_CPU else (8_192, 512, 32_000)
PIECE = 2**17 if ON_CPU else 2**26


def head_and_labels(tokens, dtype):
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False).to(device(), DTYPES[dtype]).requires_grad_(False)
    head.weight.copy_(drawn(VOCABULARY, HIDDEN, dtype=dtype, scale=HIDDEN**-0.5).detach())
    labels = torch.arange(tokens, device=device())[None] * 7 % VOCABULARY
    labels[:, ::5] = IGNORED
    return head, labels


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fused_loss_is_cross_entropy(process, monkeypatch, dtype):
    from cola_ds.evaluation import fused_loss

    monkeypatch.setattr(fused_loss, "_ELEMENTS_AT_ONCE", {"cpu": PIECE})
    head, labels = head_and_labels(TOKENS, dtype)
    hidden = drawn(1, TOKENS, HIDDEN, dtype=dtype)
    weights = torch.linspace(0.5, 1.5, TOKENS, device=device())[None]
    found = fused_loss._losses(head, hidden, labels).squeeze(-1)
    (gradient,) = torch.autograd.grad((found * weights).sum(), hidden)
    assert (found.dtype, gradient.dtype) == (torch.float32, DTYPES[dtype])
    ignored = labels == IGNORED
    assert not found[ignored].any()
    assert not gradient[ignored].any()

    plain = hidden.detach().float().requires_grad_()
    logits = F.linear(plain, head.weight.float())
    expected = F.cross_entropy(logits[0], labels[0], ignore_index=IGNORED, reduction="none")[None]
    (other,) = torch.autograd.grad((expected * weights).sum(), plain)
    # Logits lie within five of zero: bf16 and fp16 round them by up to 1/128 and 1/1024.
    torch.testing.assert_close(found, expected, rtol=0, atol={"fp32": 2e-5, "bf16": 2.5e-2, "fp16": 3e-3}[dtype])
    mean = float(found.detach().sum() / (~ignored).sum())
    assert mean == pytest.approx(
        float(expected.detach().sum() / (~ignored).sum()), abs={"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-4}[dtype]
    )
    is_near(gradient, other.cpu().double(), dtype)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made inside."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(each, torch.Tensor):
                self.found = max(self.found, each.numel())
        return made


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fused_loss_holds_few_logits(process, monkeypatch, dtype):
    from cola_ds.evaluation import fused_loss

    monkeypatch.setattr(fused_loss, "_ELEMENTS_AT_ONCE", {"cpu": PIECE})
    head, labels = head_and_labels(2 * TOKENS, dtype)
    peaks = []
    for tokens in (TOKENS, 2 * TOKENS):
        hidden = drawn(1, tokens, HIDDEN, dtype=dtype)
        if not ON_CPU:
            torch.cuda.reset_peak_memory_stats()
            peaks.append(-torch.cuda.memory_allocated())
        with Largest() as largest:
            losses = fused_loss._losses(head, hidden, labels[:, :tokens])
        losses.sum().backward()
        assert largest.found <= PIECE < TOKENS * VOCABULARY
        if not ON_CPU:
            peaks[-1] += torch.cuda.max_memory_allocated()
        del losses, hidden
    if not ON_CPU:
        # Two gradients of the hidden state and a sum in fp32; half the logits of the tokens that were added are 256 MB in bf16.
        assert peaks[1] - peaks[0] <= 16 * TOKENS * HIDDEN
