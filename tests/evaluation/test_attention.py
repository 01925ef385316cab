"""Attention: examples end to end in one row have the losses and gradients that they have alone; varlen where it can be had."""

import json

import pytest
import torch

from cola_ds.config.schema import ModelConfig
from cola_ds.data.batcher import Batcher
from cola_ds.data.candidates import join_candidates
from cola_ds.errors import UserError
from cola_ds.evaluation import attention
from cola_ds.evaluation.attention import VARLEN, choose_attention
from cola_ds.evaluation.loss import loss_sum
from tests.evaluation.test_scoring import EXAMPLES, lora_on, skeleton, trained
from tests.evaluation.test_separation import LENGTHS, Vocabulary
from tests.support.distributed import run_distributed
from tests.support.runs import run_once
from tests.support.toys import rows, run_config, save_model, save_run, save_sums


def loaded(folder, implementation):
    from transformers import AutoModelForCausalLM

    attention._register()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=implementation)
    return lora_on(model).eval()


def gradients(model, batches):
    loss = sum(loss_sum(model, batch) for batch in batches)
    found = torch.autograd.grad(loss, list(trained(model).values()))
    return loss.detach(), found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "opt"])
def test_joined_rows_have_the_losses_and_gradients_of_examples_alone(tmp_path, architecture, checkpointing):
    std = {"init_std" if architecture == "opt" else "initializer_range": 0.2}
    folder = save_model(tmp_path, architecture, **std)
    data = Vocabulary(LENGTHS)
    alone = gradients(loaded(folder, "eager"), [data.collate([index]) for index in range(len(data))])
    joined = Batcher(data, 0, 1, joined=True).step(0, 0, 24, 12).micro_batches
    assert [len(batch.input_ids) for batch in joined] == [1, 1]
    assert sum(batch.input_ids.numel() for batch in joined) == sum(LENGTHS)  # nothing is padding
    model = loaded(folder, VARLEN)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    found = gradients(model, joined)
    torch.testing.assert_close(found[0], alone[0], rtol=1e-5, atol=1e-5)
    largest = max(float(value.abs().max()) for value in alone[1])
    for one, other in zip(found[1], alone[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * largest)


def test_a_process_without_examples_has_a_joined_row_that_counts_nothing():
    data = Vocabulary([4, 6, 5])
    batch = Batcher(data, 3, 4, joined=True).step(0, 0, 4, 1).micro_batches[0]
    assert batch.counted() == 0 and batch.input_ids.shape == (1, 1) and batch.cu_seq_lens.tolist() == [0, 1]


def test_masks_of_candidates_and_of_generation_are_kept(tmp_path):
    from cola_ds.evaluation.candidates import candidate_scores

    folder = save_model(tmp_path, initializer_range=0.2)
    plain, varlen = loaded(folder, "sdpa"), loaded(folder, VARLEN)
    batch = join_candidates(EXAMPLES)
    torch.testing.assert_close(candidate_scores(varlen, batch), candidate_scores(plain, batch), rtol=1e-5, atol=1e-5)
    ids = torch.tensor([[0, 0, 7, 9, 200], [4, 5, 6, 7, 8]])
    words = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1] * 5]), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(varlen.generate(ids, **words), plain.generate(ids, **words))


SLIDING = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}


@pytest.mark.parametrize(
    ("kind", "options", "max_length", "why"),
    [
        ("llama", {}, 512, None),
        ("qwen2", SLIDING, 16, None),  # no text fills the window
        ("qwen2", SLIDING, 17, "sliding_attention"),
        ("gemma2", {"attn_logit_softcapping": 50.0, "sliding_window": 64}, 32, "interface|attn_logit_softcapping 50.0"),
        ("llama", {"attention_dropout": 0.1}, 512, "attention_dropout 0.1"),
        ("gpt2", {}, 512, "attn_pdrop 0.1"),
        ("gpt_bigcode", {"attn_pdrop": 0.2}, 512, "attn_pdrop 0.2"),
        ("mamba", {}, 512, "interface|linear_attention|position_ids"),
        ("bloom", {}, 512, "interface|position_ids"),
    ],
)
def test_varlen_is_chosen_where_it_can_be_had(kind, options, max_length, why):
    model = skeleton(kind, **options)
    auto, asked = ModelConfig(path="x", attention="auto"), ModelConfig(path="x", attention="varlen")
    if why is None:
        assert choose_attention(auto, model, max_length, is_text=True) == VARLEN
        assert choose_attention(asked, model, max_length, is_text=True) == VARLEN
    else:
        assert choose_attention(auto, model, max_length, is_text=True) is None
        with pytest.raises(UserError, match=f"model.attention varlen is not for .*({why})"):
            choose_attention(asked, model, max_length, is_text=True)
    assert choose_attention(auto, model, max_length, is_text=False) is None


@pytest.mark.parametrize(
    ("dtype", "head", "has_it"), [("bf16", 64, True), ("fp16", 128, True), ("fp32", 64, False), ("bf16", 260, False)]
)
def test_on_cuda_varlen_is_for_16_bits_and_heads_that_fit(monkeypatch, dtype, head, has_it):
    monkeypatch.setattr(attention.accelerator, "kind", lambda: "cuda")
    model = skeleton("llama", hidden_size=4 * head, num_attention_heads=4, num_key_value_heads=2)
    config = ModelConfig(path="x", dtype=dtype)
    assert choose_attention(config, model, 512, is_text=True) == (VARLEN if has_it else None)
    monkeypatch.setattr(attention.accelerator, "kind", lambda: "xpu")
    assert choose_attention(config, model, 512, is_text=True) is None


