"""Whatever people's files, variables and locks hold: success, or a refusal of one short line, in bounded time and memory.

Examples are drawn by hypothesis, the same ones each time. COLA_DS_FUZZ=50 draws fifty times as many, and others:
`COLA_DS_FUZZ=50 python -m pytest tests/test_fuzz.py`.
"""

import copy
import json
import os
import re
import resource
import shutil
import signal
import struct

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from cola_ds.config.deepspeed_json import complete, read_engine_config
from cola_ds.config.loading import dump_config, load_config
from cola_ds.config.schema import ModelConfig
from cola_ds.config.steps import resolve
from cola_ds.data.tokenizer import load_tokenizer
from cola_ds.distributed import launcher
from cola_ds.errors import UserError
from cola_ds.run import lock
from cola_ds.run.fingerprint import model_fingerprint
from cola_ds.run.lock import RunLock
from cola_ds.run.model_files import weight_files
from cola_ds.training.prepare import _model_path, _skeleton_of
from tests.support.toys import save_model

TIMES = int(os.environ.get("COLA_DS_FUZZ", "1"))
LONGEST_S = 20


def fuzz(examples):
    return settings(
        max_examples=examples * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=None,  # `refused_or` has its own, which also ends what would never end
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(autouse=True)
def memory():
    """No example takes a gigabyte."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def refused_or(action, *arguments):
    """What it returns; None where it refuses, in one line."""

    def too_long(number, frame):
        raise AssertionError(f"more than {LONGEST_S} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, LONGEST_S)
    try:
        return action(*arguments)
    except UserError as error:
        said = str(error)
        assert 10 < len(said) <= 1000, said
        assert len(said.splitlines()) == 1, said
        assert not re.search(r"[\x00-\x1f\x7f-\x9f]", said), said  # what a terminal obeys
        assert len(error.args[0]) < 50_000  # nor is a long one made first
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# -- what they are made of ---------------------------------------------------------------------------------------------

ODD = st.sampled_from(
    [
        None, True, False, 0, -1, 1, 2, 3, 10**9, 2**31, 2**63, 10**30, -(10**30), 0.0, -0.5, 1e-320, 1e308, float("inf"),
        float("nan"), "", " ", "auto", "even", "null", "yes", "0", "1e5", "5e-4", "2021-02-31", "a" * 300, "x" * 100_000,
        "a/" * 2000, "..", "/", "/dev/zero", "/proc/self/mem", "~", "a\tb", "a\nb", "\x1b[31m", "\u2028", "\U0001f600", "ä",
        "{text}", "%s", "=", "<<", "=1+1", [], {}, [[]], [{}], {"": None}, {"a": {"b": {}}}, [8, 4], [1, 2, 3], ["q_proj"],
        {"steps": [1]}, {"epochs": [2]}, {"steps": [10**9]}, {"steps": []}, [None], list(range(2000)), ["x"] * 2000,
    ]
)  # fmt: skip
VALUES = st.recursive(
    ODD | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def mutated(draw, content, values=VALUES):
    """A nested dict in which some values are others, some keys are gone, and some are new."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        target = content
        while True:
            key = draw(st.sampled_from(sorted(target)))
            if not isinstance(target[key], dict) or not target[key] or draw(st.integers(0, 3)) == 0:
                break
            target = target[key]
        what = draw(st.integers(0, 9))
        if what == 0 and len(target) > 1:
            del target[key]
        elif what == 1:
            target[draw(st.sampled_from([key + "s", key[1:], "", "a" * 500, "\x00"]) | st.text(max_size=10))] = draw(
                values
            )
        else:
            target[key] = copy.deepcopy(draw(values))
    return content


@st.composite
def damaged(draw, content):
    """Bytes of which some are others, or gone, or twice."""
    for _ in range(draw(st.integers(1, 3))):
        at, length = draw(st.integers(0, len(content))), draw(st.integers(0, 40))
        put = draw(
            st.binary(max_size=8)
            | st.sampled_from([b"[" * 5000, b'{"":' * 5000, b"9" * 5000, b"\xff", b"\0", b"NaN", b"{"])
        )
        content = content[:at] + put + content[at + length :]
    return content


# -- the run's YAML ----------------------------------------------------------------------------------------------------

RUN = {
    "model": {"path": "m", "dtype": "fp32", "revision": "abc", "trust_remote_code": False},
    "method": "cola",
    "lora": {"rank": [8, 4], "alpha": 16, "dropout": 0.0, "targets": ["q_proj", "v_proj"], "bias": "none"},
    "chain": {"length": 2, "knots": {"steps": [10]}, "tie": "local", "merge": "exact"},
    "data": {"train": "t.jsonl", "eval": "d.jsonl", "prompt": "prompt", "completion": "completion", "max_length": 64},
    "optim": {
        "lr": 5e-4, "name": "adamw", "schedule": "linear", "schedule_over": "chain", "warmup_steps": 0, "weight_decay": 0.0,
        "max_grad_norm": 1.0, "epochs": 5, "max_steps": None, "global_batch_size": 8, "micro_batch_size": 4,
        "max_skips_in_a_row": 5,
    },
    "eval": {"every": "epoch", "patience": None, "batch_size": None},
    "checkpoint": {"every_steps": 200, "keep": 2, "best": True, "on_error": "continue"},
    "run": {"dir": "runs/x", "seed": 0, "log_every_steps": 10, "hang_after_s": 600},
    "deepspeed": "ds_configs/zero3.json",
}  # fmt: skip
WORDS = [
    "a", "lora", "optim:", "lr: 1", "x: ", "- ", "? ", ": ", "\n", "\n  ", "\n    ", "[", "]", "{", "}", ",", "&a ", "*a", "<<: ",
    "*b", "&b ", "!!int ", "!!float ", "!!bool ", "!!timestamp ", "!!binary ", "!!set ", "!!omap ", "!!pairs ", "!!str ",
    "!!null ", "!!python/name:os.system ", "!x ", "'", '"', "|\n", ">-\n", "#", "%YAML 9.9\n", "---\n", "...\n", "=", "~", "0x",
    "0b1", "0o7", "1:30:59", "2021-02-31", "2001-12-14t21:59:43.10-99:99", ".inf", ".nan", "-", "_", "1_000", "9" * 5000,
    "[" * 200, "\t", "\r\n", "\ufeff", "\0", "\x85", "\\", '"\\ud800"', '"\\0"', "\u2028", "\U0001f600", "@", "`",
]  # fmt: skip
BOMB = "a0: &a0 [x,x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1},*a{n - 1}]\n" for n in range(1, 60))


