"""What vLLM needs on a CPU so that weight updates take effect. On GPUs all of this does nothing.

Weights. On a CPU vLLM packs those of linear layers into oneDNN's own layout when it loads a model, and keeps
multiplying with that copy whatever is loaded afterwards: TRL's sync then raises, and a server's `reload_weights`
answers 200 and goes on with the old ones. Unpacked layers are somewhat slower, so they are asked for only where
weights will be updated: inside a trainer, and in a server that has been given the endpoints for it
(VLLM_SERVER_DEV_MODE=1), to which vLLM's plugin mechanism brings `register`.

Start-up. On a CPU vLLM looks into every object of every module that is loaded, for kernels to replace, and fails on
llvmlite's library wrapper, which claims to have any attribute. numba brings that along, and bm25s numba.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def register() -> None:
    """A `vllm.general_plugins` entry point: what vLLM calls in each of its processes before it loads a model."""
    if os.environ.get("VLLM_SERVER_DEV_MODE") == "1":
        keep_weights_unpacked()


def keep_weights_unpacked() -> None:
    """Tells vLLM, in this process, to do without oneDNN's packed weights; for models loaded from now on."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm import _custom_ops

        _custom_ops._supports_onednn = False
        _keep_llvmlite_honest()


def _keep_llvmlite_honest() -> None:
    ffi = sys.modules.get("llvmlite.binding.ffi")
    if ffi is None:
        return
    wrapper = type(ffi.lib)
    answer = wrapper.__getattr__

    def ask(self: Any, name: str) -> Any:
        if name.startswith("__"):  # no function of a C library
            raise AttributeError(name)
        return answer(self, name)

    wrapper.__getattr__ = ask
