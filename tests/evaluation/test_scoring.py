"""Candidates in one row, the loss over their scores, and greedy answers: what transformers computes, one text at a time."""

import json
import math
import random
from types import SimpleNamespace

import pytest
import torch

from cola_ds.data.batch import IGNORED, Encoded
from cola_ds.data.candidates import join_candidates, joined_length
from cola_ds.errors import UserError
from cola_ds.lora.layers import inject, lora_layers, start_link
from cola_ds.lora.targets import find_targets
from tests.support.distributed import process_group, run_distributed
from tests.support.toys import ARCHITECTURES, REPOSITORY, save_model, thorough

NEW_TOKENS = 12
FIRST_TOKENS = 3
SIZES = (1, 4)  # of batches of prompts


def example(prompt, *answers, prompts=None):
    """An example from ids; `prompts` gives each candidate a prompt of its own."""
    prompts = prompts or [prompt] * len(answers)
    whole = [[*p, *a] for p, a in zip(prompts, answers, strict=True)]
    return Encoded(whole, [len(a) for a in answers], list(prompts[0]), "")


def make_examples():
    """Every shape: answers of one length and of several, that begin alike or are one, a lone candidate, a prompt of one id."""
    draw = random.Random(0)

    def ids(count):
        return [draw.randrange(3, 259) for _ in range(count)]

    return [
        example([1, *ids(9)], ids(1), ids(1)),
        example([1, *ids(20)], ids(3), ids(1), ids(7)),
        example([1, *ids(5)], [40, 41, 42], [40, 41, 43, 44], [40, 41]),
        example([1, *ids(30)], ids(4)),
        example([1], ids(2), ids(5)),
        example([1, *ids(6)], [50], [50]),
        example([], [60, 61], [62], prompts=[[1, 10, 11, 12], [1, 10, 13]]),  # merged across the end of the prompt
    ]


EXAMPLES = make_examples()
CORRECT = [0, 2, 1, 0, 1, 0, 1]
# What answers are generated for, with rows of unequal length; a multiple of no number of processes but 1.
PROMPTS = [example(e.prompt_ids, [3]) for e in EXAMPLES[:5]] + [
    example([1, *range(40, 40 + n)], [3]) for n in range(2, 14, 2)
]


def lora_on(model):
    """Adapters on q_proj and v_proj whose B is not zero; all weights are trained where there is no such layer."""
    model.requires_grad_(False)
    if model.config.model_type == "gpt2":
        return model.requires_grad_(True)
    inject(model, find_targets(model, ["q_proj", "v_proj"]), 0.0, train_bias=False)
    start_link(model, 1, 4, 8.0, 0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(std=0.2, generator=generator)
    return model


def plain_model(folder):
    from transformers import AutoModelForCausalLM

    return lora_on(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)).eval()


def plain_scores(model, example):
    """One forward pass a candidate, over all its ids. -> (candidates,)"""
    scores = []
    for ids, count in zip(example.candidate_ids, example.answer_lengths, strict=True):
        log_probs = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)  # (T, V)
        scores.append(torch.stack([log_probs[t - 1, ids[t]] for t in range(len(ids) - count, len(ids))]).mean())
    return torch.stack(scores)


def plain_loss(model, examples, correct):
    return sum(-plain_scores(model, e).log_softmax(0)[c] for e, c in zip(examples, correct, strict=True))


def plain_greedy(model, prompt, stop_ids=()):
    ids = list(prompt)
    while len(ids) < len(prompt) + NEW_TOKENS and (len(ids) == len(prompt) or ids[-1] not in stop_ids):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def trained(model):
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def name_newline(folder, newline):
    """Change the tokenizer of a folder, so that it is `newline` whose text holds one, between other letters."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    (other,) = (text for text, token in vocabulary.items() if token == newline)
    vocabulary[other] = vocabulary.pop("Ċ")  # how byte-level vocabularies write a newline
    vocabulary["aĊb"] = newline
    path.write_text(json.dumps(content), encoding="utf-8")


def choose_ends(greedy):
    """Two ids, each of which ends one answer early, while another answer goes on to the last id."""
    for newline in range(3, 259):
        for eos in range(3, 259):
            ends = [next((i for i, t in enumerate(ids) if t in (newline, eos)), None) for ids in greedy]
            if None in ends and len({ids[i] for ids, i in zip(greedy, ends, strict=True) if i}) == 2:
                return newline, eos
    raise AssertionError("no two ids do")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of each architecture. Weights are large, so that whatever a query should not see would change its logits."""
    folders = {}
    for name in ARCHITECTURES:
        options = {"init_std" if name == "opt" else "initializer_range": 0.2}
        options |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0) if name == "gpt2" else {}
        folders[name] = save_model(tmp_path_factory.mktemp(name), name, **options)
        greedy = [plain_greedy(plain_model(folders[name]), e.prompt_ids) for e in PROMPTS]
        newline, eos = choose_ends(greedy)
        name_newline(folders[name], newline)
        said = {
            "eos_token_id": [eos, 8] if name == "opt" else eos,
            "do_sample": True,
            "repetition_penalty": 9.0,
            "pad_token_id": 7,
        }
        (folders[name] / "generation_config.json").write_text(json.dumps(said), encoding="utf-8")
    return folders


