"""Sampling and training use the same distribution in every precision."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from arpo_trl.training.trainer import ARPOTrainer
from support import sampling_trainer, small_model, unlike_scored

ROWS = Dataset.from_list(
    [{"prompt": [{"role": "user", "content": "the melting point " * i}], "answer": ["1"]} for i in range(2, 4)]
)
LAYOUTS = {
    "qwen3": lambda: small_model(Qwen3Config, Qwen3ForCausalLM, head_dim=16),
    "qwen2": lambda: small_model(Qwen2Config, Qwen2ForCausalLM),
    "llama": lambda: small_model(LlamaConfig, LlamaForCausalLM),
}
BFLOAT16, FLOAT32 = 0.02, 1e-4  # the most mean |difference|, in nats; the former for float16 as well
PRECISIONS = {
    "by default": ({}, torch.float32, BFLOAT16),  # bf16 autocast over float32 weights
    "bfloat16 weights": ({}, torch.bfloat16, BFLOAT16),
    "bfloat16 weights without autocast": ({"bf16": False}, torch.bfloat16, BFLOAT16),
    "float16 weights without autocast": ({"bf16": False}, torch.float16, BFLOAT16),
    "float32": ({"bf16": False}, torch.float32, FLOAT32),
}


def sharp(layout: str, dtype: torch.dtype):
    """Of that layout and type, with logits that spread over several nats."""
    model = LAYOUTS[layout]()
    with torch.no_grad():
        model.model.norm.weight.mul_(5)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(2)
    return model.to(dtype)


def adapted(made: ARPOTrainer) -> ARPOTrainer:
    """With an adapter that changes something: a new one's second matrix is zero."""
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_sampled_is_what_is_scored_packed_and_padded(layout, precision, lora, tmp_path):
    settings, dtype, most = PRECISIONS[precision]
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if lora else None
    made = adapted(sampling_trainer(sharp(layout, dtype), tmp_path, ROWS, peft_config=adapter, **settings))
    assert made._shares_prefixes
    assert unlike_scored(made).mean() < most
    made._shares_prefixes = False
    assert unlike_scored(made).mean() < most


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_update_packed_or_padded_is_under_the_autocast_that_sampling_is_under(attention, tmp_path):
    """By default the head's product is rounded to bfloat16, and a float32 model's is not."""
    kinds = set()
    model = sharp("qwen3", torch.float32)
    model.set_attn_implementation(attention)
    made = sampling_trainer(model, tmp_path, ROWS)
    hook = made.model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: kinds.add(output.dtype))
    packs = made._shares_prefixes
    assert packs == (attention == "sdpa")
    assert unlike_scored(made).mean() < BFLOAT16
    made._shares_prefixes = False
    assert unlike_scored(made).mean() < BFLOAT16
    hook.remove()
    assert kinds == {torch.bfloat16}


def test_a_run_with_the_defaults_trains_one_step(tmp_path):
    made = sampling_trainer(sharp("qwen3", torch.float32), tmp_path, ROWS, max_steps=1, learning_rate=1e-3)
    assert made.args.bf16 and made.args.gradient_checkpointing
    before = made.model.lm_head.weight.detach().clone()
    made.reward_funcs[0] = lambda completions, **_: [float(i % 3) for i in range(len(completions))]
    made.train()
    assert not torch.equal(made.model.lm_head.weight, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "settings", [{}, {"bf16": False, "fp16": True}, {"bf16": False}], ids=["bf16", "fp16", "fp32"]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sampling_and_scoring_distributions_are_equal_on_a_gpu(layout, settings, tmp_path):
    made = sampling_trainer(sharp(layout, torch.float32), tmp_path, ROWS, use_cpu=False, **settings)
    most = BFLOAT16 if made.args.bf16 or made.args.fp16 else FLOAT32
    assert unlike_scored(made).mean() < most
