"""What an export to hf takes of a large model: seconds, and memory by the kernel's own count.

    python -m tests.bench.export FOLDER [--gb 8] [--file-gb 1]

Makes a model of that size in FOLDER/base, in bf16 and files of at most so much (random values, repeated), and a chain of two
links, and exports it to FOLDER/out: 2 x GB of disk. Both are removed. `anonymous` is the memory that the process itself has;
`resident` has the pages of mapped files with it, which the kernel drops at will.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import threading
import time
from pathlib import Path

import torch

from cola_ds.commands import export as exporting
from cola_ds.config.loading import check_config
from cola_ds.run.fingerprint import model_fingerprint
from cola_ds.run.learnt import Learnt, SavedLink
from cola_ds.run.peft_files import adapter_files, lora_names
from tests.scale import holes
from tests.support.toys import run_config

LAYER_GB = 0.405
SIZES = {
    **holes.LLAMA_2_70B,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gb", type=float, default=8)
    parser.add_argument("--file-gb", type=float, default=1)
    args = parser.parse_args()
    base, out = args.folder / "base", args.folder / "out"
    try:
        holes._FILE_BYTES = int(1e9 * args.file_gb)
        holes.save_holes(base, {**SIZES, "num_hidden_layers": round((args.gb - 0.5) / LAYER_GB)})
        for path in base.glob("*.safetensors"):
            _fill(path)
        learnt = _learnt(args.folder, base)
        exporting.read_learnt = lambda run: learnt
        print(json.dumps(_measured(base, out), indent=1))
    finally:
        for path in (base, out, args.folder / "chain"):
            shutil.rmtree(path, ignore_errors=True)


def _fill(path: Path) -> None:
    """The data of a file that is all holes: the same random numbers again and again."""
    block = (0.02 * torch.randn(2**23)).bfloat16().view(torch.uint8).numpy().tobytes()
    size = path.stat().st_size
    with open(path, "r+b") as held:
        place = 8 + int.from_bytes(held.read(8), "little")
        while place < size:
            held.seek(place)
            place += held.write(block[: size - place])


def _learnt(folder: Path, base: Path) -> Learnt:
    """Two links on q and v."""
    config = check_config(
        run_config(base, Path("t.jsonl"), folder / "run", model={"dtype": "bf16"}, chain={"length": 2}), [], "bench"
    )
    layers = [
        f"model.layers.{number}.self_attn.{name}"
        for number in range(json.loads((base / "config.json").read_bytes())["num_hidden_layers"])
        for name in ("q_proj", "v_proj")
    ]
    saved = []
    for link in (1, 2):
        tensors = {}
        for layer in layers:
            A, B = lora_names(layer)
            tensors |= {A: torch.randn(8, 4096).bfloat16(), B: 1e-3 * torch.randn(4096, 8).bfloat16()}
        path = folder / f"chain/link-{link:04d}"
        path.mkdir(parents=True)
        for name, content in adapter_files(config, 8, 16, layers, tensors).items():
            (path / name).write_bytes(content)
        saved.append(SavedLink(path=path, lora_rank=8, alpha=16, layers=layers))
    facts = {"chat_template": None}
    return Learnt(
        folder=folder, config=config, result={}, base=model_fingerprint(config.model), links=saved, facts=facts
    )


def _measured(base: Path, out: Path) -> dict[str, float]:
    peak, done = {"RssAnon": 0, "VmRSS": 0}, threading.Event()

    def watch() -> None:
        while not done.is_set():
            said = Path("/proc/self/status").read_text(encoding="ascii")
            for name in peak:
                found = re.search(rf"{name}:\s+(\d+)", said)
                assert found
                peak[name] = max(peak[name], int(found[1]) * 1024)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    exporting.export("run", "hf", out)
    seconds = time.perf_counter() - begin
    done.set()
    watcher.join()
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert size >= sum(path.stat().st_size for path in base.glob("*.safetensors")) - 2**20
    return {
        "files": len(list(out.glob("*.safetensors"))), "gb": size / 1e9, "seconds": seconds,
        "anonymous_gb": peak["RssAnon"] / 1e9, "resident_gb": peak["VmRSS"] / 1e9,
    }  # fmt: skip


if __name__ == "__main__":
    main()