# -- rows --------------------------------------------------------------------------------------------------------------


def test_a_row_holds_the_prompt_once():
    batch = join_candidates([example([1, 5, 6], [7, 8], [9], [7, 3, 4]), example([1], [2])], [2, 0])
    assert batch.input_ids.tolist() == [[1, 5, 6, 7, 6, 6, 7, 3], [0] * 7 + [1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 2, 3, 4], [0] * 8]
    assert batch.positions.tolist() == [2, 3, 4, 5, 6, 7]
    assert batch.labels.tolist() == [[7, 8, 9, 7, 3, 4], [IGNORED] * 5 + [2]]
    assert batch.segments[0].tolist() == [0, 0, 1, 2, 2, 2]
    assert batch.counts.tolist() == [[2, 1, 3], [1, 0, 0]]
    assert batch.correct.tolist() == [2, 0]
    assert batch.first().labels.tolist() == batch.labels[:1].tolist()
    assert batch.first().positions.tolist() == batch.positions.tolist()

    mask = batch.attention_mask(torch.float32)
    assert set(mask.unique().tolist()) == {0.0, torch.finfo(torch.float32).min}
    seen = [["".join("x" if value == 0 else "." for value in query) for query in row[0].tolist()] for row in mask]
    assert seen[0] == ["x.......", "xx......", "xxx.....", "xxxx....", "xx..x...", "xx...x..", "xx...xx.", "xx...xxx"]
    assert seen[1][-1] == ".......x"
    assert all(query[place] == "x" for query, place in zip(seen[1], range(8), strict=True))  # no softmax over nothing


def test_rows_align_where_answers_have_one_length():
    batch = join_candidates([example([1] * length, [7], [8]) for length in (3, 9, 4)])
    assert batch.positions.tolist() == [8, 9]  # of a row of 10: logits are computed at two positions only


def test_without_examples_a_batch_counts_nothing():
    batch = join_candidates([], [])
    assert batch.real.tolist() == [False]
    assert batch.correct.tolist() == [-1]
    assert (batch.labels == IGNORED).all()


# -- scores and loss in one process ------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_and_gradients_are_those_of_whole_texts(models, architecture):
    from cola_ds.data.candidates import check_joinable
    from cola_ds.evaluation.candidates import candidate_scores, classification_loss

    model = plain_model(models[architecture])
    check_joinable(model)
    expected = [plain_scores(model, e) for e in EXAMPLES]
    for size in (1, 2, 3, len(EXAMPLES)):  # with other mates, and other padding
        for start in range(0, len(EXAMPLES), size):
            found = candidate_scores(model, join_candidates(EXAMPLES[start : start + size]))
            for row, scores in zip(found, expected[start : start + size], strict=True):
                torch.testing.assert_close(row[: len(scores)], scores, rtol=1e-5, atol=1e-5)
                assert (row[len(scores) :] == -math.inf).all()

    loss = plain_loss(model, EXAMPLES, CORRECT)
    gradients = torch.autograd.grad(loss, list(trained(model).values()))
    joined = classification_loss(model, join_candidates(EXAMPLES, CORRECT))
    torch.testing.assert_close(joined, loss, rtol=1e-5, atol=1e-5)
    joined.backward()
    for (name, param), gradient in zip(trained(model).items(), gradients, strict=True):
        torch.testing.assert_close(param.grad, gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item(), msg=name)


