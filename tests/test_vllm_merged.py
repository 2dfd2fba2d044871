"""An adapter's weights for vLLM are TRL's, and sending them does not change the base, which TRL's way does."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from arpo_trl.rollout.engines.vllm.merged import keep_base
from arpo_trl.trl_seam import VLLMGeneration
from support import small_model, tiny_model, tokenizer


class Unconnected(VLLMGeneration):
    def _init_vllm(self):
        pass


def sent(generation):
    """A copy of all names and weights that vLLM would get."""
    return {name: weight.clone() for name, weight in generation._iter_named_params()}


def adapted(**settings):
    experts = "target_parameters" in settings
    base = small_model(Qwen3MoeConfig, Qwen3MoeForCausalLM, **EXPERTS) if experts else tiny_model()
    torch.manual_seed(0)
    settings = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False} | settings
    model = get_peft_model(base.to(torch.bfloat16), LoraConfig(r=2, **settings), autocast_adapter_dtype=False)
    return model, Unconnected(model, Accelerator(cpu=True), tokenizer(), mode="server")


def changed(model, before):
    return [name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])]


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 16}
SETTINGS = [
    {},
    {"use_dora": True},
    {"modules_to_save": ["norm"]},
    {"target_modules": ["embed_tokens", "v_proj"]},
    {"target_modules": "all-linear"},
    {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: " ".join(map(str, settings.values())) or "plain")
def test_vllm_gets_trls_weights_and_the_base_stays_as_it_is_bit_for_bit(settings):
    model, generation = adapted(**settings)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    keep_base(generation)
    given = sent(generation)
    for _ in range(3):
        sent(generation)
    assert changed(model, before) == []

    model, theirs = adapted(**settings)
    expected = sent(theirs)
    assert list(given) == list(expected)
    for name, weight in given.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0)
    for _ in range(3):
        sent(theirs)
    assert changed(model, before), "TRL's own way changes no base any more, so keep_base is not needed"


def test_a_transfer_that_fails_midway_leaves_the_base_as_it_was():
    model, generation = adapted()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    keep_base(generation)
    named = generation._iter_named_params()
    for name, _ in named:
        if "q_proj" in name:
            break
    assert changed(model, before)
    named.close()
    assert changed(model, before) == []
    assert not any(module.merged for module in model.modules() if hasattr(module, "merged_adapters"))


def test_a_model_without_an_adapter_is_sent_as_trl_does():
    generation = Unconnected(tiny_model(), Accelerator(cpu=True), tokenizer(), mode="server")
    own = generation._iter_named_params.__func__
    keep_base(generation)
    assert generation._iter_named_params.__func__ is own
