"""The cases of tests/test_qlora.py, for a process that finds bitsandbytes."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from arpo_trl.runs.identity import frozen_weights
from shipped import check, replaced, run
from support import ANSWER, save_sharp_model, save_tiny_model
from test_shipped import QUANTIZED, data, models  # noqa: F401
from test_trainer import quantized


@pytest.fixture(autouse=True)
def without_packing(monkeypatch) -> None:
    """As on a CPU without AVX512-BF16: bitsandbytes packs weights for inference where it finds it."""
    for module in ("functional", "nn.modules"):
        monkeypatch.setattr(f"bitsandbytes.{module}.has_avx512bf16", lambda: False)


def test_the_settings_for_qlora_train(models, data, tmp_path):  # noqa: F811
    run(QUANTIZED, *replaced(QUANTIZED, models, data, tmp_path))
    check(QUANTIZED, tmp_path)


def test_a_cold_start_trains_an_adapter_on_quantized_weights(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("arpo_trl.scripts.sft.show_compactly", seen.append)
    demonstration = [{"role": "user", "content": "what is iron"}, {"role": "assistant", "content": ANSWER}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": demonstration}) + "\n", "utf-8")
    model = save_tiny_model(tmp_path / "model")
    quantized = ["--load_in_4bit", "true", "--use_peft", "true", "--lora_target_modules", "all-linear"]
    paths = ["--dataset", str(tmp_path / "rows.jsonl"), "--model_name_or_path", model]
    words = [*paths, *quantized, "--output_dir", str(tmp_path / "sft"), "--max_steps", "1"]
    run("quickstart_sft.yaml", *words, name="sft")
    (trainer,) = seen
    assert "Linear4bit" in {type(module).__name__ for module in trainer.model.modules()}
    assert (tmp_path / "sft" / "adapter_model.safetensors").exists()


def test_a_checkpoint_knows_its_quantized_base(tmp_path):
    path = save_tiny_model(tmp_path / "model")
    other = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():  # as after merging an adapter: embeddings and norms stay
        other.get_submodule("model.layers.0.self_attn.q_proj").weight.neg_()
    other.save_pretrained(tmp_path / "other")
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}

    def digest(folder=path, **settings):
        config = BitsAndBytesConfig(**settings)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
        return frozen_weights(get_peft_model(model, LoraConfig(target_modules=["v_proj"])))

    assert digest(**four) == digest(**four)
    others = [
        digest(tmp_path / "other", **four),
        digest(**four | {"bnb_4bit_quant_type": "fp4"}),
        digest(**four | {"bnb_4bit_use_double_quant": False}),
        digest(load_in_8bit=True),
        digest(tmp_path / "other", load_in_8bit=True),
    ]
    assert len({digest(**four), *others}) == 6


def test_qlora_trains_the_adapter_on_quantized_weights(tmp_path):
    path = save_sharp_model(tmp_path / "model")
    adapter = LoraConfig(r=4, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    made = quantized(path, tmp_path / "run", adapter, save_strategy="steps")
    kinds = {type(module).__name__ for module in made.model.modules()}
    assert "Linear4bit" in kinds
    made.train()
    assert made.state.log_history[0]["grad_norm"] > 0
    assert made.state.log_history[0]["arpo/update/sharing_ratio"] > 1
    made.save_model()
    again = quantized(path, tmp_path / "run", adapter, max_steps=3)
    again.train(resume_from_checkpoint=True)
    dtypes = [
        {name: value.dtype for name, value in of.model.named_parameters() if value.requires_grad}
        for of in (made, again)
    ]
    assert dtypes[0] == dtypes[1] and set(dtypes[0].values()) == {torch.bfloat16}
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), str(tmp_path / "run"))
    trained = {name: value for name, value in made.model.named_parameters() if "lora_" in name}
    for name, value in loaded.named_parameters():
        if "lora_" in name:
            assert torch.equal(value, trained[name].float().cpu())