class OlderModel(torch.nn.Module):
    """One that computes all logits, and is strict about its mask."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.dtype = inner, inner.dtype

    def forward(self, input_ids, position_ids, attention_mask, use_cache):
        assert attention_mask.dtype == self.dtype
        return self.inner(input_ids, attention_mask, position_ids, use_cache=use_cache)


def test_models_of_other_kinds_score_alike(models):
    from cola_ds.evaluation.candidates import candidate_scores

    model, batch = plain_model(models["llama"]), join_candidates(EXAMPLES)
    scores = candidate_scores(model, batch)
    torch.testing.assert_close(candidate_scores(OlderModel(model), batch), scores, rtol=1e-5, atol=1e-5)
    rounded = candidate_scores(OlderModel(model.bfloat16()), batch)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, scores, rtol=0.05, atol=0.1)


def test_a_batch_without_examples_has_no_loss_and_no_gradient(models):
    from cola_ds.evaluation.candidates import classification_loss

    model = plain_model(models["llama"])
    loss = classification_loss(model, join_candidates([], []))
    loss.backward()
    assert loss.item() == 0
    assert all((param.grad == 0).all() for param in trained(model).values())


def test_an_example_that_has_no_right_candidate_counts_nothing(models):
    from cola_ds.evaluation.candidates import classification_loss

    model = plain_model(models["llama"])
    both, first = (
        classification_loss(model, join_candidates(EXAMPLES[:2], right)).item() for right in ([0, 2], [0, -1])
    )
    assert first == pytest.approx(plain_loss(model, EXAMPLES[:1], [0]).item(), rel=1e-5)
    assert both > first


def test_the_shared_prompt_is_computed_once(models):
    from cola_ds.evaluation.candidates import candidate_scores

    model = plain_model(models["llama"])
    ids = []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: ids.append(inputs[0].numel()))
    three = EXAMPLES[1]  # 21 ids, and answers of 3, 1 and 7
    candidate_scores(model, join_candidates([three]))
    assert ids == [20 + 3 + 1 + 7] == [joined_length(three)]  # the branches begin with the prompt's last id
    assert ids[0] < sum(map(len, three.candidate_ids))
    assert [join_candidates([e]).input_ids.numel() for e in EXAMPLES] == [joined_length(e) for e in EXAMPLES]


# -- which models ------------------------------------------------------------------------------------------------------


def skeleton(kind, attention="sdpa", **options):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, num_hidden_layers=2, **options))
    model.config._attn_implementation = attention
    return model


def test_models_that_cannot_take_joined_rows_are_refused():
    from cola_ds.data.candidates import check_joinable

    sliding = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    for model, reason in [
        (
            skeleton("llama", "flash_attention_2"),
            "LlamaForCausalLM .* its attention is flash_attention_2, .* model.attention=auto",
        ),
        (skeleton("llama", "flex_attention"), "flex_attention"),
        (skeleton("qwen2", **sliding), "sliding_attention .a window of 16 ids"),
        (skeleton("mistral", sliding_window=16), "sliding_attention .a window of 16 ids"),
        (skeleton("bloom"), "BloomForCausalLM .* takes no position_ids"),
        (skeleton("falcon", alibi=True), "takes no position_ids"),
        (skeleton("mamba"), "layers with linear_attention"),
        (skeleton("rwkv"), "recurrent"),
    ]:
        with pytest.raises(UserError, match=reason):
            check_joinable(model)
    with pytest.raises(UserError, match="a window of 16 ids"):
        check_joinable(skeleton("mistral", sliding_window=16), max_length=17)


def test_a_window_that_no_text_fills_changes_nothing(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    from cola_ds.data.candidates import check_joinable
    from cola_ds.evaluation.candidates import candidate_scores

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("mistral", vocab_size=300, num_hidden_layers=2, sliding_window=35, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    check_joinable(model, max_length=35)
    scores = candidate_scores(model, join_candidates(EXAMPLES))
    for row, each in zip(scores, EXAMPLES, strict=True):
        torch.testing.assert_close(row[: len(each.candidate_ids)], plain_scores(model, each), rtol=1e-5, atol=1e-5)
    assert max(map(joined_length, EXAMPLES)) <= 35


# -- under ZeRO-3, at every number of processes ------------------------------------------------------------------------


def make_engine(folder):
    from cola_ds.config.schema import ModelConfig
    from cola_ds.distributed.engine import build_engine
    from cola_ds.distributed.loading import load_model

    config = json.loads((REPOSITORY / "tests/support/zero3_sharded.json").read_text(encoding="utf-8"))
    config |= {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
    model = lora_on(load_model(ModelConfig(path=str(folder), dtype="fp32"), config))
    return build_engine(model, config, lambda params: torch.optim.SGD(params, lr=0.0))


def gradient_here(engine, process, count):
    """The gradient of the loss of the first `count` examples, whole, and this process's loss."""
    from deepspeed.utils import safe_get_full_grad

    from cola_ds.evaluation.candidates import classification_loss

    engine.train()
    mine = slice(process.rank, count, process.world_size)
    loss = classification_loss(engine, join_candidates(EXAMPLES[:count][mine], CORRECT[:count][mine]))
    engine.backward(loss * process.world_size)
    gradient = {name: safe_get_full_grad(param).clone() for name, param in trained(engine.module).items()}
    engine.step()
    return gradient, loss.detach()


