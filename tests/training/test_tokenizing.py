"""Tokenizing for all processes of a run: once for each file system, by one process; errors of one are raised by all."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from cola_ds.config.schema import DataConfig, ModelConfig
from tests.data.test_tasks import make_tokenizer
from tests.support.distributed import process_group, run_distributed
from tests.support.toys import save_sums, thorough

MODEL = ModelConfig(path="unused")


@pytest.fixture
def path(tmp_path):
    return save_sums(tmp_path / "t.jsonl", 30)


def together(process, path, folder, options):
    """What a process finds, or is told, and who has tokenized (a file for each). `options`: apart (hosts and folders of their
    own for these ranks), bad (ranks that find a bad row), removes (the entry goes before it is opened), slow, cache, readonly."""
    from cola_ds.data import encode
    from cola_ds.errors import UserError
    from cola_ds.training import tokenizing

    folder = Path(folder)
    apart = process.rank if process.rank in options.get("apart", []) else 0
    os.environ["XDG_CACHE_HOME"] = str(folder / f"home-{apart}")
    tokenizing.socket.gethostname = lambda: f"host-{apart}"
    inner = encode.Encoder.encode

    def encoded(*words):
        open(folder / f"tokenized-{process.rank}", "w").close()
        time.sleep(options.get("slow", 0))
        if process.rank in options.get("bad", []):
            raise UserError(f"t.jsonl:3 is bad on {apart}")
        return inner(*words)

    encode.Encoder.encode = encoded
    if options.get("readonly"):

        def refuse(self, *words, **named):
            raise PermissionError(13, "Permission denied")

        Path.mkdir = Path.touch = refuse
    opened = tokenizing.open_found

    def open_found(*words):
        if options.get("removes"):
            for home in folder.glob("home-*"):
                shutil.rmtree(home)
        return opened(*words)

    tokenizing.open_found = open_found
    beats = [0]
    heartbeat = tokenizing.watchdog.heartbeat

    def counted(*words):
        beats[0] += 1
        heartbeat(*words)

    tokenizing.watchdog.heartbeat = counted
    process_group(process)
    config = DataConfig(train=str(path), **({"cache": options["cache"]} if "cache" in options else {}))
    try:
        found = tokenizing.tokenize_together(config, make_tokenizer(), MODEL, process)
    except UserError as error:
        return ["error", str(error), beats[0]]
    (tokens,) = found.splits["train"]
    return [tokens.content, str(tokens.place), tokens.found, len(found.warnings), beats[0]]


def run(path, folder, world_size, **options):
    results = run_distributed(together, world_size, str(path), str(folder), options, timeout_s=120)
    who = sorted(int(each.name.rpartition("-")[2]) for each in folder.glob("tokenized-*"))
    for each in folder.glob("tokenized-*"):
        each.unlink()
    left = [each.name for each in folder.rglob(".cola-ds-*")]
    assert left == []
    return results, who


@pytest.mark.parametrize("world_size", thorough([4], [2]))
def test_one_process_tokenizes(path, tmp_path, world_size):
    results, who = run(path, tmp_path, world_size)
    assert who == [0]
    assert len({tuple(each[:2]) for each in results}) == 1
    assert [each[2] for each in results] == [False] + [True] * (world_size - 1)
    again, who = run(path, tmp_path, world_size)
    assert who == []
    assert [each[:3] for each in again] == [[*results[0][:2], True]] * world_size


@pytest.mark.parametrize(("world_size", "apart", "leaders"), [(2, [1], [0, 1]), (4, [2, 3], [0, 2, 3])])
def test_one_of_each_file_system(path, tmp_path, world_size, apart, leaders):
    results, who = run(path, tmp_path, world_size, apart=apart)
    assert who == leaders
    assert len({each[0] for each in results}) == 1
    homes = [Path(each[1]).parents[1].name for each in results]
    assert homes == [f"home-{rank if rank in apart else 0}" for rank in range(world_size)]


def test_two_hosts_that_share_a_folder(path, tmp_path):
    """As by a network file system: they are told apart by their names, and yet one process does it."""
    _, who = run(path, tmp_path, 2, apart=[1], cache=str(tmp_path / "shared"))
    assert who == [0]


def test_without_a_cache_each_for_itself(path, tmp_path):
    results, who = run(path, tmp_path, 2, cache="none")
    assert who == [0, 1]
    assert [each[:2] for each in results] == [[results[0][0], "None"]] * 2


def test_a_folder_that_cannot_be_written(path, tmp_path):
    """Each holds its own; what is there already is read by all."""
    results, who = run(path, tmp_path, 2, readonly=True)
    assert who == [0, 1]
    assert [each[1:4] for each in results] == [["None", False, 1]] * 2
    results, who = run(path, tmp_path, 2)
    assert who == [0]
    again, who = run(path, tmp_path, 2, readonly=True)
    assert who == []
    assert [each[:4] for each in again] == [[*results[0][:2], True, 0]] * 2


def test_an_error_is_raised_by_all(path, tmp_path):
    results, who = run(path, tmp_path, 2, bad=[0, 1])
    assert who == [0]
    assert [each[:2] for each in results] == [["error", "data.train t.jsonl:3 is bad on 0"]] * 2


def test_an_error_of_another_file_system_names_it(path, tmp_path):
    results, _ = run(path, tmp_path, 2, apart=[1], bad=[1])
    assert [each[:2] for each in results] == [["error", "data.train t.jsonl:3 is bad on 1 (process 1 on host-1)"]] * 2


def test_an_entry_that_is_removed_before_it_is_opened(path, tmp_path):
    """Who does not find it makes it anew; nobody waits for the others. So do containers of one host name with a disk each."""
    results, who = run(path, tmp_path, 2, removes=True)
    assert who == [0, 1]
    assert results[0][:2] == results[1][:2]


def test_all_go_on_while_one_tokenizes(path, tmp_path):
    """A slow tokenization is no hang: each process beats as long as it lasts."""
    results, _ = run(path, tmp_path, 2, slow=2.5)
    assert all(each[-1] >= 4 for each in results)
    assert len({each[-1] for each in results}) == 1  # the watchdog compares them


def test_a_hang_limit_that_is_shorter_than_tokenizing(toy, tmp_path):
    from tests.support.jobs import run_job
    from tests.support.toys import run_config, save_run

    config = run_config(toy[0], toy[1], tmp_path / "run", run={"hang_after_s": 2}, data={"cache": str(tmp_path / "c")})
    config["optim"]["max_steps"] = 2
    save_run(tmp_path / "run.yaml", config)
    statuses, text = run_job(tmp_path / "logs", ["train", tmp_path / "run.yaml"], sabotage=slowly, arguments=(6.0,))
    assert statuses == [0, 0], text[-3000:]
    assert json.loads((tmp_path / "run/result.json").read_text())


def slowly(rank, seconds):
    from cola_ds.data import encode

    inner = encode.Encoder.encode

    def encoded(*words):
        time.sleep(seconds)
        return inner(*words)

    encode.Encoder.encode = encoded
