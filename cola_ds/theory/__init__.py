"""The theory of Chain of LoRA, run on problems small enough to know all about them: numpy, float64, no process group."""
