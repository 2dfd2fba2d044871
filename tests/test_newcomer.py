"""Mistakes that newcomers make with `train.py` end in one line that names the way out, without a traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from arpo_trl.common.pretrained import load_pretrained
from arpo_trl.errors import ConfigError
from arpo_trl.scripts.start import start_errors
from arpo_trl.training.prefix_sharing import pack_rows
from support import save_tiny_model, script


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def checkpoints(model, tmp_path_factory) -> Path:
    """A run's folder without a finished model."""
    folder = tmp_path_factory.mktemp("run")
    for step in (2, 10):
        shutil.copytree(model, folder / f"checkpoint-{step}")
    return folder


@pytest.fixture
def train(model, tmp_path, monkeypatch, capsys):
    """`train(…)` runs `train.py` with small settings and these changes; returns its exit status and last line."""

    def ran(**changes) -> tuple[object, str]:
        questions = tmp_path / "questions.jsonl"
        questions.write_text(json.dumps({"question": "What is 1 + 1?", "answer": "2", "task": "math"}), "utf-8")
        settings = {
            "model_name_or_path": model,
            "dataset": str(questions),
            "output_dir": str(tmp_path / "run"),
            "num_generations": 2,
            "per_device_train_batch_size": 2,
            "max_completion_length": 16,
            "max_steps": 1,
            "tools": ["python"],
            **changes,
        }
        config = tmp_path / "config.yaml"
        config.write_text(json.dumps(settings), "utf-8")  # JSON is YAML
        monkeypatch.setattr("sys.argv", ["train.py", "--config", str(config)])
        with pytest.raises(SystemExit) as ended:
            script("train").main()
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return ended.value.code, said.strip().splitlines()[-1]

    return ran


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"num_generations": "eight"}, "num_generations is 'eight'; expected an integer."),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'; expected a number."),
        ({"num_generation": 2}, "There is no setting 'num_generation'; did you mean 'num_generations'?"),
        ({"bf16": "maybe"}, "bf16: Truthy value expected: got maybe"),
        ({"loss_type": "grpoo"}, "loss_type is 'grpoo'; expected one of ['grpo', "),
        ({"tools": "search"}, "tools is 'search'; expected a list of some of ['search', "),
        ({"tools": ["serch"]}, "tools is ['serch']; expected a list of some of ['search', "),
        ({"optim": "adamm"}, "adamm is not a valid OptimizerNames"),
        ({"per_device_train_batch_size": 3}, "num_generations (2) does not divide this rank's generation batch (3"),
        ({"initial_rollouts": 5}, "initial_rollouts (N) is 5 but num_generations (M) is 2"),
        ({"tools": ["search"]}, "The search tool has search_provider=None"),
        ({"dataset": "missing.jsonl"}, "The file or folder missing.jsonl does not exist"),
        ({"deepspeed": "missing.json"}, "deepspeed is 'missing.json', but there is no such file."),
        ({"model_name_or_path": None}, "model_name_or_path is not set"),
    ],
    ids=str,
)
def test_a_mistake_in_the_settings_ends_in_one_line(train, changes, line):
    code, last = train(**changes)
    assert code == 2
    assert line in last


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"report_to": "wandbb"}, "Training cannot start. transformers says: wandbb is not supported, only azure_ml"),
        ({"report_to": "comet_ml"}, "CometCallback requires comet-ml"),
        ({"eval_strategy": "steps"}, "you didn't pass an `eval_dataset`"),
        ({"dtype": "float99"}, "Invalid `dtype` passed to the config."),
        ({"use_peft": True, "lora_target_modules": ["nope"]}, "Target modules nope not found in the base model"),
        ({"attn_implementation": "flash_attention_9"}, "flash_attention_9"),
    ],
    ids=str,
)
def test_a_mistake_that_another_package_finds_ends_in_one_line(train, changes, line):
    code, last = train(**changes)
    assert code == 2
    assert line in last


def test_a_wrong_path_or_name_of_a_model_is_told(train, checkpoints):
    assert train(model_name_or_path="./missing") == (
        2,
        "ConfigError: The tokenizer of './missing' cannot be loaded: there is no such folder. Check the path.",
    )
    _, line = train(model_name_or_path="nobody/none")
    assert line.startswith(
        "ConfigError: The tokenizer of 'nobody/none' cannot be loaded: there is no such folder, and the Hub does not "
        "provide it ("
    )
    _, line = train(model_name_or_path=str(checkpoints))  # 10 is newer than 2, although it sorts before it
    assert line.endswith(
        "the folder has checkpoints, but no finished model. Give the newest checkpoint: "
        f"{checkpoints / 'checkpoint-10'}."
    )


def test_a_folder_without_a_model_is_told(tmp_path):
    def load(name: str) -> None:
        raise OSError("no file\nnamed config.json")

    with pytest.raises(ConfigError) as raised:
        load_pretrained("configuration", str(tmp_path), load)
    assert str(raised.value) == (
        f"The configuration of {str(tmp_path)!r} cannot be loaded: OSError: no file named config.json. Expected a "
        "folder that save_pretrained wrote, or a Hub id."
    )


def test_an_error_that_this_packages_own_code_raises_by_accident_keeps_its_traceback(monkeypatch):
    with pytest.raises(ValueError, match="A row has no token") as raised, start_errors():
        pack_rows(torch.ones(1, 2), torch.zeros(1, 2), 1)
    assert not isinstance(raised.value, ConfigError)


def test_a_variable_keeps_the_traceback_of_other_errors(monkeypatch):
    with pytest.raises(ConfigError, match="Training cannot start"), start_errors():
        json.loads("{")
    monkeypatch.setenv("ARPO_TRACEBACK", "1")
    with pytest.raises(json.JSONDecodeError), start_errors():
        json.loads("{")
