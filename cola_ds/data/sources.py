"""Rows from files or the hub, turned into token ids."""

from __future__ import annotations

import glob
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy

from cola_ds.config import DataConfig
from cola_ds.data.batching import PADDING, Batch, collate
from cola_ds.errors import UserError, first_line

_FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "prompt_length": datasets.Value("int32"),
        "shortened": datasets.Value("bool"),
    }
)
_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class TokenizedData:
    """Examples as token ids. `rows` has input_ids (list of int) and prompt_length (int: ids before the loss begins)."""

    rows: datasets.Dataset
    lengths: list[int]
    """Token ids of each example."""
    loss_tokens: list[int]
    """Predicted ids of each example that the loss counts."""
    shortened: int
    """Examples that lost tokens to max_length."""
    largest_id: int

    def __len__(self) -> int:
        return len(self.lengths)

    def collate(self, indices: list[int]) -> Batch:
        """A micro batch of these examples; without any, one that counts nothing."""
        if not indices:
            return collate([([PADDING], 1)])
        rows = self.rows[indices]
        return collate(list(zip(rows["input_ids"], rows["prompt_length"], strict=True)))

    def fingerprint(self) -> str:
        """SHA-256 of all token ids and of where each example's loss begins, in order."""
        digest = hashlib.sha256(numpy.array(self.lengths, dtype=numpy.int64).tobytes())
        for batch in self.rows.with_format("arrow").iter(batch_size=1000):
            for column in (batch["input_ids"].combine_chunks().flatten(), batch["prompt_length"].combine_chunks()):
                digest.update(column.to_numpy(zero_copy_only=False).astype(numpy.int32).tobytes())
        return digest.hexdigest()


def load_split(config: DataConfig, split: str, tokenizer: Any) -> TokenizedData:
    """Read and tokenize `split`, "train" or "eval".

    Raises UserError for a file that is missing, empty or cannot be parsed, a missing column, and a row without a completion.
    """
    name = getattr(config, split)
    assert name is not None
    rows = _read(config, name, f"data.{split}")
    columns = [config.text] if config.text is not None else [config.prompt, config.completion]
    for column in columns:
        if column not in rows.column_names:
            raise UserError(f"data.{split} {name} has no column {column}; it has {', '.join(rows.column_names)}")
    if len(rows) == 0:
        raise UserError(f"data.{split} {name} is empty: it needs at least one row")
    try:
        for column in columns:
            for index, value in enumerate(rows[column]):
                if not isinstance(value, str) or (column == config.completion and config.text is None and not value):
                    raise UserError(
                        f"data.{split} {name}: row {index + 1} has {value!r} in column {column}; it must be text"
                    )
    except UnicodeDecodeError as error:
        raise UserError(f"data.{split} {name} is not UTF-8: {error}") from None
    encode = _TextEncoder(tokenizer, config) if config.text is not None else _PairEncoder(tokenizer, config)
    # No cache: its key would not change with this file's code, and a stale cache is a wrong number in someone's table.
    rows = rows.map(
        encode,
        batched=True,
        remove_columns=rows.column_names,
        features=_FEATURES,
        load_from_cache_file=False,
        keep_in_memory=True,
    )
    lengths = [len(ids) for ids in rows["input_ids"]]
    # The first id of an example has nothing before it to be predicted from.
    loss_tokens = [length - max(start, 1) for length, start in zip(lengths, rows["prompt_length"], strict=True)]
    if not any(n > 0 for n in loss_tokens):
        raise UserError(f"data.{split} {name} leaves nothing to predict: it has no text of two tokens or more")
    largest_id = max(max(ids) for ids in rows["input_ids"])
    return TokenizedData(rows, lengths, loss_tokens, sum(rows["shortened"]), largest_id)


def _read(config: DataConfig, name: str, key: str) -> datasets.Dataset:
    if config.hub is not None:
        try:
            return datasets.load_dataset(config.hub, config.hub_config, split=name, revision=config.revision)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetGenerationError) as error:
            raise UserError(f"{key}: cannot load split {name} of data.hub {config.hub}: {first_line(error)}") from None
    path = Path(name)
    if not path.is_file():
        raise UserError(f"{key} {name} is not a file; for a dataset on the hub name it in data.hub and its split here")
    builder = _BUILDERS.get(path.suffix)
    if builder is None or (builder == "text" and config.text != "text"):
        raise UserError(f"{key} {name}: use a .jsonl, .json or .parquet file, or a .txt file with data.text=text")
    if path.stat().st_size == 0:
        raise UserError(f"{key} {name} is empty: it needs at least one row")
    options = {"sample_by": "document"} if builder == "text" else {}
    try:
        return datasets.load_dataset(builder, data_files=glob.escape(str(path)), split="train", **options)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise UserError(f"{key} {name} cannot be read as {builder}: {first_line(error.__cause__ or error)}") from None


class _PairEncoder:
    """Prompt and completion: ids of the prompt, of the completion, and the end-of-sequence id."""

    def __init__(self, tokenizer: Any, config: DataConfig):
        self.tokenizer, self.config = tokenizer, config

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        prompts = self.tokenizer(batch[self.config.prompt]).input_ids
        completions = self.tokenizer(batch[self.config.completion], add_special_tokens=False).input_ids
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        out: dict[str, list[Any]] = {"input_ids": [], "prompt_length": [], "shortened": []}
        for prompt, completion in zip(prompts, completions, strict=True):
            prompt = without_end(prompt, eos)
            answer = completion + ([eos] if eos is not None else [])
            kept_answer = answer[: self.config.max_length - 1]
            kept_prompt = keep_end(prompt, self.config.max_length - len(kept_answer), bos)
            out["input_ids"].append(kept_prompt + kept_answer)
            out["prompt_length"].append(len(kept_prompt))
            out["shortened"].append(len(kept_prompt) + len(kept_answer) < len(prompt) + len(answer))
        return out


class _TextEncoder:
    """Plain text: its ids and the end-of-sequence id, cut into windows of at most max_length."""

    def __init__(self, tokenizer: Any, config: DataConfig):
        self.tokenizer, self.column, self.width = tokenizer, config.text, config.max_length

    def __call__(self, batch: dict[Any, list[str]]) -> dict[str, list[Any]]:
        eos = self.tokenizer.eos_token_id
        windows = []
        texts = [text for text in batch[self.column] if text.strip()]  # empty lines between paragraphs are common
        for ids in self.tokenizer(texts).input_ids if texts else ():
            ids = without_end(ids, eos) + ([eos] if eos is not None else [])
            # Each window begins with the last id of the one before, so that every id is predicted once.
            windows += [ids[at : at + self.width] for at in range(0, max(len(ids) - 1, 1), self.width - 1)]
        return {"input_ids": windows, "prompt_length": [1] * len(windows), "shortened": [False] * len(windows)}


def without_end(ids: list[int], eos: int | None) -> list[int]:
    """Some tokenizers end every text with EOS themselves."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids


def keep_end(ids: list[int], room: int, bos: int | None) -> list[int]:
    """The last `room` ids, with the BOS id kept at the front where there was one."""
    if len(ids) <= room:
        return ids
    if ids[0] == bos and room > 0:
        return [ids[0], *ids[len(ids) - room + 1 :]]
    return ids[len(ids) - room :]
