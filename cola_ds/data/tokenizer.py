"""The tokenizer: loaded, and told from any other."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

from cola_ds.config.schema import ModelConfig
from cola_ds.errors import UserError, cut, first_line


def load_tokenizer(model: ModelConfig) -> Any:
    """The tokenizer of a model. Raises UserError for whatever its files or the hub make transformers raise."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:
        where = "" if os.path.isdir(model.path) else "is not a folder here, and the hub does not give it: "
        raise UserError(f"model.path {cut(model.path)}: {where}{first_line(error)}") from None


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
