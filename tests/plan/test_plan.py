"""`cola-ds plan`: what it counts, against counts of other kinds, and what it refuses."""

import dataclasses
import json
import re

import pytest
import torch

from cola_ds.cli import main
from cola_ds.commands.plan import size_of
from cola_ds.config.loading import load_config
from cola_ds.lora.layers import inject, start_link
from cola_ds.lora.targets import find_targets
from cola_ds.plan.gathers import Sizes, gathers
from cola_ds.plan.memory import Layout, memory_of
from cola_ds.plan.micro_step import MicroStep, trace
from cola_ds.plan.recommend import smallest
from cola_ds.plan.run import Cluster, plan_run
from cola_ds.training.prepare import describe
from tests.support.toys import ARCHITECTURES, run_config, save_model, save_run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder that has a config and nothing else: what a plan needs."""
    whole = save_model(tmp_path_factory.mktemp("whole"))
    folder = tmp_path_factory.mktemp("config-alone")
    (folder / "config.json").write_bytes((whole / "config.json").read_bytes())
    return folder


@pytest.fixture
def run(model, tmp_path):
    """A run's YAML whose data is not here."""

    def write(**sections):
        config = run_config(model, tmp_path / "nowhere.jsonl", tmp_path / "run", **sections)
        return str(save_run(tmp_path / "run.yaml", {**config, "deepspeed": sections.get("deepspeed", "auto")}))

    return write


