"""Process 37 of 512, at shapes of Llama-2-70B made smaller: what it holds and sends, beside the plan. At full size by hand:
tests/README.md."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.toys import REPOSITORY, thorough

STEPS = 3
"""The first two runs of a micro step leave DeepSpeed its trace."""
LIBRARIES = 80 * 2**20
"""What a run of next to nothing takes (tests/plan/test_measured.py measures it)."""


@pytest.fixture(scope="module", params=thorough(["node"], ["world"]))
def one(request, tmp_path_factory):
    """What one process said."""
    folder = tmp_path_factory.mktemp(request.param)
    words = ["--narrow", "8", "--layers", "4", "--steps", str(STEPS), "--shards", request.param, "--length", "256"]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.scale.one_of_many", str(folder), *words], env=env, cwd=REPOSITORY, timeout=300,
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return request.param, json.loads(ran.stdout.splitlines()[-1])


def moved(said, phase, group):
    return said["phases"][phase]["gathered"].get(str(group), 0)


def test_what_is_gathered_is_what_the_plan_says(one):
    shards, said = one
    assert said["nodes"] == (shards == "node")
    last = f"step {STEPS}"
    base, everywhere = moved(said, last, 8), moved(said, last, 512)
    if shards == "world":
        assert base == 0 and everywhere - said["trained"] == said["across"] - 2 * said["trained"]
        return
    assert base == said["inside"] and everywhere == said["trained"]
    # Between nodes a step gathers A and B, once, and no weight of the base; a knot their checksum's and the tie's.
    assert everywhere <= 1.1 * said["trained"]
    assert all(moved(said, phase, 8) == 0 for phase in ("checkpoint", "tie", "extend in place", "extend, rebuilt"))
    assert moved(said, "tie", 512) <= 2.2 * said["trained"]


def test_its_memory_is_the_plans(one):
    _, said = one
    plan, last = sum(said["plan"].values()), said["phases"][f"step {STEPS}"]
    assert last["most"] - LIBRARIES == pytest.approx(plan, rel=0.2)
    held = [said["phases"][phase]["held"] for phase in said["phases"]]
    assert held[-1] - held[2] <= said["plan"]["remainders"] + 2**23  # the knots leave nothing else behind
