"""Patches that vLLM 0.31 needs to sample on a CPU during training. Nothing is patched on GPUs.

Weights: see `cpu_weights`.

Seeds: chunked prefill samples a token after each chunk of a prompt and discards all but the last. vLLM undoes a
discarded draw by rewinding the request's generator. CPU generators cannot be rewound, and the engine crashes. The
patch reseeds the generator instead. This is equivalent, because a request draws no other random numbers before its
first token.

Start-up: vLLM searches all objects of all loaded modules for kernels to replace. It crashes on llvmlite's library
wrapper, which returns a value for any attribute. bm25s imports numba, and numba imports llvmlite.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import Any

from arpo_trl.rollout.engines.vllm.cpu_weights import keep_weights_unpacked


def register() -> None:
    """The `vllm.general_plugins` entry point, which vLLM calls in each of its processes before it loads a model.

    Patches only servers that have the endpoints for weight updates (VLLM_SERVER_DEV_MODE=1).
    """
    if os.environ.get("VLLM_SERVER_DEV_MODE") == "1":
        prepare_cpu()


@cache
def prepare_cpu() -> None:
    """Patch vLLM in this process for the models that it loads afterwards. Does nothing unless vLLM runs on a CPU."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        keep_weights_unpacked()
        _reseed_instead_of_rewinding()
        _restrict_llvmlite_attributes()


def _reseed_instead_of_rewinding() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # the CPU's is a subclass

    bookkeeping = GPUModelRunner._bookkeeping_sync

    def with_reseeding(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch, generators = self.input_batch, self.input_batch.generators
        for i in self.discard_request_mask.np[: batch.num_reqs].nonzero()[0]:
            if (generator := generators.get(int(i))) is not None:
                generator.manual_seed(generator.initial_seed())
        batch.generators = {}  # otherwise vLLM rewinds them
        try:
            return bookkeeping(self, *args, **kwargs)
        finally:
            batch.generators = generators

    GPUModelRunner._bookkeeping_sync = with_reseeding


def _restrict_llvmlite_attributes() -> None:
    ffi = sys.modules.get("llvmlite.binding.ffi")
    if ffi is None:
        return
    wrapper = type(ffi.lib)
    get_attribute = wrapper.__getattr__

    def get_function(self: Any, name: str) -> Any:
        if name.startswith("__"):  # not the name of a C function
            raise AttributeError(name)
        return get_attribute(self, name)

    wrapper.__getattr__ = get_function
