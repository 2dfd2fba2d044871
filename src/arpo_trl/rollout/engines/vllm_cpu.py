"""Makes weight updates take effect in vLLM on a CPU. A `vllm.general_plugins` entry point: vLLM calls it by itself.

On a CPU vLLM packs the weights of linear layers into oneDNN's own layout when it loads a model, and keeps multiplying
with that copy whatever is loaded afterwards: TRL's sync then raises, and a server's `reload_weights` answers 200 and
goes on with the old weights. Unpacked layers are somewhat slower, so this acts only where weights will be updated: in
a server that has been given the endpoints for it (VLLM_SERVER_DEV_MODE=1), and inside a trainer. On GPUs it does
nothing.
"""

from __future__ import annotations

import os


def register() -> None:
    """What vLLM calls in each of its processes before it loads a model."""
    if os.environ.get("VLLM_SERVER_DEV_MODE") == "1":
        keep_weights_unpacked()


def keep_weights_unpacked() -> None:
    """Tells vLLM, in this process, to do without oneDNN's packed weights; for models loaded from now on."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm import _custom_ops

        _custom_ops._supports_onednn = False
