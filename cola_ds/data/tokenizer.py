"""The tokenizer: loaded, and told from any other."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

from cola_ds.config.schema import ModelConfig
from cola_ds.errors import UserError, cut, first_line

_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model")


def load_tokenizer(model: ModelConfig) -> Any:
    """The tokenizer of a model. Raises UserError for whatever its files or the hub make transformers raise."""
    from transformers import AutoTokenizer

    _check_sentencepiece(Path(model.path))
    try:
        return AutoTokenizer.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:
        where = "" if os.path.isdir(model.path) else "is not a folder here, and the hub does not give it: "
        raise UserError(f"model.path {cut(model.path)}: {where}{first_line(error)}") from None


def _check_sentencepiece(folder: Path) -> None:
    """Transformers looks for another package where the one that it needs is missing, at some length."""
    if (folder / "tokenizer.json").is_file():
        return
    absent = [name for name in ("sentencepiece", "google.protobuf") if not _is_installed(name)]
    for name in _SENTENCEPIECE if absent else ():
        if (folder / name).is_file():
            with open(folder / name, "rb") as file:
                first = file.read(1)
            if first == b"\n":  # tiktoken's files, which have the same name, begin with a letter
                raise UserError(
                    f"model.path {folder}: its tokenizer, {name}, is SentencePiece's, which is not installed: "
                    "pip install sentencepiece protobuf"
                )


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # such as of a part of a package that is not there
        return False


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of all that the tokenizer's ids follow from: the files that it would be saved as, its chat template among them.

    Raises UserError where it cannot be saved."""
    digest = hashlib.sha256(type(tokenizer).__name__.encode())
    if getattr(tokenizer, "is_fast", False):  # how the last call cut and padded is saved too; each call sets it anew
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    try:
        with tempfile.TemporaryDirectory(prefix="cola-ds-") as folder:
            tokenizer.save_pretrained(folder)
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file():
                    digest.update(f"{path.relative_to(folder)} ".encode() + path.read_bytes())
    except Exception as error:  # tokenizers' own are of no type
        where = tempfile.gettempdir()
        raise UserError(
            f"the tokenizer cannot be written to {where}: {first_line(error)}; set TMPDIR to a folder that can be"
        ) from None
    return digest.hexdigest()
