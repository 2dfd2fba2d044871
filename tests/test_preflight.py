import logging
import re
from itertools import repeat

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.errors import ConfigError
from arpo_trl.rollout.protocols import ChatTemplateProtocol
from arpo_trl.tools.spec import tool_spec
from arpo_trl.training.row_checks import _check_prompts_fit
from support import ON_CPU, python, save_tiny_model, search, tiny_model, tokenizer, with_template

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


@pytest.mark.parametrize("first", [10, 400], ids=["short", "long"])
def test_a_long_conversation_is_not_encoded_if_the_template_and_its_bytes_fit(monkeypatch, first):
    protocol = ChatTemplateProtocol(
        with_template("qwen3"), {tool.__name__: tool_spec(tool) for tool in (search, python)}
    )
    encode, encoded = protocol.encode_prompt, []
    monkeypatch.setattr(protocol, "encode_prompt", lambda prompt: encoded.append(prompt) or encode(prompt))

    def talk(words: int, messages: int = 11) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[i % 2], "content": "x " * words} for i in range(messages)]

    room = len(encode(talk(10))) + sum(len(str(message)) for message in talk(10)) + 1
    rows = [{"prompt": talk(first)}, *[{"prompt": talk(10)}] * 30, *[{"prompt": talk(10, 9)}] * 30]
    context = max(room, len(encode(talk(first))) + 1)
    _check_prompts_fit(Dataset.from_list(rows), lambda _: repeat(protocol), context, "")
    # The first of each number of messages. After a long one, one more, whose template's share is known better.
    assert len(encoded) == (2 if first == 10 else 3)
    rows.append({"prompt": talk(first * 9)})
    with pytest.raises(ConfigError, match=r"row 61: its prompt has \d+ tokens, but the context is"):
        _check_prompts_fit(Dataset.from_list(rows), lambda _: repeat(protocol), context, "")


@pytest.fixture
def make(tmp_path):
    """A function that makes a trainer of `model`, with `given` as arguments and `settings` of the run."""

    def made(model, given=None, **settings) -> ARPOTrainer:
        few = {"num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 4, "max_steps": 2}
        args = ARPOConfig(str(tmp_path / "run"), **{**few, **ON_CPU, "save_strategy": "no", **settings})
        rows = Dataset.from_list([{"prompt": "a b"}] * 4)
        given = {"processing_class": tokenizer(), **(given or {})}
        return ARPOTrainer(model, lambda completions: [0.0, 1.0, 2.0, 3.0], args, rows, **given)

    return made


@pytest.fixture
def told(caplog):
    """A function that returns the warnings of the checks so far, and forgets them."""

    def warnings() -> list[str]:
        found = [each for each in caplog.records if each.name == "arpo_trl.training.preflight"]
        caplog.clear()
        return [each.getMessage() for each in found if each.levelno == logging.WARNING]

    return warnings


def adam(weights) -> tuple[torch.optim.Optimizer, None]:
    return torch.optim.AdamW(weights, lr=1e-2), None


def test_an_optimizer_without_the_trained_weights_is_an_error(make):
    base = tiny_model()
    for model, weights, given in (
        (base, base.parameters(), {"peft_config": LORA}),
        (tiny_model(), tiny_model().parameters(), {}),
    ):
        with pytest.raises(ConfigError, match="The optimizer in optimizers has none of the trained weights, so that"):
            make(model, {"optimizers": adam(weights), **given})


def test_an_optimizer_with_a_part_of_the_trained_weights_is_a_warning_with_the_share(make, told):
    model = tiny_model()
    make(model, {"optimizers": adam(model.parameters())})
    make(adapted := get_peft_model(tiny_model(), LORA), {"optimizers": adam(adapted.parameters())})
    assert told() == []
    kept = model.get_input_embeddings().weight
    share = 1 - kept.numel() / sum(weight.numel() for weight in model.parameters())
    make(model, {"optimizers": adam([kept])})
    (warning,) = told()
    assert f"does not have {share:.1%} of the weights that require gradients" in warning


def test_an_adapter_that_is_not_active_is_not_trained(make):
    model = get_peft_model(tiny_model(), LORA)
    model.add_adapter("new", LORA)
    for name, weight in model.named_parameters():
        weight.requires_grad_(".new." in name)
    trainer = make(model)
    with pytest.raises(
        ConfigError, match=r"are frozen .* or activate \(set_adapter\) another adapter than \['default'\]"
    ):
        trainer.train()
    model.set_adapter("new")
    trainer.train()


def test_a_model_most_of_whose_weights_are_frozen_is_a_warning_with_the_share(make, told):
    settings = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    model = get_peft_model(tiny_model(), settings).merge_and_unload()
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert 0 < (share := trained / sum(weight.numel() for weight in model.parameters())) < 0.5
    make(model).train()
    (warning,) = told()
    assert f"Only {share:.1%} of the model's weights are trained, such as model.embed_tokens.weight." in warning
    make(model.requires_grad_()).train()
    make(tiny_model(), {"peft_config": LORA}).train()
    assert told() == []


def test_a_reference_that_is_another_model_than_the_trained_one_is_a_warning(make, told, tmp_path):
    path = save_tiny_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(path)
    make(path, beta=0.1)
    make(model, beta=0.1)
    model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    make(model, beta=0.1)
    merged = get_peft_model(AutoModelForCausalLM.from_pretrained(path), LORA).merge_and_unload().requires_grad_()
    make(merged)
    assert told() == []
    make(merged, beta=0.1)
    (warning,) = told()
    assert (
        f"The reference model of beta, loaded from '{path}', is another model than the one that is trained" in warning
    )
    merged.save_pretrained(tmp_path / "merged")
    make(str(tmp_path / "merged"), beta=0.1)
    assert told() == []


@pytest.mark.parametrize(
    ("settings", "warning"),
    [
        ({"warmup_steps": 500}, "warmup_steps is 500, but the run has 2 .* rises to at most 0.2% of learning_rate"),
        ({"warmup_steps": 0.1, "max_steps": 1}, "warmup_steps is 0.1, but the run has 1 .* rises to at most 0.0% of"),
        ({"learning_rate": 0.0}, "learning_rate is 0, so that the weights do not change"),
        ({"warmup_steps": 0.5}, None),
        ({"warmup_steps": 500, "lr_scheduler_type": "constant"}, None),
        ({"lr_scheduler_type": "cosine"}, None),
    ],
)
def test_a_learning_rate_that_stays_about_0_is_a_warning(make, told, settings, warning):
    trainer = make(tiny_model(), **settings)
    trainer.create_optimizer_and_scheduler(trainer.args.max_steps)
    found = told()
    assert len(found) == (warning is not None)
    assert warning is None or re.search(warning, found[0])
