"""Attributes that GRPO reads before each generation are fixed here; a change is an error, not a silent mismatch."""

import pytest
from datasets import Dataset
from transformers import TrainerCallback

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.errors import ConfigError
from support import ON_CPU, save_tiny_model

ROWS = Dataset.from_list([{"prompt": "what is the answer"}] * 4)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("temperature", 0.5, r"trainer\.temperature was changed from 1\.0 to 0\.5, but sampling keeps"),
        ("max_completion_length", 4, r"trainer\.max_completion_length was changed from 8 to 4"),
        (
            "generation_config.temperature",
            0.5,
            r"trainer\.generation_config\.temperature was changed from 1\.0 to 0\.5",
        ),
    ],
)
def test_a_callback_that_changes_how_completions_are_sampled_gets_an_error(
    attribute, value, message, model_path, tmp_path
):
    class Anneals(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            *owner, name = attribute.split(".")
            setattr(getattr(trainer, owner[0]) if owner else trainer, name, value)

    args = ARPOConfig(
        str(tmp_path),
        num_generations=4,
        per_device_train_batch_size=4,
        max_completion_length=8,
        max_steps=2,
        **ON_CPU,
    )
    trainer = ARPOTrainer(model_path, lambda completions: [0.0, 1.0] * 2, args, ROWS, callbacks=[Anneals()])
    with pytest.raises(ConfigError, match=message):
        trainer.train()
    assert trainer.state.global_step == 1