def skeleton_of(folder):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_what_is_kept_is_what_autograd_keeps(tmp_path, architecture):
    """Torch's own hooks on saved tensors say what a forward pass of the same model keeps, on the CPU, where it computes."""
    from transformers import AutoModelForCausalLM

    # With dropout in attention torch's operator keeps its probabilities on a CPU, and on a GPU, which is planned for, nothing.
    dropouts = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0) if architecture == "gpt2" else {}
    folder, (rows, width) = save_model(tmp_path, architecture, **dropouts), (2, 48)
    skeleton = skeleton_of(folder)
    targets = find_targets(skeleton, "all-linear")
    options = {"attention": "sdpa", "dtype": torch.float32, "device": "cpu"}
    step = trace(skeleton, targets, 4, (rows, width), **options)
    real = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").train()
    inject(real, targets, 0.0, train_bias=False)
    start_link(real, 1, 4, 4.0, 0, torch.device("cpu"))
    own = {p.untyped_storage().data_ptr() for p in (*real.parameters(), *real.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = real.base_model(input_ids=torch.randint(5, 100, (rows, width)), use_cache=False)[0]
    saved = sum(size for size, _ in kept.values()) + hidden.numel() * 4  # and what the loss keeps: its gradient
    assert step.kept == pytest.approx(saved, rel=0.12)
    assert step.peak > step.kept
    again = trace(skeleton, targets, 4, (rows, width), recomputes=True, **options)
    blocks = skeleton.config.num_hidden_layers
    assert blocks * hidden.numel() * 4 <= again.kept < step.kept / 2 and again.peak < step.peak


def test_counting_lets_nothing_live_for_ever(model):
    step = trace(skeleton_of(model), ["model.layers.0.mlp.up_proj"], 2, (1, 16), attention=None, dtype=torch.float32)
    assert step.peaks[-1] < step.kept < step.peak
    assert [begins for begins, _ in step.visits].count(True) >= [begins for begins, _ in step.visits].count(False)


A_B_C = MicroStep(
    visits=[(True, "a"), (False, "a"), (True, "b"), (False, "b"), (True, "c"), (False, "c"),
            (True, "c"), (False, "c"), (True, "b"), (False, "b"), (True, "a"), (False, "a")],
    peaks=[0] * 13,
)  # fmt: skip
WEIGHTS = {"a": [(1, 100)], "b": [(2, 200)], "c": [(3, 300), (4, 5)]}


@pytest.mark.parametrize(
    ("sizes", "peak", "moved"),
    [
        (Sizes(resident=10, prefetch=0, live=10**9, reuse=0), 300, 2 * 600),  # one at a time, and each anew
        (Sizes(resident=10, prefetch=0, live=10**9, reuse=10**9), 600, 600),  # all stay until their second use
        (Sizes(resident=10, prefetch=1, live=10**9, reuse=0), 600, 2 * 600),  # and the next one beside it
        (Sizes(resident=250, prefetch=0, live=10**9, reuse=0), 300, 2 * 300),  # a and b never leave
        (Sizes(resident=10, prefetch=1, live=100, reuse=0), 300, 2 * 600),  # no room for the next one
    ],
)
def test_gathers_follow_deepspeeds_rules(sizes, peak, moved):
    found = gathers(A_B_C, WEIGHTS, sizes, 1)
    assert (found.peak, found.moved) == (peak, moved)


def layout(**changed):
    """Of a run whose lines are small numbers."""
    facts = {
        "processes": 4, "per_node": 2, "stage": 3, "in_nodes": False, "offload_param": False, "offload_optimizer": False,
        "zero": {"stage3_param_persistence_threshold": 10, "reduce_bucket_size": 8}, "element_bytes": 2, "gradient_bytes": 2,
        "optimizer": "adamw", "full": False, "trained": 8, "targets": 500, "largest_target": 300, "gathered_tie": False,
        "remainder_bytes": 2, "tied": 8, "over_gloo": False, "weights": WEIGHTS,
    }  # fmt: skip
    return Layout(**{**facts, **changed})


def lines_of(evaluation=None, **changed):
    """What a process needs, by line, where it computes and on its host."""
    memory = memory_of(layout(**changed), A_B_C, evaluation)
    return {line.what: line.bytes for line in (*memory.device, *memory.host)}


def test_a_knot_and_an_evaluation_count_where_they_take_most():
    assert lines_of()["at a knot"] == 300 * 4 * 7
    assert lines_of(gathered_tie=True)["at a knot"] == 300 * (4 * 7 + 2)
    assert lines_of(largest_target=10**7)["at a knot"] == 2**22 * 4 * 7  # a piece at a time
    found = lines_of(evaluation=MicroStep(peaks=[10**6]))
    assert (found["an evaluation"], found["base weights, gathered"]) == (10**6, 2 * 300 * 2)
    assert "at a knot" not in found
    found = lines_of(evaluation=MicroStep(peaks=[10**6]), processes=1, per_node=1)
    assert found["an evaluation"] == 10**6 and "base weights, gathered" not in found


@pytest.mark.parametrize(
    ("dtype", "merge", "each"), [("bf16", "exact", 2), ("bf16", "plain", 4), ("fp16", "exact", 4), ("fp32", "exact", 0)]
)
def test_remainders_count_as_they_are_kept(run, dtype, merge, each):
    config = load_config(run(model={"dtype": dtype}, chain={"merge": merge}))
    found = plan_run(describe(config), CLUSTER)
    assert found.layout.remainder_bytes == each
    assert lines_of(remainder_bytes=each).get("remainders", 0) == each * 125
    assert lines_of(remainder_bytes=each, in_nodes=True).get("remainders", 0) == each * 250


@pytest.mark.parametrize(("dtype", "copies"), [("fp32", 0), ("bf16", 4 * 128 * 64)])
def test_a_start_at_the_gradient_counts_what_is_there_at_once(run, dtype, copies):
    """Two products of each layer, k being 20 and, of v_proj with its 16 rows, 16; what q_proj has for a moment in a micro batch
    of 2 rows of 64 tokens: what is added to its product; in bf16 its inputs and their gradients in fp32."""
    found = plan_run(describe(load_config(run(model={"dtype": dtype}, lora={"rank": 2, "init": "gradient"}))), CLUSTER)
    assert found.layout.start_bytes == 2 * 4 * (20 * (32 + 32) + 16 * (32 + 16)) + 4 * 20 * (128 + 32) + copies
    found = plan_run(describe(load_config(run(lora={"rank": 2, "init": "pissa"}))), CLUSTER)
    assert found.layout.start_bytes == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_output_head_that_starts_at_the_gradient_has_its_logits(run, tmp_path, dtype):
    """Of 2 rows of 64 tokens, three times in fp32: log-softmax, its gradient and that of the logits."""
    model = save_model(tmp_path / "untied", tie_word_embeddings=False)
    vocabulary = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]

    def start_bytes(targets):
        lora = {"rank": 2, "init": "gradient", "targets": targets}
        return plan_run(
            describe(load_config(run(model={"path": str(model), "dtype": dtype}, lora=lora))), CLUSTER
        ).layout.start_bytes

    without, head, moment = start_bytes(["q_proj"]), 4 * 20 * (32 + vocabulary), vocabulary - 32
    copied = 4 * 128 * moment if dtype == "bf16" else 0
    assert start_bytes(["q_proj", "lm_head"]) - without == head + 4 * 20 * moment + copied + 128 * vocabulary * 12


CLUSTER = Cluster(
    nodes=2, per_node=2, device="H100", memory=2**36, host_memory=2**37, network=1e9, node_network=1e9, disk=1e9
)  # fmt: skip


def test_what_shares_a_node_shares_its_host():
    assert CLUSTER.memory_of_a_process() == (2**36, 2**36)


def words_of(path, *more):
    return ["plan", path, "--gpus", "2", *more]


def test_a_plan_names_every_share_and_what_is_assumed(run, capsys):
    assert main(words_of(run(), "--nodes", "2", "--device", "H100", "model.shards=node", "deepspeed=zero3")) == 0
    said = capsys.readouterr().out
    lines = [
        float(found)
        for found in re.findall(r"^ +([\d.]+) MiB  (?!in all)", said.partition("on the host")[0], re.MULTILINE)
    ]
    total = float(re.search(r"([\d.]+) MiB  in all", said)[1])
    assert sum(lines) == pytest.approx(total, abs=0.1 * len(lines))
    on_host = re.findall(r"^ +([\d,.]+) MiB  ", said.partition("on the host")[2], re.MULTILINE)
    assert f"a node's host: {2 * sum(float(found.replace(',', '')) for found in on_host) / 1024:.1f} GiB" in said
    for word in (
        "shards      in each node",
        "base weights, in shards",
        "activations",
        "assumed",
        "H100",
        "tokens/s",
        "a knot",
    ):
        assert word in said


def test_no_base_weight_crosses_a_node_with_shards_of_its_own(run, capsys):
    across = {}
    for shards in ("node", "world"):
        assert main(words_of(run(), "--nodes", "2", f"model.shards={shards}", "deepspeed=zero3")) == 0
        across[shards] = int(
            re.search(r"a step .*, ([\d,]+) between nodes", capsys.readouterr().out)[1].replace(",", "")
        )
    assert 0 < across["node"] < across["world"] / 10


def test_what_does_not_fit_is_refused_with_what_would(run, capsys):
    path = run(data={"max_length": 64}, optim={"micro_batch_size": 2, "global_batch_size": 8})
    plan = words_of(path, "--device", "H100", "deepspeed=zero3")
    assert main([*plan, "--memory", "1GiB"]) == 0
    needed = float(re.search(r"([\d.]+) MiB  in all", capsys.readouterr().out)[1])
    assert main([*plan, "--memory", f"{needed / 0.9 * 1.01:.3f}MiB"]) == 0  # the edge: 90% may be filled
    capsys.readouterr()
    assert main([*plan, "--memory", f"{needed / 0.9 * 0.99:.3f}MiB"]) == 2
    said = capsys.readouterr()
    assert f"{needed:.1f} MiB  in all" in said.out
    assert re.fullmatch(r"cola-ds: this does not fit: .* a process, of .*; with (\S+=\S+ ?)+ it does: .*\n", said.err)
    overrides = re.search(r"; with (.*) it does", said.err)[1].split()
    assert main([*plan, "--memory", f"{needed / 0.9 * 0.99:.3f}MiB", *overrides]) == 0
    capsys.readouterr()
    assert main([*plan, "--memory", "1KiB"]) == 2
    assert "use devices with more memory" in capsys.readouterr().err


def test_what_is_too_small_is_named_at_the_edge(run, capsys):
    """Of a device 90% may be filled: what fits into it whole, and nothing else would do, still wants another device."""
    path = run(optim={"micro_batch_size": 1, "global_batch_size": 2}, deepspeed="zero3")
    cluster = dataclasses.replace(CLUSTER, nodes=1, host_memory=None)
    least = smallest(plan_run(describe(load_config(path)), cluster))
    plan = words_of(path, "--device", "H100", *least.overrides)
    assert main([*plan, "--memory", f"{least.plan.total_device / 0.95:.0f}B"]) == 2
    assert "use devices with more memory" in capsys.readouterr().err


def test_checkpointing_saves_memory_and_costs_time(run, capsys):
    held, seconds = [], []
    for recomputes in ("false", "true"):
        words = words_of(run(data={"max_length": 64}), "--device", "H100", "deepspeed=zero2")
        assert main([*words, f"model.activation_checkpointing={recomputes}"]) == 0
        said = capsys.readouterr().out
        held.append(float(re.search(r"([\d.]+) MiB  in all", said)[1]))
        seconds.append(float(re.search(r"([\d.e-]+) s computing", said)[1]))
    assert held[1] < held[0]
    assert seconds[1] == pytest.approx(1.5 * seconds[0], rel=0.02)  # the forward pass once more


def test_a_knot_sends_what_is_trained_and_a_gathered_one_the_targets(run):
    """Twice where nodes have shards of their own: they compare checksums first. A gathered weight comes, and goes back."""
    found = {}
    for way, sections in {
        "world": {}, "node": {"model": {"shards": "node"}}, "gathered": {"chain": {"tie": "gathered"}},
    }.items():  # fmt: skip
        words = {"model": {"shards": "world"}, "deepspeed": "zero3", **sections}
        found[way] = plan_run(describe(load_config(run(**words))), CLUSTER)
    trained, targets = 4 * found["world"].layout.trained, 4 * found["world"].layout.targets
    assert {way: plan.knot_bytes for way, plan in found.items()} == {
        "world": trained, "node": 2 * trained, "gathered": trained + 2 * targets,
    }  # fmt: skip


def test_a_host_may_be_too_small(run, capsys):
    assert main(words_of(run(model={"dtype": "bf16"}), "--host-memory", "1GiB")) == 2
    said = capsys.readouterr().err
    assert "of a node's host, which has 1.0 GiB" in said and "use nodes with more host memory" in said
    assert "chain.merge=plain" in said


def test_one_process_gathers_from_its_host(run, capsys):
    """Where weights are offloaded, each pass brings them to the device, though there is nobody else to gather from."""
    seconds = {}
    for engine in ("zero3", "zero3_offload_cpu"):
        path = run(model={"attention": "sdpa"})
        assert main(["plan", path, f"deepspeed={engine}", "--device", "H100"]) == 0
        said = capsys.readouterr().out
        seconds[engine] = re.search(r"([\d.e-]+) s from the host", said)
    assert seconds["zero3"] is None and float(seconds["zero3_offload_cpu"][1]) > 0


def test_evaluation_and_eager_attention_count(run, model, tmp_path, capsys):
    held = {"eval": str(tmp_path / "dev.jsonl"), "max_length": 64}
    small = {"micro_batch_size": 1, "global_batch_size": 2}

    def needed(**sections):
        assert main(words_of(run(data=held, optim=small, **sections), "deepspeed=zero2")) == 0
        said = capsys.readouterr().out
        return float(re.search(r"([\d.]+) MiB  in all", said)[1]), said

    as_it_is, _ = needed()
    many, said = needed(eval={"batch_size": 512})
    assert many > 2 * as_it_is and "an evaluation" in said
    eager, said = needed(model={"attention": "eager"})
    assert eager > as_it_is and "attention eager" in said


def test_links_that_cannot_begin_are_not_needed(run, capsys):
    """A link of 30 steps at least, of 100: four links, whatever chain.length says; the plan is theirs."""
    said = {}
    for length, knots in ((40, {"plateau": {"window": 10}}), (4, {"steps": [30, 60, 90]})):
        words = run(chain={"length": length, "knots": knots}, optim={"max_steps": 100}, model={"dtype": "bf16"})
        assert main(words_of(words)) == 0
        said[length] = capsys.readouterr().out.splitlines()
    assert "links       at most 4, which the loss ends" in said[40]
    assert [line for line in said[40] if not line.startswith("links")] == said[4]


def test_a_factor_that_is_not_trained_saves_work(run):
    def flops(**lora):
        config = load_config(run(lora={"targets": "all-linear", **lora}, optim={"max_steps": 6}))
        return plan_run(describe(config), CLUSTER).flops

    assert flops(train="B") == flops(train=["B", "B"]) < flops(train=["A", "both"]) == flops()
    assert flops(rank=[4, 8], train=["both", "B"]) > flops()


def test_a_checkpoint_is_as_large_as_the_largest(run, capsys):
    assert main(words_of(run(lora={"rank": [16, 1]}))) == 0
    first = int(re.search(r"checkpoint +([\d,]+) bytes", capsys.readouterr().out)[1].replace(",", ""))
    assert main(words_of(run(lora={"rank": 16}, chain={"length": 1}))) == 0
    alone = int(re.search(r"checkpoint +([\d,]+) bytes", capsys.readouterr().out)[1].replace(",", ""))
    assert first == alone


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.train=null", "data.task=nosuch"], "unknown task nosuch"),
        (["model.path=NEO", "model.attention=varlen"], "model.attention varlen is not for GPTNeoForCausalLM"),
        (["model.compile=true", "model.attention=sdpa", "deepspeed=zero2"], "model.compile needs text and"),
    ],
)
def test_what_train_refuses_has_no_plan(run, words, message, tmp_path, capsys):
    from transformers import AutoConfig

    AutoConfig.for_model(
        "gpt_neo", vocab_size=300, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global"], 2]],
        max_position_embeddings=64,
    ).save_pretrained(tmp_path / "neo")  # fmt: skip
    assert main(words_of(run(), *(word.replace("NEO", str(tmp_path / "neo")) for word in words))) == 2
    assert message in capsys.readouterr().err


