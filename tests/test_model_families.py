"""Tiny random models of each family, in float32 through the trainer: sampling and scoring agree, or it raises."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoConfig, AutoModelForCausalLM

from arpo_trl import ARPOTrainer
from arpo_trl.errors import ConfigError
from arpo_trl.rollout.build import local_engine
from arpo_trl.rollout.engines.base import SamplingParams
from support import sampling_trainer, small_settings, tokenizer, unlike_scored

WINDOW = 8
"""Shorter than any prompt here, so that a window that is ignored shows."""
ROWS = Dataset.from_list(
    [{"prompt": [{"role": "user", "content": "the melting point " * i}], "answer": ["1"]} for i in range(2, 4)]
)
MLA = {
    **{"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "v_head_dim": 12, "first_k_dense_replace": 1},
    **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "n_routed_experts": 4, "moe_intermediate_size": 16},
    **{"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
}
WINDOWED = {"sliding_window": WINDOW, "num_hidden_layers": 4}
LATER_LAYERS = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024}
SAMPLED = {
    "llama": {},
    "qwen2": {},
    "qwen2, windows in later layers": LATER_LAYERS,
    "qwen3": {"head_dim": 8},
    "qwen3, windows in later layers": {"head_dim": 8, **LATER_LAYERS},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"sliding_window": WINDOW, "num_local_experts": 2},
    "phi3": {"sliding_window": WINDOW},
    "starcoder2": {"sliding_window": WINDOW},
    "gemma2": {"head_dim": 8, **WINDOWED},
    "gemma3_text": {"head_dim": 8, **WINDOWED, "num_hidden_layers": 6},
    "cohere": {},
    "cohere2": WINDOWED,
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "sliding_window": WINDOW},
    "olmo3": WINDOWED,
    "exaone4": WINDOWED,
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "gpt_neox": {},
    "gptj": GPT | {"rotary_dim": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "falcon": {"num_kv_heads": 4},
}
REFUSED = {
    "bloom": ({"n_head": 4, "n_layer": 2}, "no position_ids"),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2}, "no position_ids"),
    "falcon, alibi": ({"alibi": True}, "no position_ids"),
    "mamba": ({"state_size": 8}, "recurrent state"),
    "mamba2": ({"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1}, "recurrent state"),
    "jamba": ({}, "recurrent state"),
    "minimax": ({"head_dim": 8, "num_local_experts": 2}, r"layers of type \['linear_attention'\]"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, r"layers of type \['conv'\]"),
    "gpt_neo": (
        {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4, "window_size": WINDOW},
        "local attention",
    ),
    "gpt2": (GPT, "counts the padding before a prompt"),
}


def model_of(family: str, settings: dict, sharpness: float = 3.0):
    config = AutoConfig.for_model(
        family.partition(",")[0],
        **{**small_settings(), "num_attention_heads": 4, "num_key_value_heads": 2, **settings},
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(sharpness)  # so that what attention does can be seen in the logits
    return model


def trainer_of(model, folder, **settings) -> ARPOTrainer:
    return sampling_trainer(model, folder, ROWS, bf16=False, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("family", SAMPLED)
def test_what_is_sampled_is_what_is_scored(family, tmp_path):
    assert unlike_scored(trainer_of(model_of(family, SAMPLED[family]), tmp_path)).max() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("family", SAMPLED)
def test_in_the_default_precision_sampling_and_scoring_differ_by_rounding(family, tmp_path):
    made = sampling_trainer(model_of(family, SAMPLED[family], sharpness=2.0), tmp_path, ROWS)
    assert made.args.bf16
    assert unlike_scored(made).mean() < 0.02


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_cannot_be_sampled_from_is_refused_at_construction_with_the_reason(family, tmp_path):
    settings, reason = REFUSED[family]
    name = family.partition(",")[0]
    with pytest.raises(ConfigError, match=f"[Tt]he transformers engine .*sampl.*type '{name}'.*{reason}"):
        trainer_of(model_of(family, settings), tmp_path)


def test_a_model_whose_head_has_several_layers_is_refused_at_construction(tmp_path):
    """TRL's fused head skips all of them but the last."""
    model = model_of("modernbert-decoder", {"bos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1})
    with pytest.raises(ConfigError, match=r"'modernbert-decoder': its logprobs from TRL's fused head are .* away"):
        trainer_of(model, tmp_path)


def test_an_adapter_that_puts_tokens_before_the_prompt_is_refused_at_construction(tmp_path):
    adapter = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ConfigError, match=r"'llama': its adapter puts virtual tokens before the prompt"):
        trainer_of(model_of("llama", {}), tmp_path, peft_config=adapter)


def test_an_adapter_that_is_active_after_certain_tokens_is_refused_at_construction(tmp_path):
    adapter = LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6])
    with pytest.raises(ConfigError, match=r"'llama': its adapter is active only after certain tokens"):
        trainer_of(model_of("llama", {}), tmp_path, peft_config=adapter)


