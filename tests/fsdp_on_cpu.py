"""Runs a script with FSDP on the CPU: `accelerate launch … fsdp_on_cpu.py train.py --config …`.

accelerate uses FSDP on accelerators only; on a CPU it silently replicates the model (DDP). PyTorch's FSDP2 itself
works on a CPU over gloo. So this script makes accelerate believe that there is an accelerator called "cpu".
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate.state import DistributedType, PartialState


def over_gloo(self: PartialState, *_: Any) -> tuple[str, DistributedType]:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return "gloo", DistributedType.MULTI_GPU


if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = over_gloo  # type: ignore[method-assign]
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)  # as if the script had been started itself
    runpy.run_path(sys.argv[0], run_name="__main__")