def test_a_table_has_a_row_for_each_number_of_nodes(run, capsys):
    assert main(words_of(run(), "--table", "1,2")) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in capsys.readouterr().out.splitlines()]
    assert rows[2:] == [["1", "2", "2"], ["2", "4", "2"]]
    assert main(words_of(run(), "--table", "1,3")) == 0
    assert "no: optim.global_batch_size 8 does not divide" in capsys.readouterr().out.splitlines()[-1]
    assert main(words_of(run(), "--table", "1,2", "--memory", "1KiB")) == 2
    assert "it fits on none of these" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory", "80 apples"], "--memory '80 apples' must be a size like 80GiB"),
        (["--memory", "80"], "--memory '80' must be a size like 80GiB"),
        (["--network", "50Gb/s"], "--network '50Gb/s' must be a size like 50GB/s, in bytes a second"),
        (["--nodes", "0"], "--nodes '0' must be a whole number from 1"),
        (["--nodes=--"], "--nodes [] must be a whole number from 1"),
        (["--table", "1,x"], "--table '1,x' must be whole numbers from 1 to 9,999,999, such as 1,2,4"),
        (["--table", "1,2", "--nodes", "2"], "use one of them"),
        (["--device", "H1000"], "--device 'H1000' is not known; use cpu or one of V100"),
        (["optim.max_steps=1"], "chain.length 2 needs at least one step per link"),
        (["--nodes", "3"], "does not divide into micro batches of 2 on 6 processes"),
        (["method=zero-shot", "chain.length=1", "data.eval=dev.jsonl"], "trains nothing"),
        (["lora.targets=[nothing]"], "matches no layer"),
    ],
)
def test_wrong_calls_are_refused_in_one_line(run, capsys, words, message):
    assert main(words_of(run(), *words)) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 * 2**30), ("1.5TB", 1.5e12), ("64 GB", 64e9), ("123B", 123), ("0.5KiB", 512)]
)
def test_sizes(text, size):
    assert size_of(text, "--memory") == size


def test_nothing_is_written(run, tmp_path):
    path = run()
    before = sorted(tmp_path.rglob("*"))
    assert main(words_of(path)) == 0
    assert sorted(tmp_path.rglob("*")) == before
