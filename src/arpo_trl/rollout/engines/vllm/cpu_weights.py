"""Keeps weights unpacked for vLLM 0.31 on a CPU, so that they can be updated.

When vLLM loads a model, it packs weights into the layout of the CPU's kernels: the weights of linear layers and of the
vocabulary for oneDNN, SGL (with AMX) or zentorch (AMD), of latent attention if the CPU has AMX, of convolutions if it
has AVX-512 BF16, and of experts always. Weights loaded later do not update the packed copy, or vLLM reads them as if
they were packed. TRL's sync then raises an error. A server's `reload_weights` answers 200, but the server's outputs
are wrong.

So this module keeps the layout of the loaded weights. Kernels that require packed weights pack them at
each use, which is somewhat slower. Quantized layers stay packed: only a server's reload can update them, and it
quantizes and packs them again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def keep_weights_unpacked() -> None:
    """Patch vLLM in this process so that layers it loads afterwards keep their weights unpacked."""
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    # Every layer that is not quantized gets its kernel from this function. The kernels depend on the CPU.
    utils.dispatch_cpu_unquantized_gemm = _multiply_unpacked
    for name in ("causal_conv1d_fwd_cpu", "causal_conv1d_update_cpu"):
        setattr(_custom_ops, name, _taking_unpacked(getattr(_custom_ops, name)))
    cpu_moe.CPUUnquantizedExperts.process_weights_after_loading = _choose_kernel_only
    cpu_moe.CPUUnquantizedExperts.apply = _packing_experts(cpu_moe.CPUUnquantizedExperts.apply)
    _pack_latents_at_use()


def _multiply_unpacked(layer: Any, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear


def _taking_unpacked(convolve: Callable[..., Any]) -> Callable[..., Any]:
    """The same convolution, for an unpacked weight of shape (channels, 1, width)."""

    def convolve_unpacked(*, weight: torch.Tensor, is_vnni: bool, **rest: Any) -> Any:
        return convolve(weight=weight.flatten(1), is_vnni=False, **rest)

    return convolve_unpacked


def _choose_kernel_only(self: Any, layer: torch.nn.Module) -> None:
    """Choose the kernel of an experts layer without padding and packing it. zentorch's takes unpacked weights."""
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    self._use_zentorch = cpu_moe.is_zentorch_moe_supported(layer)


def _packing_experts(compute: Callable[..., None]) -> Callable[..., None]:
    """The same computation for unpacked experts' weights, which are padded and packed at each use."""
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    def pack_and_compute(self: Any, *, w1: torch.Tensor, w2: torch.Tensor, **rest: Any) -> None:
        if self._use_zentorch:
            return compute(self, w1=w1, w2=w2, **rest)
        missing = self._padded_intermediate_size(self.moe_config) - w2.shape[2]
        cpu_moe.cpu_fused_moe(
            rest["output"],
            rest["hidden_states"],
            cpu_moe.cpu_prepack_moe_weight(_pad_gate_and_up(w1, missing), self.isa),
            cpu_moe.cpu_prepack_moe_weight(torch.nn.functional.pad(w2, (0, missing)), self.isa),
            None if self.w1_bias is None else _pad_gate_and_up(self.w1_bias, missing),
            self.w2_bias,
            rest["topk_weights"],
            rest["topk_ids"],
            rest["activation"].value,
            self.isa,
            rest["apply_router_weight_on_input"],
        )

    return pack_and_compute


def _pad_gate_and_up(tensor: torch.Tensor, missing: int) -> torch.Tensor:
    """Pad (experts, 2 × size, …), gate before up, with zeros to (experts, 2 × (size + missing), …)."""
    if missing == 0:
        return tensor
    gate, up = tensor.chunk(2, dim=1)
    zeros = tensor.new_zeros(tensor.shape[0], missing, *tensor.shape[2:])
    return torch.cat([gate, zeros, up, zeros], dim=1)


def _pack_latents_at_use() -> None:
    from vllm.v1.attention.backends.mla.amx_mla import AMXMLAImpl

    pack, attend = AMXMLAImpl.process_weights_after_loading, AMXMLAImpl.forward_mha

    def pack_and_attend(self: Any, q: torch.Tensor, *args: Any, **rest: Any) -> None:
        pack(self, q.dtype)
        attend(self, q, *args, **rest)

    AMXMLAImpl.uses_amx_bmm = False  # otherwise the layer deletes the weights, which decoding reads
    AMXMLAImpl.process_weights_after_loading = lambda self, act_dtype: None
    AMXMLAImpl.forward_mha = pack_and_attend
