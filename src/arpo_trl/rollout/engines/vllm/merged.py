"""A model's weights for vLLM, with an adapter merged layer by layer and without a change of its base."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import groupby
from typing import Any

import torch
from accelerate.utils import is_peft_model

from arpo_trl.trl_seam import VLLMGeneration


def keep_base(generation: VLLMGeneration) -> None:
    """Let `generation`, which moves weights to vLLM, leave the base of an adapter as it is.

    TRL adds the adapter to the base in place, and subtracts it again. In 16 bits both are rounded, so each sync would
    change the base a little. Under FSDP and for quantized models, TRL's way stays. Under ZeRO-3 it changes copies.
    """
    backend, model = generation._dist, generation.model
    if is_peft_model(model) and not (backend.is_fsdp or backend.is_zero3 or getattr(model, "is_quantized", False)):
        generation._iter_named_params = partial(_merged_params, generation)


def _merged_params(generation: VLLMGeneration) -> Iterator[tuple[str, torch.Tensor]]:
    """The same names and values as TRL's `_iter_named_params`. A tensor is valid until the next one is taken."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    model: Any = generation.model
    layers: dict[int, list[Any]] = defaultdict(list)
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            for weight in layer.get_base_layer().parameters():
                layers[id(weight)].append(layer)  # several: adapters of several weights of one module (`ParamWrapper`)
    for adapted, named in groupby(model.named_parameters(), key=lambda item: layers[id(item[1])]):
        with ExitStack() as merges:
            for layer in adapted:
                merges.enter_context(_merged(layer))
            for key, weight in named:
                name = key.removeprefix("base_model.model.").replace(".base_layer", "")
                if model.prefix in name or "original_module" in name:
                    continue
                yield generation._fix_param_name_to_vllm(name, ["modules_to_save.default."]), weight.data


@contextmanager
def _merged(layer: Any) -> Iterator[None]:
    """A context in which the layer's base has the sums with the adapter, in new tensors."""
    base = [(weight, weight.data) for weight in layer.get_base_layer().parameters()]
    with torch.no_grad():
        layer.merge(safe_merge=True)
    try:
        yield
    finally:
        with torch.no_grad():
            layer.unmerge()
        for weight, data in base:
            weight.data = data
