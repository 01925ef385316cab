"""What the fork server imports once for all multi-process runs."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import deepspeed  # noqa: F401
import torch  # noqa: F401
import transformers

import cola_ds.train  # noqa: F401

datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()
