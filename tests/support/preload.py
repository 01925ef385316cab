"""What the fork server imports once for all multi-process runs."""

import gc
import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# DeepSpeed asks for GPUs as it is imported. Asked in the usual way, CUDA would have begun here, and fail in every forked process.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import datasets
import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 which every engine imports: another second
import torch
import torch.utils.cpp_extension  # noqa: F401
import transformers
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama  # with all that transformers imports at first use: seconds a process
import transformers.models.opt.modeling_opt
import transformers.models.qwen2.modeling_qwen2

import cola_ds.training.run  # noqa: F401

datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()

gc.freeze()  # a process that collects, as one does at a knot, need not walk through all of this: a third of a second each time
