"""Chain of LoRA (COLA, arXiv 2401.04151) under DeepSpeed ZeRO-3."""
