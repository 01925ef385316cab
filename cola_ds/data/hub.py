"""Hub: datasets on the Hugging Face hub, which `datasets` loads by way of its cache. Local files need neither."""

from __future__ import annotations

import errno
import os
from typing import Any

from cola_ds import notices
from cola_ds.errors import UserError, first_line

_OF_THE_FOLDER = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


def load_hub(path: str, config: str | None, split: str, revision: str | None) -> Any:
    """A split as a datasets.Dataset. Raises UserError, whose text is the reason alone; a cache that cannot be used is named."""
    import datasets

    try:
        with notices.waiting(f"fetching {path}"):
            return datasets.load_dataset(path, config, split=split, revision=revision)
    except Exception as error:  # whatever the hub, the network, a set's files or the cache's folder make datasets raise
        raise UserError(_reason(error, [datasets.config.HF_DATASETS_CACHE, datasets.config.HF_CACHE_HOME])) from None


def _reason(error: BaseException, caches: list[Any]) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    said = first_line(error)[:200]
    folders = [os.path.abspath(os.path.expanduser(cache)) for cache in caches]
    if isinstance(error, OSError):
        about = [name for name in (error.filename, error.filename2) if isinstance(name, str)]
        of_cache = any(os.path.abspath(name).startswith(folder) for name in about for folder in folders)
        if of_cache or error.errno in _OF_THE_FOLDER:
            return f"the cache {folders[0]} cannot be used ({said}): set HF_HOME to a folder that can be written"
    return said
