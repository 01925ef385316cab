"""Fingerprint of a base model: a hash of what it is, not of where it lies. Datasets have their own, by `fingerprint()`."""

from __future__ import annotations

import hashlib
import json

from cola_ds.config.inputs import sha256_of
from cola_ds.config.schema import ModelConfig
from cola_ds.errors import UserError
from cola_ds.run.model_files import weight_files
from cola_ds.run.model_folder import model_folder

_READ_WHOLE = 2**30  # bytes of weights up to which all of them are hashed: a second or two
_SAMPLE = 4096  # bytes of every tensor otherwise


def model_fingerprint(config: ModelConfig) -> str:
    """SHA-256 of a base model: its config.json; each weight file's name and size and its tensors' names, dtypes and shapes; and
    their data, all of it in models of up to 1 GiB, else the first 4096 bytes of every tensor.

    Raises UserError for a weight file that is not safetensors, or not there, and where there is none.
    """
    folder = model_folder(config)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    files = weight_files(folder)
    if not files:  # those that were loaded came from elsewhere: the hub may offer a conversion in another revision
        raise UserError(
            f"model.path {config.path} has no safetensors beside its config.json; save it as such in a folder"
        )
    whole = sum(path.stat().st_size for path in files) <= _READ_WHOLE
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        if whole:
            digest.update(sha256_of(path).encode())
            continue
        with open(path, "rb") as held:
            size = int.from_bytes(held.read(8), "little")
            header = held.read(size)
            digest.update(header)
            for name, tensor in sorted(json.loads(header).items()):
                if name != "__metadata__":
                    begin, end = tensor["data_offsets"]
                    held.seek(8 + size + begin)
                    digest.update(held.read(min(_SAMPLE, end - begin)))
    return digest.hexdigest()
