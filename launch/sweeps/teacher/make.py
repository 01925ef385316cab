"""A teacher whose update has a known rank: what a chain must learn is then known, too.

    python launch/sweeps/teacher/make.py OUT_DIR --rank 16 [--seed 0] [--base MODEL_DIR] [--rows 25600] [--tokens 32] [--norm 1.0]

Makes OUT_DIR/base, the model to train: a Llama of width 64 with two layers and random weights, or a copy of MODEL_DIR; its
tokenizer ends no text. The teacher is that model with a random matrix of rank `--rank` added to each query and value projection,
of `--norm` times the norm of the weight. Texts are drawn from the teacher, token by token, each from a random first token:
OUT_DIR/train.jsonl and OUT_DIR/dev.jsonl. OUT_DIR/teacher.json has the loss on dev of the teacher, which no student can be below
but by chance, and of the base. Where that file is there, and says the same options, nothing is done.
"""

import argparse
import hashlib
import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SYMBOLS = 128
AT_ONCE = 2048


def small_model(seed: int) -> LlamaForCausalLM:
    """Weights larger than a new model's, so that its attention looks at something."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=SYMBOLS, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=1.0 if "embed" in name else 0.15)
    return model


def small_tokenizer() -> PreTrainedTokenizerFast:
    """A letter for each id."""
    words = {chr(0x4E00 + number): number for number in range(SYMBOLS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=chr(0x4E00)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=chr(0x4E00))


def changed(model: LlamaForCausalLM) -> list[torch.nn.Linear]:
    """The layers that the teacher has otherwise: query and value projections."""
    return [layer for name, layer in model.named_modules() if name.endswith(("q_proj", "v_proj"))]


def add_update(model: LlamaForCausalLM, rank: int, norm: float, seed: int) -> None:
    """Add a random matrix of that rank to each query and value projection, of `norm` times the weight's norm."""
    generator = torch.Generator().manual_seed(seed)
    for layer in changed(model):
        out, width = layer.weight.shape
        update = torch.randn(out, rank, generator=generator) @ torch.randn(rank, width, generator=generator)
        layer.weight.data += update * (norm * layer.weight.norm() / update.norm())


def identity(folder: Path) -> str:
    """A model's folder, by its name and what is in it."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in ("config.json", "*.safetensors", "*.bin") for path in folder.glob(pattern)):
        digest.update(path.name.encode() + path.read_bytes())
    return f"{folder.resolve().name} {digest.hexdigest()[:16]}"


def draw(model: LlamaForCausalLM, rows: int, tokens: int, seed: int) -> torch.Tensor:  # -> (rows, tokens)
    """Texts of the model's own, from its whole distribution."""
    torch.manual_seed(seed)
    found = []
    for begin in range(0, rows, AT_ONCE):
        first = torch.randint(0, model.config.vocab_size, (min(AT_ONCE, rows - begin), 1))
        found.append(
            model.generate(
                first, attention_mask=torch.ones_like(first), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                min_new_tokens=tokens - 1, max_new_tokens=tokens - 1, eos_token_id=None, pad_token_id=0,
            )
        )  # fmt: skip
    return torch.cat(found)


@torch.no_grad()
def loss_on(model: LlamaForCausalLM, rows: list[list[int]]) -> float:
    """Mean loss of all predicted tokens of rows of any length."""
    total = 0.0
    by_length: dict[int, list[list[int]]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    for alike in by_length.values():
        for ids in torch.tensor(alike).split(AT_ONCE // 16):
            logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
            total += torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:].flatten(), reduction="sum").item()
    return total / sum(len(row) - 1 for row in rows)


def main() -> None:
    """Make base, rows and teacher.json; see the top of this file."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", type=Path, help="a model's folder in place of the small Llama")
    parser.add_argument("--rows", type=int, default=25_600)
    parser.add_argument("--dev-rows", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--norm", type=float, default=1.0)
    args = parser.parse_args()
    if min(args.rank, args.rows, args.dev_rows, args.tokens - 1) < 1:
        parser.error("--rank, --rows and --dev-rows must be 1 or more, and --tokens 2 or more")
    if args.base and not (args.base / "config.json").is_file():
        parser.error(f"--base {args.base}: not a model's folder, as it has no config.json")
    options = {name: getattr(args, name) for name in ("rank", "norm", "seed", "rows", "dev_rows", "tokens")}
    options["base"] = identity(args.base) if args.base else None
    if (args.out / "teacher.json").exists():
        made = json.loads((args.out / "teacher.json").read_text(encoding="utf-8"))
        for name, value in options.items():
            if made.get(name) != value:
                option = f"--{name.replace('_', '-')}"
                how = f"without {option}" if made.get(name) is None else f"with {option} {made[name]}"
                how = how if name in made else f"by an older version, which did not keep its {option}"
                parser.error(f"{args.out} was made {how}; name another folder, or remove it")
        return
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32) if args.base else small_model(args.seed)
    if not changed(base):
        parser.error(
            f"--base {args.base}: its attention has no layers named q_proj and v_proj, which the update is for"
        )
    most = min(min(layer.weight.shape) for layer in changed(base))
    if args.rank > most:
        parser.error(
            f"--rank {args.rank}: no update of this model's query and value projections has a higher one than {most}"
        )
    tokenizer = AutoTokenizer.from_pretrained(args.base) if args.base else small_tokenizer()
    tokenizer.eos_token = None
    base.save_pretrained(args.out / "base")
    tokenizer.save_pretrained(args.out / "base")
    teacher = AutoModelForCausalLM.from_pretrained(args.out / "base", dtype=torch.float32)
    add_update(teacher, args.rank, args.norm, 100 + args.seed)
    for number, (name, rows) in enumerate((("dev", args.dev_rows), ("train", args.rows))):
        texts = tokenizer.batch_decode(draw(teacher, rows, args.tokens, 1000 + 2 * args.seed + number))
        texts = [text.replace(" ", "") for text in texts] if not args.base else texts
        with open(args.out / f"{name}.jsonl", "w", encoding="utf-8") as out:
            out.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    with open(args.out / "dev.jsonl", encoding="utf-8") as lines:
        dev = [tokenizer(json.loads(line)["text"]).input_ids[: args.tokens] for line in lines]
    facts = {**options, "base_loss": loss_on(base, dev), "teacher_loss": loss_on(teacher, dev)}
    (args.out / "teacher.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
