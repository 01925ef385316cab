"""Sweeps for tests, whose runs a stand-in for `cola-ds train` makes unless they say otherwise."""

import json
import sys

from tests.support.toys import REPOSITORY, run_config, save_run

STAND_IN = REPOSITORY / "tests/support/stand_in.py"
# On dev the second learning rate is the best; on test it is the worst.
SCORES = {
    "lora/lr=0.001": [0.6, 0.9],
    "lora/lr=0.0005": [0.7, 0.5],
    "lora/lr=0.0001": [0.7, 0.8],
    "zero-shot": [0.55, 0.5],
}


def save_base(place):
    """What all runs of the sweep have in common."""
    base = run_config(place / "model", place / "train.jsonl", place / "unused", chain={"length": 1})
    base["data"]["eval"] = "dev.jsonl"
    save_run(place / "base.yaml", {**base, "method": "lora"})


def tell(place, **told):
    (place / "told.json").write_text(json.dumps({"fail": {}, **told}), encoding="utf-8")


def write_sweep(place, **keys):
    sweep = {
        "base": str(place / "base.yaml"),
        "dir": str(place / "runs"),
        "tasks": {"easy": {"data.train": "easy.jsonl"}, "hard": {"data.train": "hard.jsonl", "optim.lr": 1e-3}},
        "methods": {"zero-shot": {}, "lora": None},
        "grid": {"optim.lr": [1e-3, 5e-4, 1e-4]},
        "seeds": [0, 1, 2],
        "launcher": f"{sys.executable} {STAND_IN} {place} {{run}}",
        **keys,
    }
    return save_run(place / "sweep.yaml", {key: value for key, value in sweep.items() if value is not None})
