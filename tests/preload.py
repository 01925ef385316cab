"""What the fork server imports once for all multi-process runs."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets  # noqa: E402
import deepspeed  # noqa: E402, F401
import torch  # noqa: E402, F401
import transformers  # noqa: E402

import cola_ds.train  # noqa: E402, F401

datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()
