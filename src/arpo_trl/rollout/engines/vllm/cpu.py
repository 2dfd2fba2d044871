"""What vLLM 0.31 needs on a CPU to be trained against. On GPUs none of this applies, and nothing is changed.

Weights stay as they are loaded: `vllm_cpu_weights`.

Seeds. A prompt that is read in pieces, since others fill the batch, is sampled from after each of them, and what was
drawn is taken back by rewinding the request's generator. A CPU's generators cannot be rewound, and the engine dies of
it. So they are seeded anew: before its first token a request has drawn nothing else.

Start-up. vLLM looks into every object of every module that is loaded, for kernels to replace, and fails on llvmlite's
library wrapper, which claims to have any attribute. numba brings that along, and bm25s numba.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import Any

from arpo_trl.rollout.engines.vllm.cpu_weights import keep_weights_unpacked


def register() -> None:
    """A `vllm.general_plugins` entry point: what vLLM calls in each of its processes before it loads a model.

    Acts in servers that have been given the endpoints for weight updates, and leaves others as they are.
    """
    if os.environ.get("VLLM_SERVER_DEV_MODE") == "1":
        prepare_cpu()


@cache
def prepare_cpu() -> None:
    """Prepares this process for models that vLLM loads from now on; does nothing where vLLM does not run on a CPU."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        keep_weights_unpacked()
        _reseed_instead_of_rewinding()
        _keep_llvmlite_honest()


def _reseed_instead_of_rewinding() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # the CPU's is a subclass

    keep_books = GPUModelRunner._bookkeeping_sync

    def with_reseeding(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch, generators = self.input_batch, self.input_batch.generators
        for i in self.discard_request_mask.np[: batch.num_reqs].nonzero()[0]:
            if (generator := generators.get(int(i))) is not None:
                generator.manual_seed(generator.initial_seed())
        batch.generators = {}  # it would rewind them
        try:
            return keep_books(self, *args, **kwargs)
        finally:
            batch.generators = generators

    GPUModelRunner._bookkeeping_sync = with_reseeding


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
