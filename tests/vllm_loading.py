"""Checks in a separate process how vLLM's CPU build loads each kind of weight: `python … FOLDER`.

The CPU determines which kernels are available, so the script simulates each of them for vLLM, one after the other. It
writes FOLDER/findings.json.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.nn.functional import linear
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from arpo_trl.rollout.engines.vllm.cpu import register
from arpo_trl.rollout.engines.weights import mean_difference
from support import small_model, tokenizer

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # before vLLM is imported: the engine's model is at hand
PROMPT = tokenizer().encode("the melting point of iron is 1538 degrees")
PRETENCES = ("onednn", "sgl", "zentorch")


@contextmanager
def pretending(kernels: str) -> Iterator[None]:
    """Makes vLLM assume that the CPU has only these kernels for linear layers.

    Stand-ins multiply with a copy, as the packed kernels do: the CPU may have none of them, and dies of some then.
    """
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils
    from vllm.platforms import current_platform

    with ExitStack() as stack:
        for target, name, answer in (
            (utils, "check_cpu_sgl_kernel", lambda n, k, dtype: kernels == "sgl"),
            (_custom_ops, "_supports_onednn", kernels == "onednn"),
            (type(current_platform), "is_zen_cpu", lambda self: kernels == "zentorch"),
            (torch.cpu, "_is_avx512_bf16_supported", lambda: True),
            (torch.ops._C, "convert_weight_packed", torch.clone),
            (_custom_ops, "weight_packed_linear_cpu", lambda x, packed, n, bias: linear(x, packed, bias)),
            (_custom_ops, "create_onednn_mm", lambda weight, cache_size: weight.t().clone()),
            (_custom_ops, "onednn_mm", lambda packed, x, bias: linear(x, packed, bias)),
            (_custom_ops, "causal_conv1d_weight_pack", torch.clone),
        ):
            lacking = target is torch.ops._C  # a build for CPUs without AVX-512 has no packing operator
            stack.enter_context(mock.patch.object(target, name, answer, create=lacking))
        yield


def zentorch() -> torch.library.Library:
    """Operators under zentorch's names that multiply with a copy, as zentorch's do."""
    made = torch.library.Library("zentorch", "DEF")
    made.define("zentorch_weight_prepack_for_linear(Tensor weight) -> Tensor")
    made.define("zentorch_linear_unary(Tensor x, Tensor weight, Tensor? bias, *, bool is_weight_prepacked) -> Tensor")
    made.impl("zentorch_weight_prepack_for_linear", torch.clone, "CPU")
    made.impl(
        "zentorch_linear_unary",
        lambda x, weight, bias, is_weight_prepacked: linear(x, weight, bias),
        "CPU",
    )
    return made


def follows(method: Any, shape: tuple[int, ...], apply: Callable[..., torch.Tensor] | None) -> bool:
    """Whether a layer of vLLM's kind, once loaded, takes new weights where it took the first, and works with them."""
    torch.manual_seed(0)
    layer = torch.nn.Module()
    loader = SimpleNamespace()
    weight = torch.nn.Parameter(torch.randn(shape, dtype=torch.bfloat16), requires_grad=False)
    weight.weight_loader = loader
    layer.register_parameter("weight", weight)
    method.process_weights_after_loading(layer)
    if getattr(layer.weight, "weight_loader", None) is not loader or layer.weight.shape != shape:
        return False
    new = torch.randn(shape, dtype=torch.bfloat16)
    layer.weight.data.copy_(new)
    if apply is None:
        return torch.equal(layer.weight, new) and not hasattr(layer, "_cpu_unpacked_conv_weight")
    x = torch.randn(5, shape[1], dtype=torch.bfloat16)
    return torch.allclose(apply(layer, x).float(), (x @ new.T).float(), atol=0.5)


def kept() -> dict[str, bool]:
    """For each kernel that there may be, whether each kind of layer follows its weights."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    found = {}
    for kernels in PRETENCES:
        with pretending(kernels):
            for method in (UnquantizedLinearMethod(), UnquantizedEmbeddingMethod()):
                found[f"{kernels} {type(method).__name__}"] = follows(method, (64, 32), method.apply)
    with pretending("convolution"):
        found["convolution"] = follows(UnquantizedLinearMethod(), (64, 1, 4), None)
    return found


def experts_follow(folder: Path) -> dict[str, list[float]]:
    """How far vLLM's logprobs are from the old and from the new weights, after each way of loading the new ones."""
    from vllm import LLM, SamplingParams

    models = {}
    for name, seed in (("old", 0), ("new", 1)):
        settings = {"head_dim": 32, "initializer_range": 0.3, "num_experts": 4, "num_experts_per_tok": 2}
        # 48 is no multiple of 32, so experts are padded as well as packed
        model = small_model(Qwen3MoeConfig, Qwen3MoeForCausalLM, seed, moe_intermediate_size=48, **settings)
        models[name] = model.to(torch.bfloat16)
        models[name].save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    llm = LLM(str(folder / "old"), max_model_len=128, enable_prefix_caching=False, max_num_seqs=4, enforce_eager=True)
    inner = llm.llm_engine.model_executor.driver_worker.model_runner.model

    def differences() -> list[float]:
        params = SamplingParams(max_tokens=2, prompt_logprobs=0)
        given = llm.generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)[0].prompt_logprobs
        theirs = [place[token].logprob for place, token in zip(given[1:], PROMPT[1:], strict=True)]
        ours = []
        for model in models.values():
            with torch.no_grad():
                rows = model(torch.tensor([PROMPT])).logits[0, :-1].float().log_softmax(-1)
            ours.append(rows.gather(1, torch.tensor(PROMPT[1:]).unsqueeze(1)).squeeze(1).tolist())
        return [mean_difference(one, theirs) for one in ours]

    found = {"loaded": differences()}
    for name, value in models["new"].named_parameters():  # as TRL moves them
        inner.load_weights([(name, value.data)])
    found["moved"] = differences()
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder / "old")})  # as servers are told to
    found["reloaded"] = differences()
    return found


def main(folder: Path) -> None:
    library = zentorch()  # gone when it is
    findings: dict[str, Any] = {"of vLLM itself": kept()}
    register()  # in a server that nobody updates
    findings["left alone"] = kept()
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    register()
    findings["prepared"] = kept()
    findings["experts"] = experts_follow(folder)
    del library
    (folder / "findings.json").write_text(json.dumps(findings), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
