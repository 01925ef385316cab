"""Peaks of devices, by the names that torch gives them."""

import pytest

from cola_ds.distributed import devices
from cola_ds.distributed.devices import peak_tflops

# Names as torch.cuda.get_device_name() has given them, and dense TFLOP/s in bf16, fp16 and fp32.
NAMES = {
    "NVIDIA H100 80GB HBM3": (989.4, 989.4, 66.9),
    "NVIDIA H100 PCIe": (756, 756, 51.2),
    "NVIDIA H100 NVL": (835.5, 835.5, 60),
    "NVIDIA H200": (989.4, 989.4, 66.9),
    "NVIDIA GH200 480GB": (989.4, 989.4, 66.9),
    "NVIDIA H20": (148, 148, 44),
    "NVIDIA B200": (2250, 2250, 75),
    "NVIDIA GB200": (2500, 2500, 80),
    "NVIDIA A100-SXM4-40GB": (312, 312, 19.5),
    "NVIDIA A100-SXM4-80GB": (312, 312, 19.5),
    "A100-SXM4-40GB": (312, 312, 19.5),  # of older drivers
    "NVIDIA A100-PCIE-40GB": (312, 312, 19.5),
    "NVIDIA A100 80GB PCIe": (312, 312, 19.5),
    "NVIDIA A10": (125, 125, 31.2),
    "NVIDIA A10G": (70, 70, 35),
    "NVIDIA A30": (165, 165, 10.3),
    "NVIDIA A40": (149.7, 149.7, 37.4),
    "NVIDIA L4": (121, 121, 30.3),
    "NVIDIA L40": (181, 181, 90.5),
    "NVIDIA L40S": (362, 362, 91.6),
    "NVIDIA RTX A6000": (154.8, 154.8, 38.7),
    "NVIDIA RTX 6000 Ada Generation": (364.2, 364.2, 91.1),
    "NVIDIA GeForce RTX 3090": (71, 71, 35.6),
    "NVIDIA GeForce RTX 4090": (165.2, 165.2, 82.6),
    "Tesla V100-SXM2-32GB": (None, 125, 15.7),
    "Tesla V100-PCIE-16GB": (None, 112, 14),
    "Tesla T4": (None, 65, 8.1),
    "AMD Instinct MI250X": (191.5, 191.5, 47.9),
    "AMD Instinct MI300X": (1307.4, 1307.4, 163.4),
    "AMD Instinct MI300X VF": (1307.4, 1307.4, 163.4),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_peak_of_a_device(name):
    assert tuple(peak_tflops(name, dtype) for dtype in ("bf16", "fp16", "fp32")) == NAMES[name]


@pytest.mark.parametrize(
    "name",
    [
        "cpu", "", "NVIDIA", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A1000", "NVIDIA RTX 6000", "AMD Radeon Graphics", "NVIDIA H100X",
    ],
)  # fmt: skip
def test_no_guess_is_made(name):
    """Least of all where a name begins as that of a faster device does."""
    assert peak_tflops(name, "bf16") is None


def test_every_row_of_the_table_can_be_found():
    for name, (bf16, fp16, fp32) in devices._PEAKS.items():
        assert peak_tflops(name, "fp32") == fp32
        assert bf16 in (None, fp16) and fp16 > fp32
