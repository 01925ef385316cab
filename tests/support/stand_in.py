"""What `cola-ds train` leaves, in no time: `stand_in.py PLACE RUN.yaml [section.key=value ...]`.

PLACE/told.json says by parts of the names of runs below PLACE/runs which scores they have, which fail, and which waits for
a signal. A line in PLACE/starts for each.
"""

import json
import os
import pathlib
import re
import signal
import sys
import time

import yaml

# cola_ds.config would take longer to import than all of this.
yaml.SafeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from tests.support.recorded import recorded  # noqa: E402

place, base, *words = sys.argv[1:]
here = pathlib.Path(place)
config = yaml.safe_load(pathlib.Path(base).read_text(encoding="utf-8"))
for word in words:
    key, _, text = word.partition("=")
    *sections, last = key.split(".")
    target = config
    for section in sections:
        target = target.setdefault(section, {})
    target[last] = yaml.safe_load(text)
folder = pathlib.Path(config["run"]["dir"])
name = str(folder.relative_to(here / "runs"))
with open(here / "starts", "a") as out:
    print(name, {k: v for k, v in os.environ.items() if k in ("RANK", "MASTER_PORT")}, file=out)
told = json.loads((here / "told.json").read_text())
for part, status in told["fail"].items():
    if part in name:
        print("loading", "cola-ds: " + told.get("said", "no such layer"), "more", sep="\n", flush=True)
        if status < 0:
            os.kill(os.getpid(), -status)
        sys.exit(status)
if told.get("wait") and told["wait"] in name and not folder.exists():
    folder.mkdir(parents=True)
    (folder / "environment.json").write_text("{}")
    recorded(folder)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *args: sys.exit(1))  # as torchrun does
    time.sleep(60)
folder.mkdir(parents=True, exist_ok=True)
text = yaml.safe_dump(config)
if (folder / "result.json").exists() and (folder / "run.yaml").read_text() != text:
    print("cola-ds: the config has changed", file=sys.stderr)
    sys.exit(2)
(folder / "run.yaml").write_text(text)
(folder / "environment.json").write_text("{}")
dev, test = next((scores for part, scores in told["scores"].items() if part in name), [0.5, 0.5])
seed = config["run"]["seed"]
scores = {"metric": "accuracy", "dev": dev, "test": test + seed / 100, "best_step": 1}
print(" 50%|##   | 1/2", end="")
result = {
    "method": config["method"],
    "task": config["data"].get("task", name.split("/")[0]),
    "seed": seed,
    "scores": scores,
    "links": 1,
    "steps": 2,
    "training_flops": 1e9,
    "profiled_flops": 2e9,
    "wall_time_s": 1.0,
    "peak_memory_bytes": 1,
}
(folder / "result.json").write_text(json.dumps(result))
recorded(folder)
