"""Helpers of the rows of gpu.sh: the GPU and its peak FLOPs, the memory in use, and a vLLM that starts fast."""

from __future__ import annotations

import functools
import math
import os
import threading
import time
from types import TracebackType
from typing import Any, TextIO

import psutil
import torch

GIB = 1 << 30
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
}
"""Dense bfloat16 TFLOP/s by what a card's name contains, as its maker states them; the first that fits counts."""
LOOK_S = 0.05


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def peak_flops(device: torch.device) -> float:
    """FLOP/s that the card can do at most; not a number where that is not known."""
    name = device_name(device)
    return next((1e12 * peak for card, peak in PEAK_TFLOPS.items() if card in name), math.nan)


def own_stdout() -> TextIO:
    """Standard output, from now on for who has this file alone: what libraries print goes to standard error."""
    file = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    return file


def shown(value: float, form: str) -> str:
    """The value, or a dash where there is none."""
    return "—" if math.isnan(value) else format(value, form)


def process_s() -> float:
    """Seconds since this process started, its imports included."""
    return time.time() - psutil.Process().create_time()


class PeakMemory:
    """The most GiB in use while it is entered, looked at every `LOOK_S`: of the card, without one of the process.

    Of the whole card, since vLLM and torch share it and only the card sees both.
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


def start_vllm_eagerly(device: torch.device) -> None:
    """Has TRL start vLLM without compiling or capturing graphs: 20 s instead of 50, for steps that are some slower.

    On a CPU in float32, so that what it may do with smaller types there is not in question.
    """
    from trl.generation import vllm_generation

    os.environ.setdefault("MASTER_PORT", "0")  # TRL then finds a free one
    settings: dict[str, Any] = {"enforce_eager": True} | ({"dtype": "float32"} if device.type == "cpu" else {})
    vllm_generation.LLM = functools.partial(vllm_generation.LLM, **settings)
