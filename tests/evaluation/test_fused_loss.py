"""The fused loss: each token's cross-entropy and its gradients are those of whole logits, and never are there whole logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cola_ds.data.batch import IGNORED
from cola_ds.data.collate import collate
from cola_ds.evaluation import fused_loss
from cola_ds.lora.layers import inject
from tests.evaluation.test_scoring import make_engine, plain_model
from tests.support.distributed import process_group, run_distributed
from tests.support.toys import save_model

EXAMPLES = [([5, 9, 13, 200, 7, 31], [(2, 6)]), ([8, 8, 250], [(0, 3)]), ([3, 4, 5, 6, 7, 8, 9], [(3, 4), (6, 7)])]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    large = {"initializer_range": 0.2}
    return {
        "llama": save_model(tmp_path_factory.mktemp("llama"), **large),
        "tied": save_model(tmp_path_factory.mktemp("tied"), "llama-tied", **large),
        "opt": save_model(tmp_path_factory.mktemp("opt"), "opt", init_std=0.2),
        "gemma2": save_model(tmp_path_factory.mktemp("gemma2"), model_type="gemma2", head_dim=8, **large),
        "granite": save_model(tmp_path_factory.mktemp("granite"), model_type="granite", logits_scaling=8.0, **large),
        "cohere": save_model(tmp_path_factory.mktemp("cohere"), model_type="cohere", **large),
    }


@pytest.fixture
def few_at_once(monkeypatch):
    """Four tokens' logits at a time."""
    monkeypatch.setitem(fused_loss._ELEMENTS_AT_ONCE, "cpu", 4 * 300)


def found_by(model, batch, factors):
    """Each token's loss, and the gradients of a sum of them with factors."""
    model.zero_grad()
    losses = fused_loss.token_losses(model, batch)
    (losses * factors).sum().backward()
    grads = {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}
    return losses.detach(), grads


@pytest.mark.parametrize("trains", ["adapters", "adapters, one of the head", "all"])
@pytest.mark.parametrize("name", ["llama", "tied", "opt"])
def test_losses_and_gradients_are_those_of_whole_logits(folders, few_at_once, name, trains):
    model, batch = plain_model(str(folders[name])), collate(EXAMPLES)
    if trains == "all":
        model.requires_grad_(True)
    elif trains == "adapters, one of the head" and name != "tied":
        inject(model, ["lm_head"], 0.0, False)
        head = model.get_output_embeddings()
        head.reset(torch.randn(4, head.in_features), 0.5, torch.device("cpu"))
        head.lora_B.data.normal_()
    torch.manual_seed(0)
    factors = torch.rand(batch.labels.shape) + 0.5
    expected, whole = found_by(model, batch, factors)
    fused_loss._FUSED.add(model)
    losses, grads = found_by(model, batch, factors)
    assert (losses[batch.labels == IGNORED] == 0).all() and (batch.labels == IGNORED).any()
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert grads.keys() == whole.keys() and grads
    largest = max(float(value.abs().max()) for value in whole.values())
    for key, value in grads.items():
        torch.testing.assert_close(value, whole[key], rtol=1e-4, atol=1e-6 * largest, msg=key)


@pytest.mark.parametrize("trains", ["adapters", "all"])
def test_never_are_there_whole_logits(folders, few_at_once, monkeypatch, trains):
    model, batch = plain_model(str(folders["llama"])), collate(EXAMPLES)
    model.requires_grad_(trains == "all")
    model.model.embed_tokens.weight.requires_grad_(True)
    fused_loss._FUSED.add(model)
    sizes, linear = [], F.linear
    monkeypatch.setattr(
        F, "linear", lambda x, weight, bias=None: sizes.append((len(x), len(weight))) or linear(x, weight, bias)
    )
    fused_loss.token_losses(model, batch).sum().backward()
    rows = [count for count, width in sizes if width == 300]
    assert max(rows) == 4 and sum(rows) >= batch.labels.numel()
    # A frozen head's logits are computed once; another's again in the backward pass.
    assert sum(rows) == batch.labels.numel() * (2 if trains == "all" else 1)


def test_the_gradient_in_half_precision_keeps_what_is_small(monkeypatch):
    """A probability of one in a million is below what fp16 can hold; times the size of its weight it is not."""
    torch.manual_seed(0)
    head = nn.Linear(8, 3000, bias=False)
    hidden = torch.randn(5, 8)
    labels = torch.tensor([1, 7, IGNORED, 2999, 0])
    exact = hidden.clone().requires_grad_()
    F.cross_entropy(F.linear(exact, head.weight * 3), labels, reduction="sum").backward()
    half = hidden.half().requires_grad_()
    weight = (head.weight.detach() * 3).half()
    losses = fused_loss._FrozenHeadLoss.apply(half, weight, None, labels, 2)
    assert losses.dtype == torch.float32
    losses.sum().backward()
    assert half.grad.dtype == torch.float16
    torch.testing.assert_close(half.grad.float(), exact.grad, rtol=2e-2, atol=2e-3)


def allowed_here(process, folders):
    process_group(process)
    found = {}
    for name, folder in folders.items():
        engine = make_engine(str(folder))
        found[name] = (fused_loss.allow(engine), engine.module in fused_loss._FUSED)
        batch = collate(EXAMPLES)
        with torch.no_grad():
            losses = fused_loss.token_losses(engine, batch)
        plain = plain_model(str(folder))
        with torch.no_grad():
            torch.testing.assert_close(losses, fused_loss.token_losses(plain, batch), rtol=1e-4, atol=1e-5)
    return found


def test_what_is_more_than_the_heads_logits_is_not_fused(folders):
    """Gemma 2 has a softcap, Granite and Cohere scale: with small logits a softcap would change next to nothing."""
    first, second = run_distributed(allowed_here, 2, folders)
    assert first == second
    assert first == {name: (name in ("llama", "tied", "opt"),) * 2 for name in folders}


class Plain:
    """What of an engine the proof needs: DeepSpeed's own takes no fp16 on a CPU."""

    optimizer = None

    def __init__(self, module):
        self.module = module
        self.eval, self.train = module.eval, module.train

    def __call__(self, *args, **words):
        return self.module(*args, **words)


def allowed_in_fp16(process, folder):
    process_group(process)
    return fused_loss.allow(Plain(plain_model(str(folder)).half()))


def test_more_ids_than_fp16_counts_to_are_proved_too(tmp_path):
    """The largest number in fp16 is 65,504: a proof by counting would find infinities, and their differences are no numbers."""
    assert run_distributed(allowed_in_fp16, 1, save_model(tmp_path, vocab_size=70_000)) == [True]
