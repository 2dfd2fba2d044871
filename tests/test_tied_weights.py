"""A resumed run of a model with tied weights does not warn that one of their names is missing."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

from arpo_trl.runs.tied_weights import without_tied_keys
from arpo_trl.scripts.sft import ColdStartTrainer
from resuming import make_trainer
from support import small_model, tokenizer

HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"


@pytest.mark.parametrize(
    ("tied", "left_out", "missing"),
    [
        (True, [HEAD], []),
        (True, [HEAD, EMBEDDING], [EMBEDDING, HEAD]),
        (True, [HEAD, NORM], [NORM]),
        (False, [HEAD], [HEAD]),
    ],
)
def test_only_a_tensor_that_was_loaded_by_no_name_is_missing(
    tied: bool, left_out: list[str], missing: list[str]
) -> None:
    model = small_model(Qwen3Config, Qwen3ForCausalLM, tie_word_embeddings=tied)
    weights = {name: value for name, value in model.state_dict().items() if name not in left_out}
    loaded = model.load_state_dict(weights, strict=False)
    assert set(loaded.missing_keys) == set(left_out)
    found = without_tied_keys(model, loaded)
    assert sorted(found.missing_keys) == sorted(missing)
    assert found.unexpected_keys == []


@pytest.mark.slow
def test_a_resumed_run_does_not_warn_of_tied_weights_and_warns_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    model = small_model(Qwen3Config, Qwen3ForCausalLM, tie_word_embeddings=True, head_dim=16)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    warned: list[str] = []
    monkeypatch.setattr(logging.getLogger("transformers.trainer"), "warning", lambda text, *_: warned.append(text))
    make_trainer(str(folder), tmp_path / "run", max_steps=1).train()
    trainer = make_trainer(str(folder), tmp_path / "run", max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2
    assert warned == []
    cold_start = ColdStartTrainer.__new__(ColdStartTrainer)
    cold_start.model = model
    weights = {name: value for name, value in model.state_dict().items() if name not in (HEAD, NORM)}
    loaded = model.load_state_dict(weights, strict=False)
    for each in (trainer, cold_start):
        each._issue_warnings_after_load(loaded)
    assert len(warned) == 2 and all(NORM in text and HEAD not in text for text in warned)