def load(path):
    """All that is derived from a config before a model is looked at; and a dumped config is the same one."""
    config = load_config(path)
    again = path.with_name("again.yaml")
    again.write_text(dump_config(config), encoding="utf-8")
    assert load_config(again) == config
    resolve(config, 100, 2)


@fuzz(250)
@given(mutated(RUN))
def test_a_run_of_odd_values(place, run):
    path = place / "run.yaml"
    path.write_text(yaml.safe_dump(run, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    refused_or(load, path)


@fuzz(250)
@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=5), max_size=30).map("".join))
@example(BOMB)
@example("[" * 100_000)
@example("x: " + "9" * 100_000)
@example("x: 1" + ":10" * 50_000)
@example("a: &a {<<: [*a, *a]}")
@example("".join(f"k{n}: {{}}\n" for n in range(10_000)))
def test_what_only_looks_like_yaml(place, text):
    path = place / "text.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    refused_or(load, path)


@fuzz(150)
@given(st.data())
def test_a_damaged_yaml(place, data):
    path = place / "damaged.yaml"
    path.write_bytes(data.draw(damaged(yaml.safe_dump(RUN, sort_keys=False).encode())))
    refused_or(load, path)


@fuzz(150)
@given(
    st.lists(
        st.sampled_from(["optim.", "lr", "=", ".", "lora", "run.seed", "x"]) | st.sampled_from(WORDS), max_size=12
    ).map("".join)
)
@example("a." * 5000 + "b=1")
@example("optim.lr=" + "[" * 5000)
def test_an_override(place, override):
    path = place / "plain.yaml"
    path.write_text(yaml.safe_dump(RUN), encoding="utf-8")
    refused_or(load_config, path, [override])


# -- the DeepSpeed JSON ------------------------------------------------------------------------------------------------

