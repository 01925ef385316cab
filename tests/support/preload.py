"""What the fork server imports once for all multi-process runs."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# DeepSpeed asks for GPUs as it is imported. Asked in the usual way, CUDA would have begun here, and fail in every forked process.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import datasets
import deepspeed  # noqa: F401
import torch  # noqa: F401
import transformers
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama  # with all that transformers imports at first use: seconds a process
import transformers.models.opt.modeling_opt
import transformers.models.qwen2.modeling_qwen2

import cola_ds.training.run  # noqa: F401

datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()
