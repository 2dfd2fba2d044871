import logging
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType, PartialState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers.utils.import_utils import enable_tf32

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.errors import ConfigError
from arpo_trl.rollout.engines.compute_dtype import (
    computed_in,
    largest_rounding,
    training_dtype,
    warn_of_emulation,
    warn_of_lost_steps,
    warn_of_other_dtype,
)
from support import tiny_model, tokenizer

SERVERS = {"http://a:1": "bfloat16", "http://b:1": "float16", "http://c:1": "float16"}


@pytest.fixture(autouse=True)
def state() -> None:
    PartialState(cpu=True)  # which loggers ask for their rank


def accelerator(mixed_precision: str, device: str = "cpu") -> SimpleNamespace:
    return SimpleNamespace(mixed_precision=mixed_precision, device=torch.device(device))


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_autocast_decides_and_without_it_the_weights_do():
    full, half = tiny_model(), tiny_model().to(torch.bfloat16)
    assert training_dtype(full, accelerator("bf16")) == "bfloat16"
    assert training_dtype(full, accelerator("fp16")) == "float16"
    assert training_dtype(full, accelerator("no")) == "float32"
    assert training_dtype(half, accelerator("no")) == "bfloat16"


@pytest.mark.parametrize("on", [True, False])
def test_float32_with_tf32_rounds_like_float16_and_only_on_a_gpu(monkeypatch, on):
    monkeypatch.setattr(torch.backends, "fp32_precision", torch.backends.fp32_precision)  # restored at the end
    enable_tf32(on)  # what `tf32: true` and `torch_compile: true` call
    rounded = {torch.float32, torch.float16} if on else {torch.float32}
    assert computed_in(tiny_model(), torch.device("cuda", 0)) == rounded
    assert computed_in(tiny_model(), torch.device("cpu")) == {torch.float32}
    assert computed_in(tiny_model().to(torch.bfloat16), torch.device("cuda", 0)) == {torch.bfloat16}


def test_the_coarsest_dtype_sets_the_accepted_rounding():
    cpu, model = torch.device("cpu"), tiny_model()
    assert largest_rounding(model, cpu) == largest_rounding(tiny_model().double(), cpu) == 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        assert largest_rounding(model, cpu) == 0.1


@pytest.mark.parametrize(
    ("mixed_precision", "native", "warns"), [("bf16", False, True), ("bf16", True, False), ("no", False, False)]
)
def test_emulated_bf16_on_a_gpu_is_logged_with_the_setting(monkeypatch, caplog, mixed_precision, native, warns):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    warn_of_emulation(tiny_model(), accelerator(mixed_precision, "cuda:0"))
    assert len(said(caplog)) == warns
    if warns:
        assert all(part in caplog.text for part in ("bf16: true is the default", "Tesla T4", "Set fp16: true"))


def test_bf16_on_a_cpu_is_nothing_to_speak_of(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    warn_of_emulation(tiny_model(), accelerator("bf16"))
    assert said(caplog) == []


def test_weights_too_coarse_for_the_steps_are_named_and_do_not_change(tmp_path, caplog):
    model, rows = tiny_model().to(torch.bfloat16), Dataset.from_list([{"prompt": "a b"}] * 4)
    before = [weights.detach().clone() for weights in model.parameters()]
    args = ARPOConfig(
        str(tmp_path),
        num_generations=4,
        per_device_train_batch_size=4,
        max_steps=1,
        max_completion_length=4,
        use_cpu=True,
    )
    trainer = ARPOTrainer(
        model, lambda completions, **_: [0.0, 1.0, 2.0, 3.0], args, rows, processing_class=tokenizer()
    )
    assert [text for text in said(caplog) if "leave at least 9" in text and "dtype='float32'" in text]
    trainer.train()
    changed = [(old != new).float() for old, new in zip(before, model.parameters(), strict=True)]
    assert 0 < torch.cat([weights.flatten() for weights in changed]).mean() < 0.05


@pytest.mark.parametrize(
    ("dtype", "learning_rate", "optim", "distributed", "warns"),
    [
        (torch.bfloat16, 1e-6, "adamw_torch", "NO", True),
        (torch.bfloat16, 1e-6, "adamw_torch", "MULTI_GPU", True),
        (torch.float16, 1e-6, "paged_adamw_8bit", "NO", True),
        (torch.bfloat16, 1e-3, "adamw_torch", "NO", False),
        (torch.float32, 1e-6, "adamw_torch", "NO", False),
        (torch.bfloat16, 1e-6, "adafactor", "NO", True),
        (torch.bfloat16, 1e-6, "lion_32bit", "NO", True),
        (torch.bfloat16, 1e-6, "sgd", "NO", False),
        (torch.bfloat16, 1e-6, "adamw_torch", "DEEPSPEED", False),
        (torch.bfloat16, 1e-6, "adamw_torch", "FSDP", False),
        (torch.bfloat16, 1e-6, "adamw_torch", "FSDP no", True),  # accelerate makes float32 copies for bf16 and fp16
    ],
)
def test_steps_that_rounding_undoes_are_a_warning(caplog, dtype, learning_rate, optim, distributed, warns):
    kind, _, precision = distributed.partition(" ")
    state = SimpleNamespace(distributed_type=DistributedType[kind], mixed_precision=precision or "bf16")
    args = SimpleNamespace(learning_rate=learning_rate, optim=optim)
    warn_of_lost_steps(tiny_model().to(dtype), state, args)
    assert len(said(caplog)) == warns


@pytest.mark.parametrize(
    ("is_new", "dtype", "warns"), [(False, "bfloat16", 1), (True, "bfloat16", 0), (False, "float32", 0)]
)
def test_steps_that_rounding_undoes_are_a_warning_for_an_adapter_whose_training_goes_on(caplog, is_new, dtype, warns):
    # "down_proj" has more inputs than outputs: most weights of a new adapter, in its first matrices, are too coarse.
    settings = LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=is_new)
    model = get_peft_model(tiny_model(), settings).to(getattr(torch, dtype))
    state = SimpleNamespace(distributed_type=DistributedType.NO)
    warn_of_lost_steps(model, state, SimpleNamespace(learning_rate=1e-6, optim="adamw_torch"))
    assert [text.endswith("Raise learning_rate.") for text in said(caplog)] == [True] * warns


def test_unsupported_bf16_is_an_error_that_names_the_setting(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(ConfigError, match=r"bf16.*use_cpu"):
        ARPOConfig(str(tmp_path))


def test_one_precision_is_nothing_to_speak_of(caplog):
    warn_of_other_dtype(tiny_model(), accelerator("bf16"), {"vLLM": "bfloat16"}, "change it")
    assert said(caplog) == []


def test_fp16_with_vllm_in_another_dtype_names_both_settings(caplog):
    warn_of_other_dtype(tiny_model(), accelerator("fp16"), SERVERS, "start the server with --dtype {dtype}")
    (line,) = said(caplog)
    assert "Training computes in float16, but http://a:1 in bfloat16" in line
    assert line.endswith("Set bf16: true for the trainer, or start the server with --dtype float16.")


def test_each_different_dtype_is_logged_once_with_all_its_engines(caplog):
    warn_of_other_dtype(tiny_model(), accelerator("no"), SERVERS, "start the server with --dtype {dtype}")
    bfloat16, float16 = said(caplog)
    assert "in float32, but http://a:1 in bfloat16" in bfloat16
    assert "in float32, but http://b:1, http://c:1 in float16" in float16 and "Set fp16: true" in float16