ENGINE = {
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
    "zero_allow_untested_optimizer": True, "steps_per_print": 10, "communication_data_type": "fp32",
    "fp16": {"enabled": False, "loss_scale": 0}, "bf16": {"enabled": "auto"}, "tensorboard": {"enabled": False},
    "zero_optimization": {
        "stage": 3, "overlap_comm": False, "reduce_bucket_size": "auto", "sub_group_size": 1e9, "zero_hpz_partition_size": 1,
        "offload_param": {"device": "none", "pin_memory": True}, "offload_optimizer": {"device": "cpu"},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def engine_run(place):
    path = place / "engine-run.yaml"
    run = {**RUN, "chain": {"length": 2}, "deepspeed": str(place / "engine.json")}
    path.write_text(yaml.safe_dump(run), encoding="utf-8")
    return load_config(path)


def engine(config):
    complete(read_engine_config(config), config, resolve(config, 100, 2))


@fuzz(200)
@given(mutated(ENGINE))
def test_an_engine_of_odd_values(place, engine_run, content):
    (place / "engine.json").write_text(json.dumps(content), encoding="utf-8")
    refused_or(engine, engine_run)


@fuzz(150)
@given(st.data())
def test_a_damaged_engine_file(place, engine_run, data):
    (place / "engine.json").write_bytes(data.draw(damaged(json.dumps(ENGINE).encode())))
    refused_or(engine, engine_run)


# -- a model's folder --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy_model(place):
    return save_model(place / "toy", hidden_size=8, intermediate_size=8, num_hidden_layers=1)


def describe(folder):
    run = {**RUN, "model": {"path": str(folder), "dtype": "fp32"}}
    path = folder.parent / "model-run.yaml"
    path.write_text(yaml.safe_dump(run), encoding="utf-8")
    config = load_config(path)
    _model_path(config.model.path, weights=True)
    _skeleton_of(config.model)
    load_tokenizer(config.model)
    model_fingerprint(ModelConfig(path=str(folder)))
    for path in weight_files(folder):
        load_file(path)  # without a mistake, then


def changed(model, name, content):
    folder = model.with_name("changed")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, folder)
    (folder / name).write_bytes(content)
    return folder


@fuzz(40)
@given(st.data())
def test_a_models_config(toy_model, data):
    content = json.loads((toy_model / "config.json").read_bytes())
    refused_or(describe, changed(toy_model, "config.json", json.dumps(data.draw(mutated(content))).encode()))


@fuzz(40)
@given(st.data(), st.sampled_from(["config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"]))
def test_a_models_damaged_files(toy_model, data, name):
    refused_or(describe, changed(toy_model, name, data.draw(damaged((toy_model / name).read_bytes()))))


INDEX = {"metadata": {"total_size": 1}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}


@fuzz(40)
@given(mutated(INDEX) | VALUES)
@example([])
@example({})
@example({"weight_map": {"a": "../toy/model.safetensors"}})
def test_an_index_of_weights(toy_model, index):
    folder = changed(toy_model, "model.safetensors.index.json", json.dumps(index).encode())
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    refused_or(describe, folder)


@fuzz(60)
@given(st.data())
def test_the_header_of_weights(toy_model, data):
    content = (toy_model / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    if data.draw(st.booleans()):
        header = data.draw(damaged(json.dumps(header).encode()))
    else:
        header = json.dumps(data.draw(mutated(header))).encode()
    said = data.draw(st.just(len(header)) | st.sampled_from([0, 1, 2**31, 2**63]) | st.integers(0, 2**64 - 1))
    refused_or(
        describe, changed(toy_model, "model.safetensors", struct.pack("<Q", said) + header + content[8 + size :])
    )


# -- locks and launchers -----------------------------------------------------------------------------------------------

LOCK = {
    "host": "elsewhere", "pid": 17, "started": {"ticks": "1", "boot": "2", "pid_namespace": "3"}, "job": "12", "restarts": "0",
    "id": "abc",
}  # fmt: skip


@fuzz(150)
@given(st.data(), st.sampled_from([0, lock.STALE_AFTER_S + 5]))
def test_a_lock(place, data, silent_s):
    folder = place / "locked"
    folder.mkdir(exist_ok=True)
    content = {**LOCK, "host": data.draw(st.sampled_from(["elsewhere", os.uname().nodename]))}
    text = json.dumps(data.draw(mutated(content) | VALUES)).encode()
    held = data.draw(st.just(text) | damaged(text))
    (folder / lock.NAME).write_bytes(held)
    then = (folder / lock.NAME).stat().st_mtime - silent_s
    os.utime(folder / lock.NAME, (then, then))
    mine = RunLock(folder)
    lock.holder(folder)
    if refused_or(lambda: mine.take() or True):
        mine.release()
    else:
        assert silent_s == 0 or not lock._parsed(held)  # a lock that has not been renewed never stands in the way


VARIABLES = [
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS",
    "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST",
    "SLURM_JOB_NODELIST",
]  # fmt: skip
SAID = st.sampled_from(
    ["", " ", "0", "1", "2", "-1", "+1", "1.0", "1e3", "99999", "9" * 5000, "x", "\n", "host", "n[1-", "n[]", "[", "a,b", "::1",
        "\udcff", "²"]
)  # fmt: skip


@fuzz(300)
@given(st.dictionaries(st.sampled_from(VARIABLES), SAID, max_size=12))
def test_a_launchers_variables(monkeypatch, variables):
    with monkeypatch.context() as environment:
        for name in VARIABLES:
            environment.setenv(name, "")  # what `identify` sets is undone
            environment.delenv(name)
        for name, value in variables.items():
            environment.setenv(name, value)
        environment.setattr(launcher, "_first_process_by_mpi", lambda rank: {"MASTER_ADDR": "a", "MASTER_PORT": "1"})
        process = refused_or(launcher.identify)
        assert process is None or 0 <= process.rank < process.world_size
