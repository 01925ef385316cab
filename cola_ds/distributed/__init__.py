"""Processes that compute together: who they are, how they meet, what they tell each other, and DeepSpeed's engine among them.

Nothing here knows of chains; `import deepspeed` stands here alone.
"""

import logging
import os
import sys

# Before deepspeed is imported. The engine's log lines would drown the run's own; DeepSpeed's warnings stay.
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# DeepSpeed compiles operations on first use. Environments that shared one cache would rebuild each other's copies.
if sys.prefix != sys.base_prefix:
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))
