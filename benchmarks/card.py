"""Helpers for the rows of gpu.sh: peak FLOP/s of the GPU, memory in use, and a fast start of vLLM."""

from __future__ import annotations

import functools
import math
import os
import re
import threading
import time
from types import TracebackType
from typing import Any, TextIO

import psutil
import torch

GIB = 1 << 30
PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "GH200": 989.4,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
}
"""Words of a GPU's name → dense bfloat16 TFLOP/s from its data sheet. The first match is used."""
LOOK_S = 0.05


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def peak_flops(device: torch.device) -> float:
    """Peak FLOP/s of the GPU; NaN for a device that is not in the table."""
    name = device_name(device)
    return next((1e12 * peak for card, peak in PEAK_TFLOPS.items() if re.search(rf"\b{card}\b", name)), math.nan)


def own_stdout() -> TextIO:
    """A file for standard output. From now on everything that libraries print goes to standard error."""
    file = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    return file


def shown(value: float, form: str) -> str:
    """The formatted value; a dash for NaN."""
    return "—" if math.isnan(value) else format(value, form)


def process_s() -> float:
    """Seconds since this process started, its imports included."""
    return time.time() - psutil.Process().create_time()


class PeakMemory:
    """Context manager that samples the memory in use every `LOOK_S` seconds and keeps the peak, in GiB.

    On a GPU this is the memory of the whole device, because vLLM and torch share it. On a CPU it is the process's.
    """

    def __init__(self, device: torch.device):
        self.gib = 0.0
        self._device = device
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._ended.set()
        self._watcher.join()

    def _watch(self) -> None:
        while True:
            self.gib = max(self.gib, self._in_use() / GIB)
            if self._ended.wait(LOOK_S):
                return

    def _in_use(self) -> int:
        if self._device.type == "cpu":
            return int(psutil.Process().memory_info().rss)
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free


def start_vllm_uncompiled(device: torch.device) -> None:
    """Makes TRL start vLLM without compilation, but with CUDA graphs for decoding, which take few seconds to capture.

    On a CPU vLLM computes in float32, because not every CPU supports smaller types.
    """
    from trl.generation import vllm_generation

    os.environ.setdefault("MASTER_PORT", "0")  # TRL then chooses a free port
    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "max_cudagraph_capture_size": 128}
    on_cpu = {"enforce_eager": True, "dtype": "float32"}
    settings: dict[str, Any] = {"compilation_config": graphs} if device.type == "cuda" else on_cpu
    vllm_generation.LLM = functools.partial(vllm_generation.LLM, **settings)
