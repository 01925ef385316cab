"""Peak throughput of accelerators, by the names that torch gives them: what a share of the peak is a share of."""

from __future__ import annotations

import re

_PEAKS: dict[str, tuple[float | None, float, float]] = {
    "V100": (None, 125.0, 15.7),
    "V100 PCIE": (None, 112.0, 14.0),
    "T4": (None, 65.0, 8.1),
    "A10": (125.0, 125.0, 31.2),
    "A10G": (70.0, 70.0, 35.0),
    "A30": (165.0, 165.0, 10.3),
    "A40": (149.7, 149.7, 37.4),
    "A100": (312.0, 312.0, 19.5),
    "A100 PCIE": (312.0, 312.0, 19.5),
    "A800": (312.0, 312.0, 19.5),
    "A800 PCIE": (312.0, 312.0, 19.5),
    "RTX A6000": (154.8, 154.8, 38.7),
    "RTX 3090": (71.0, 71.0, 35.6),
    "RTX 4090": (165.2, 165.2, 82.6),
    "RTX 5090": (209.5, 209.5, 104.8),
    "RTX 6000 ADA": (364.2, 364.2, 91.1),
    "L4": (121.0, 121.0, 30.3),
    "L40": (181.0, 181.0, 90.5),
    "L40S": (362.0, 362.0, 91.6),
    "H20": (148.0, 148.0, 44.0),
    "H100": (989.4, 989.4, 66.9),
    "H100 PCIE": (756.0, 756.0, 51.2),
    "H100 NVL": (835.5, 835.5, 60.0),
    "H800": (989.4, 989.4, 66.9),
    "H200": (989.4, 989.4, 66.9),
    "H200 NVL": (835.5, 835.5, 60.0),
    "GH200": (989.4, 989.4, 66.9),
    "B200": (2250.0, 2250.0, 75.0),
    "GB200": (2500.0, 2500.0, 80.0),
    "MI210": (181.0, 181.0, 45.3),
    "MI250X": (191.5, 191.5, 47.9),  # one of its two dies: each is a device of its own
    "MI300X": (1307.4, 1307.4, 163.4),
    "MI325X": (1307.4, 1307.4, 163.4),
}
"""Dense TFLOP/s in bf16, fp16 and fp32, as the datasheets have them: NVIDIA's of each card (for the GeForce cards the whitepapers
of Ampere, Ada and Blackwell, with fp32 sums), AMD's of the Instinct MI200 and MI300 series.

Where a datasheet gives a rate "with sparsity" alone, half of it. fp32 is fp32 and not TF32, as it is in a run; AMD's is that of
its matrix cores. None: the tensor cores have no such format.
"""

KNOWN = tuple(_PEAKS)
"""The names of the table."""

# What a name says besides the model: vendor, series, form and memory. PCIe is none of it: it is a slower card.
_BESIDES = re.compile(r"NVIDIA|AMD|INSTINCT|TESLA|GEFORCE|GENERATION|SXM\d?|HBM\w*|OAM|VF|\d+GB?")


def peak_tflops(name: str, dtype: str) -> float | None:
    """Dense peak, in TFLOP/s, of the accelerator of that name (torch's, such as "NVIDIA A100-SXM4-80GB") in bf16, fp16 or fp32.

    None for a device that is not in the table, such as the CPU, a laptop's GPU or a slice of one (MIG): no guess is made.
    """
    words = re.split(r"[\s-]+", name.upper())
    found = _PEAKS.get(" ".join(word for word in words if not _BESIDES.fullmatch(word)))
    return None if found is None else found[("bf16", "fp16", "fp32").index(dtype)]