def answers_here(engine, tokenizer, batch_size):
    """Answers, the ids that they are made of, and what the watch was told."""
    from cola_ds.distributed import watchdog
    from cola_ds.evaluation import generation

    beats, beat, first, two_rounds = [], watchdog.heartbeat, generation.FIRST_TOKENS, generation.generate_over_shares
    found = []

    def spy(*args):
        found.append(two_rounds(*args))
        return found[-1]

    generation.FIRST_TOKENS, generation.generate_over_shares, watchdog.heartbeat = FIRST_TOKENS, spy, beats.append
    try:
        answers = generation.generate_answers(engine, PROMPTS, tokenizer, batch_size, lambda: False, NEW_TOKENS)
        return answers, found[0], beats
    finally:
        generation.FIRST_TOKENS, generation.generate_over_shares, watchdog.heartbeat = first, two_rounds, beat


def stopped_here(engine):
    """Ask to stop before the second batch. Returns the scores, and whether each batch was in training and had gradients."""
    from cola_ds.evaluation.candidates import score_candidates

    states = []

    def stop():
        states.append([engine.module.training, torch.is_grad_enabled()])
        return len(states) == 2

    return score_candidates(engine, EXAMPLES, 1, stop), states


def score_here(process, folders):
    from transformers import AutoTokenizer

    from cola_ds.evaluation import candidates, shares

    process_group(process)
    found = {}
    for name, folder in folders.items():
        engine = make_engine(folder)
        model, tokenizer = engine.module, AutoTokenizer.from_pretrained(folder)
        of = found[name] = {}
        said = model.generation_config.to_dict(), model.config.to_dict(), len(model._forward_pre_hooks)
        of["stopped"] = stopped_here(engine)
        of["scores"] = {size: candidates.score_candidates(engine, EXAMPLES, size, lambda: False) for size in (1, 3)}
        of["gradient"] = gradient_here(engine, process, len(EXAMPLES))
        of["answers"] = {size: answers_here(engine, tokenizer, size) for size in SIZES}
        of["training"] = engine.module.training
        of["as before"] = said == (
            model.generation_config.to_dict(),
            model.config.to_dict(),
            len(model._forward_pre_hooks),
        ) and "_previous_max_cache_length" not in vars(model)
        of["gradient of two"] = gradient_here(engine, process, 2)
        of["scores again"] = candidates.score_candidates(engine, EXAMPLES, 3, lambda: False)
        of["total"] = shares.total(1e9 + 1e-6 * i for i in of["scores again"])
    return found


@pytest.fixture(scope="module", params=thorough([1, 4], [2]))
def found(request, models):
    """What each process found, by architecture."""
    return run_distributed(score_here, request.param, {name: str(folder) for name, folder in models.items()})


def joined(shares, count):
    """The results of all processes in the order of the examples, each of which is one process's."""
    assert sorted(index for share in shares for index in share) == list(range(count))
    whole = {index: value for share in shares for index, value in share.items()}
    return [whole[index] for index in range(count)]


def test_every_example_is_scored_once_at_every_world_size(found, models):
    for name, folder in models.items():
        with torch.no_grad():
            expected = [plain_scores(plain_model(folder), e).tolist() for e in EXAMPLES]
        for scores in ([of[name]["scores"][1] for of in found], [of[name]["scores"][3] for of in found]):
            for row, wanted in zip(joined(scores, len(EXAMPLES)), expected, strict=True):
                assert row == pytest.approx(wanted, rel=1e-5, abs=1e-5)
        # Training and generation came between the two.
        assert [of[name]["scores again"] for of in found] == [of[name]["scores"][3] for of in found]
        assert [of[name]["stopped"] for of in found] == [(None, [[False, False]] * 2)] * len(found)
        for of in found:
            assert of[name]["total"] == pytest.approx(7e9 + 21e-6, abs=2e-6)


def test_gradients_are_right_at_every_world_size(found, models):
    for name, folder in models.items():
        model = plain_model(folder)
        for key, count in (("gradient", len(EXAMPLES)), ("gradient of two", 2)):  # at 4 processes two have no example
            loss = plain_loss(model, EXAMPLES[:count], CORRECT[:count])
            gradients = dict(zip(trained(model), torch.autograd.grad(loss, list(trained(model).values())), strict=True))
            assert sum(of[name][key][1].item() for of in found) == pytest.approx(loss.item(), rel=1e-5)
            for of in found:
                assert of[name][key][0].keys() == gradients.keys()
                for param, gradient in gradients.items():
                    torch.testing.assert_close(
                        of[name][key][0][param], gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item()
                    )