def test_dropout_that_nobody_knew_of_is_no_varlen():
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(RuntimeError, match="varlen has no dropout"):
        attention.varlen_attention(None, q, q, q, None, cu_seq_lens_q=torch.tensor([0, 4]), dropout=0.1)


def test_old_devices_have_no_varlen(monkeypatch):
    monkeypatch.setattr(attention.accelerator, "kind", lambda: "cuda")
    asked = ModelConfig(path="x", dtype="fp16", attention="varlen")
    for has, refused in (((7, 5), True), ((8, 0), False), ((9, 0), False)):
        monkeypatch.setattr(attention.accelerator, "capability", lambda has=has: has)
        if refused:
            with pytest.raises(UserError, match=r"needs compute capability 8.0, and the device has 7.5; use auto"):
                choose_attention(asked, skeleton("llama"), 64, is_text=True)
        else:
            assert choose_attention(asked, skeleton("llama"), 64, is_text=True) == VARLEN


def test_flex_is_refused_where_it_cannot_train(monkeypatch):
    flex = ModelConfig(path="x", attention="flex")
    with pytest.raises(UserError, match=r"flex is not for .* no gradients on the CPU; use auto"):
        choose_attention(flex, skeleton("llama"), 64, is_text=True)
    monkeypatch.setattr(attention.accelerator, "kind", lambda: "cuda")
    with pytest.raises(UserError, match=r"flex is not for .*: it has attention_dropout 0.1; use auto"):
        choose_attention(flex, skeleton("llama", attention_dropout=0.1), 64, is_text=False)
    assert choose_attention(flex, skeleton("llama"), 64, is_text=True) == "flex_attention"


@pytest.mark.parametrize("length", [257, 320, 519])
@pytest.mark.parametrize("heads, key_heads", [(4, 4), (6, 2), (4, 1)])
def test_long_examples_have_the_gradients_of_short_steps(length, heads, key_heads):
    """In fp32 those of more than 256 positions go block by block: against torch's own attention in fp64."""
    torch.manual_seed(0)
    places = torch.tensor([0, 7, 7 + length])
    shapes = [(7 + length, heads, 16), *[(7 + length, key_heads, 16)] * 2]
    given = [torch.randn(shape, requires_grad=True) for shape in shapes]
    above = torch.randn(shapes[0])
    found = torch.autograd.grad(attention.each_alone(*given, places, 0.3), given, above)
    exact = [part.detach().double().requires_grad_() for part in given]
    outs = []
    for part in (slice(0, 7), slice(7, None)):
        q, k, v = (each[part].transpose(0, 1)[None] for each in exact)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    expected = torch.autograd.grad(torch.cat(outs), exact, above.double())
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("kind", "attention"), [("llama", "flash_attention_2"), ("gpt2", "flex")])
def test_what_transformers_cannot_have_is_refused_by_its_key(tmp_path, kind, attention):
    from cola_ds.config.loading import load_config
    from cola_ds.training.prepare import prepare

    config = run_config(
        save_model(tmp_path / "model", kind), save_sums(tmp_path / "train.jsonl", 9), tmp_path / "run",
        model={"attention": attention}, method="full", chain={"length": 1},
    )  # fmt: skip
    with pytest.raises(UserError) as raised:
        prepare(load_config(save_run(tmp_path / "run.yaml", config)), 1)
    said = str(raised.value)
    assert said.startswith(f"model.attention {attention} is not for ") and said.endswith("; use auto"), said
    assert "\n" not in said and len(said) < 300


def test_other_names_are_those_of_transformers():
    model = skeleton("llama")
    for name, expected in [("sdpa", "sdpa"), ("eager", "eager")]:
        for is_text in (True, False):
            assert choose_attention(ModelConfig(path="x", attention=name), model, 64, is_text) == expected


def all_of_the_row(query, key, value, places, scaling):
    """What varlen must not do."""
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = (part.transpose(0, 1)[None] for part in (query, key, value))
    found = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
    return found[0].transpose(0, 1)


def run_mixed(process, path):
    attention.each_alone = all_of_the_row
    return run_once(process, path)


def run_without_the_kernel(process, path):
    def fail(*args):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")

    attention.each_alone = fail
    return run_once(process, path)


def test_varlen_that_mixes_examples_is_given_up_or_refused(tmp_path):
    model, data = save_model(tmp_path / "model"), save_sums(tmp_path / "train.jsonl", 40)
    losses = {}
    for name, worker in (
        ("sdpa", run_once),
        ("auto", run_once),
        ("mixed", run_mixed),
        ("old", run_without_the_kernel),
        ("varlen", run_mixed),
    ):
        options = {"model": {"attention": "auto" if name in ("mixed", "old") else name}, "optim": {"max_steps": 6}}
        path = save_run(tmp_path / f"{name}.yaml", run_config(model, data, tmp_path / name, **options))
        if name == "varlen":
            with pytest.raises(Exception, match=r"see each other .attention varlen.; set model.attention=sdpa"):
                run_distributed(worker, 2, path)
            continue
        run_distributed(worker, 2, path)
        losses[name] = [row["loss"] for row in rows(tmp_path / name / "metrics.jsonl")]
    assert len(losses["sdpa"]) == 6
    assert losses["mixed"] == losses["old"] == losses["sdpa"] != losses["auto"]  # to the bit, and to rounding
    assert losses["auto"] == pytest.approx(losses["sdpa"], rel=1e-5)
    for name in losses:  # and the run's journal says what it ran with
        events = [event["event"] for event in rows(tmp_path / name / "events.jsonl")]
        chosen = json.loads((tmp_path / name / "environment.json").read_text(encoding="utf-8"))
        assert ("varlen given up" in events) == (name in ("mixed", "old"))
        assert (chosen["attention"], chosen["kernels"]) == ("varlen" if name == "auto" else "sdpa", "torch")