def test_a_model_whose_forward_accepts_no_mask_per_row_is_rejected_with_its_own_error(tmp_path):
    """Chunks of keys that the model counts by itself, under a name that nobody here knows."""
    model = model_of("llama", {})
    attend = model.model.layers[0].self_attn.forward

    def forward(*args, attention_mask, **kwargs):
        if attention_mask is not None and attention_mask.size(0) > 1:
            raise NotImplementedError("one row at a time, please")
        return attend(*args, attention_mask=attention_mask, **kwargs)

    model.model.layers[0].self_attn.forward = forward
    with pytest.raises(ConfigError, match=r"'llama'.* failed \(NotImplementedError: one row at a time, please\)"):
        trainer_of(model, tmp_path)


def test_a_model_that_ignores_its_positions_is_refused_with_the_figures(tmp_path):
    model = model_of("llama", {})
    rotary = model.model.rotary_emb.forward
    # Angles of an arange, whatever the positions: right in a plain forward, wrong for a token by itself.
    model.model.rotary_emb.forward = lambda x, position_ids: rotary(
        x, torch.arange(position_ids.size(1)).expand_as(position_ids)
    )
    with pytest.raises(
        ConfigError, match=r"'llama': its logits, .* are \d.* standard deviations away .*at most 0.001"
    ):
        trainer_of(model, tmp_path)


def test_a_model_with_broken_weights_is_named_as_such(tmp_path):
    model = model_of("llama", {})
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    message = r"'llama' are not finite: its weights are broken, or its dtype \(float32\)"
    with pytest.raises(ConfigError, match=message):
        trainer_of(model, tmp_path)
    with pytest.raises(ConfigError, match=message):
        local_engine(model, tokenizer(), SamplingParams(eos_ids=(1,)))


def test_paths_end_before_the_rotary_embedding_would_change(tmp_path, caplog):
    factors = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    model = model_of("phi3", {"rope_parameters": factors, "original_max_position_embeddings": 64})
    made = trainer_of(model, tmp_path, max_completion_length=None)
    assert made.tree_sampler.settings.max_length == 64
    unscored = local_engine(model, tokenizer(), SamplingParams(eos_ids=(1,)))
    assert unscored.max_length == model.config.max_position_embeddings > 64
    assert "Paths are limited to 64 tokens." in caplog.text
    assert unlike_scored(made).max() < 1e-3


@pytest.mark.parametrize("way", ["auto", "off"])
def test_padding_beyond_the_context_of_a_dynamic_rotary_embedding_is_avoided_or_warned_of(tmp_path, caplog, way):
    factors = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = model_of("llama", {"rope_parameters": factors, "max_position_embeddings": 64})
    made = trainer_of(model, tmp_path, max_completion_length=None, shared_prefix_forward=way)
    assert made.tree_sampler.settings.max_length == 64
    assert "Paths are limited to 64 tokens." in caplog.text
    assert ("In training, padding counts towards this limit" in caplog.text) == (way == "off")
    if way == "auto":
        assert unlike_scored(made).max() < 1e-3