def test_answers_are_those_of_plain_greedy_generation(found, models):
    from transformers import AutoTokenizer

    from cola_ds.evaluation.generation import end_ids

    for name, folder in models.items():
        model, tokenizer = plain_model(folder), AutoTokenizer.from_pretrained(folder)
        (newline,) = (token for token in range(259) if "\n" in tokenizer.decode([token]))
        said = model.generation_config.eos_token_id
        eos = said if isinstance(said, list) else [said]
        assert end_ids(model, tokenizer) == sorted({2, *eos, newline})
        ids = [plain_greedy(model, e.prompt_ids, (2, *eos, newline)) for e in PROMPTS]
        assert {newline, eos[0]} < {answer[-1] for answer in ids}  # both end an answer, and one goes on to the limit
        texts = [tokenizer.decode(answer, skip_special_tokens=True).split("\n")[0].strip() for answer in ids]
        for size in SIZES:
            shares = [of[name]["answers"][size] for of in found]
            assert joined([answers for answers, _, _ in shares], len(PROMPTS)) == texts
            assert joined([answer_ids for _, answer_ids, _ in shares], len(PROMPTS)) == ids
            assert [beats for _, _, beats in shares] == [expected_beats(ids, size, len(found))] * len(found)


def expected_beats(ids, size, world_size):
    """Every process runs as many forward passes as the longest answer of each batch needs, and no more; but a process's few that
    go on after the first ids are left, and a second round has what all have left."""
    beats, left = [], []
    batches = batches_of(range(len(PROMPTS)), size, world_size)
    for batch in batches:
        passes = 0
        for mine in (batch[rank::world_size] for rank in range(world_size)):
            go_on = [i for i in mine if len(ids[i]) > FIRST_TOKENS]
            leaves = len(batches) > 1 and 2 * len(go_on) < len(mine)
            left += go_on if leaves else []
            passes = max([passes, *(min(len(ids[i]), FIRST_TOKENS if leaves else NEW_TOKENS) for i in mine)])
        beats += ["evaluation", *["generation"] * passes]
    for batch in batches_of(sorted(left), size, world_size):
        beats += ["evaluation", *["generation"] * (max(len(ids[i]) for i in batch) - FIRST_TOKENS)]
    return beats


def batches_of(places, size, world_size):
    """The longest first, and as many as have no more positions than `size` of them."""
    rest = sorted(places, key=lambda i: len(PROMPTS[i].prompt_ids), reverse=True)
    batches = []
    while rest:
        longest, here = (
            len(PROMPTS[i].prompt_ids) + NEW_TOKENS
            for i in (max(places, key=lambda i: len(PROMPTS[i].prompt_ids)), rest[0])
        )
        width = size * longest // here * world_size
        batches.append(rest[:width])
        rest = rest[width:]
    return batches


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_few_that_go_on_are_left(models, architecture):
    """Fewer than half of a batch: not the half of it, and not where nothing is said of leaving."""
    from cola_ds.evaluation.generation import generate_ids

    model = plain_model(models[architecture])
    engine = SimpleNamespace(module=model, world_size=1)
    prompts = [e.prompt_ids for e in PROMPTS[:5]]
    with torch.no_grad():
        whole = [plain_greedy(model, ids) for ids in prompts]
        for count in range(1, 6):
            stops = sorted({ids[0] for ids in whole[: 5 - count]} or {299})
            ended = [plain_greedy(model, ids, stops) for ids in prompts]
            going = sum(len(ids) > FIRST_TOKENS for ids in ended)
            left = [ids[:FIRST_TOKENS] if 2 * going < 5 else ids for ids in ended]
            assert generate_ids(engine, prompts, stops, NEW_TOKENS, FIRST_TOKENS) == left
            assert generate_ids(engine, prompts, stops, NEW_TOKENS) == ended
        assert generate_ids(engine, [], stops, NEW_TOKENS) == []
    assert not any("cache" in name for name in vars(model))  # the next batch's cache is as long as that batch


def test_generation_leaves_the_model_as_it_was(found):
    for of in found:
        for name in ARCHITECTURES:
            assert of[name]["as before"]
            assert of[name]["training"] is True


def test_a_prompt_without_room_for_an_answer_is_refused(models):
    from cola_ds.evaluation.generation import generate_answers

    engine = SimpleNamespace(module=plain_model(models["llama"]))
    with pytest.raises(
        UserError, match="a prompt of 100 ids and an answer of 50 are more than the model's 128 positions"
    ):
        generate_answers(engine, [example([1] * 100, [2])], None, 1, lambda: False)
