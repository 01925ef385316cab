"""Data as a run of one process has it."""

from cola_ds.data.text import datasets_of
from cola_ds.data.tokenize import tokenize


def load_splits(config, tokenizer, model=None):
    """The training and the held-out examples; `model` says where processes that help find the tokenizer."""
    return datasets_of(config, tokenize(config, tokenizer, model))


def load_split(config, split, tokenizer):
    """One of them: "train" or "eval"."""
    return load_splits(config, tokenizer)[split == "eval"]
