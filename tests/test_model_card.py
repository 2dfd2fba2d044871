import dataclasses
import json

import pytest
import torch
import yaml

from arpo_trl import ARPOConfig, __version__
from arpo_trl.command_line import parse_settings
from arpo_trl.common.run_files import TRAINING_CONFIG
from arpo_trl.logs.curves import PANELS
from arpo_trl.publishing import model_card
from arpo_trl.publishing.model_card import (
    Card,
    as_path,
    describe,
    draw_curves,
    is_hub_id,
)

HISTORY = [
    {"step": step, "reward": 0.1 * step, "arpo/accuracy": 0.2, "arpo/tree/branches": 2.0, "loss": 0.0}
    for step in (1, 2, 3)
]


def card(**changes) -> Card:
    settings = {"num_generations": 8, "tools": ["search"], "dataset": "someone/questions", "learning_rate": 1e-5}
    made = Card(
        repo_id="me/policy",
        settings=settings,
        history=HISTORY,
        base_model="Qwen/Qwen2.5-3B-Instruct",
        is_adapter=False,
    )
    return dataclasses.replace(made, **changes)


def metadata(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_a_card_has_the_metadata_and_the_sections(tmp_path):
    card().write(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert metadata(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "Qwen/Qwen2.5-3B-Instruct",
        "base_model_relation": "finetune",
        "datasets": ["someone/questions"],
        "tags": ["arpo-trl", "arpo", "trl", "reinforcement-learning", "agent", "tool-use"],
    }
    assert f"`arpo-trl` {__version__} on\n[someone/questions](https://" in text and "), 3 steps." in text
    assert "arpo-trl eval --model me/policy --data" in text
    assert "| leaves per prompt (M) | 8 |" in text
    assert "| τ | 0.5 |" in text  # a default counts as well
    assert "| tools | search |" in text
    assert "LoRA" not in text and "## Evaluation" not in text
    assert "```yaml\nnum_generations: 8\n" in text
    assert "eprint = {arXiv:2507.19849}" in text and "title  = {{Agentic" in text
    assert "![Reward and accuracy](curves/reward.png)" in text
    assert sorted(path.name for path in (tmp_path / "curves").iterdir()) == ["reward.png", "sharing.png"]
    assert "entropy.png" not in text  # nothing was logged for it


def test_a_card_is_the_same_from_the_folder_it_was_written_to(tmp_path):
    made = card(evaluation="| a |\n|---|\n| 1 |\n")
    made.write(tmp_path)
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}))
    (tmp_path / TRAINING_CONFIG).write_text(
        (tmp_path / TRAINING_CONFIG).read_text() + "model_name_or_path: Qwen/Qwen2.5-3B-Instruct\n"
    )
    again = Card.of(tmp_path, "me/policy")
    assert again.text(PANELS[:1]).replace("model_name_or_path: Qwen/Qwen2.5-3B-Instruct\n", "") == made.text(
        PANELS[:1]
    )
    assert "## Evaluation\n\n| a |" in again.text([])


def test_a_card_names_the_step_of_the_best_weights_once_they_are_loaded(tmp_path):
    (tmp_path / TRAINING_CONFIG).write_text("load_best_model_at_end: true\n")
    state, ended = tmp_path / "trainer_state.json", [*HISTORY, {"step": 3, "train_runtime": 1.0}]
    state.write_text(json.dumps({"log_history": ended, "best_global_step": 2}))
    assert ", the best of 3 steps, from step 2." in Card.of(tmp_path, "me/policy").text([])
    state.write_text(json.dumps({"log_history": HISTORY, "best_global_step": 2}))  # of a checkpoint
    assert ", 3 steps." in Card.of(tmp_path, "me/policy").text([])
    assert ", 3 steps." in card(history=ended, best_step=2).text([])  # load_best_model_at_end was not set


def test_a_folder_without_settings_has_no_card(tmp_path):
    assert Card.of(tmp_path, "me/policy") is None


def test_an_adapters_card_names_the_adapter(tmp_path):
    (tmp_path / TRAINING_CONFIG).write_text("use_peft: true\nlora_r: 32\n")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3-8B"}')
    text = Card.of(tmp_path, "me/adapter").text([])
    assert metadata(text)["library_name"] == "peft"
    assert metadata(text)["base_model_relation"] == "adapter"
    assert metadata(text)["base_model"] == "Qwen/Qwen3-8B"
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/adapter")' in text
    assert "arpo-trl eval --model Qwen/Qwen3-8B --adapter me/adapter --data" in text
    assert "| LoRA rank | 32 |" in text


def test_a_card_of_a_run_without_tools_names_none():
    text = card(settings={"tools": []}).text([])
    assert metadata(text)["tags"] == ["arpo-trl", "arpo", "trl", "reinforcement-learning"]
    assert "tool" not in text.partition("## How it was trained")[0].replace("--max-tool-calls 0", "").replace(
        "--tool-call-limits none", ""
    )
    assert "--max-completion-length 512 --max-tool-calls 0 --tool-call-limits none\n```" in text


def test_a_card_may_have_a_title_and_several_datasets():
    text = card(title="My Model", settings={"dataset": ["me/rows", "you/rows", "rows.jsonl"]}).text([])
    assert "\n# My Model\n" in text and 'from_pretrained("me/policy")' in text
    assert metadata(text)["datasets"] == ["me/rows", "you/rows"]


def test_paths_of_this_machine_are_no_names_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/sft").mkdir()
    text = card(base_model="runs/sft", settings={"dataset": "/data/rows.jsonl", "eval_dataset": "runs/sft"}).text([])
    assert "base_model" not in metadata(text) and "datasets" not in metadata(text)
    assert is_hub_id("someone/questions") and not is_hub_id("runs/sft") and not is_hub_id("rows.jsonl")


def test_paths_of_the_training_are_no_names_on_the_hub_from_another_folder(tmp_path, monkeypatch):
    (tmp_path / "runs/sft").mkdir(parents=True)
    (tmp_path / "data/rows").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    settings = {
        "model_name_or_path": as_path("runs/sft"),
        "dataset": as_path(["data/rows", "me/rows", "rows.jsonl", "data/train.jsonl"]),
    }
    assert settings["model_name_or_path"] == "./runs/sft"
    assert settings["dataset"] == ["./data/rows", "me/rows", "rows.jsonl", "data/train.jsonl"]
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / TRAINING_CONFIG).write_text(yaml.safe_dump(settings))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for adapter in (None, {"base_model_name_or_path": "runs/sft"}):  # peft writes the name as it was given
        if adapter is not None:
            (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(adapter))
        text = Card.of(tmp_path / "adapter", "me/policy").text([])
        assert "base_model" not in metadata(text) and metadata(text)["datasets"] == ["me/rows"]
    assert not is_hub_id("../sft") and not is_hub_id("data/train.jsonl")


def test_text_in_a_setting_cannot_break_the_card():
    prompt = "Use\n```python\nprint(1)\n```\n| a | b"
    text = card(settings={"system_prompt": prompt, "tools": ["a|b"]}).text([])
    assert "````yaml\n" in text and "\n````\n" in text
    assert "| tools | a\\|b |" in text


def test_curves_need_two_points_and_numbers(tmp_path):
    assert draw_curves([], tmp_path) == []
    assert draw_curves([{"step": 1, "reward": 1.0}, {"step": 2, "reward": None}], tmp_path) == []
    assert list(tmp_path.iterdir()) == []
    history = [{"step": step, **{key: 1.0 for panel in PANELS for key in panel.lines}} for step in range(40)]
    assert draw_curves(history, tmp_path) == list(PANELS)


# Settings ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Settings:
    plain: int = 1
    service_token: str | None = None
    api_key: str | None = None
    url: str | None = None
    servers: list = dataclasses.field(default_factory=list)
    made: int = dataclasses.field(default=0, init=False)


def test_defaults_and_secrets_are_left_out():
    given = Settings(2, "t-1234", "k-1234", "https://me:pass@host:8000/v1?api_key=abc")
    assert describe(given) == {"plain": 2, "url": "https://host:8000/v1"}
    assert describe(Settings()) == {}
    servers = [{"url": "https://host/mcp?key=abc", "command": "run", "args": ["--key", "abc"], "env": ["SOME_KEY"]}]
    assert describe(Settings(servers=servers)) == {
        "servers": [{"url": "https://host/mcp", "command": "run", "env": ["SOME_KEY"]}]
    }


@dataclasses.dataclass
class Texts:
    system_prompt: str | None = None
    chat_template_kwargs: dict | None = None


def test_a_text_for_the_model_is_left_out_rather_than_altered(caplog):
    model_card._say_omitted.cache_clear()
    address = "Ask https://host/find?q=WORDS and nothing else."
    for _ in range(2):  # saves
        assert describe(Texts(address, {"note": [address]})) == {}
    assert [record.getMessage().partition(" contains")[0] for record in caplog.records] == [
        "system_prompt",
        "chat_template_kwargs",
    ]
    kept = Texts("Ask https://host/find and nothing else.", {"enable_thinking": False, "levels": (1, 2)})
    assert describe(kept) == {"system_prompt": kept.system_prompt, "chat_template_kwargs": {
        "enable_thinking": False, "levels": [1, 2],
    }}  # fmt: skip


@pytest.mark.parametrize("has_accelerator", [False, True])
def test_the_cpu_is_a_setting_only_where_it_was_a_choice(has_accelerator, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_accelerator)
    assert ("use_cpu" in describe(ARPOConfig("unused", bf16=False, use_cpu=True))) == has_accelerator


def test_settings_of_the_trainer_alone_parse(tmp_path):
    config = ARPOConfig(str(tmp_path), num_generations=4, per_device_train_batch_size=4, use_cpu=True)
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(describe(config)))
    (again,) = parse_settings([ARPOConfig], ["--config", str(tmp_path / "again.yaml")])
    assert again.num_generations == 4 and again.initial_rollouts == 2
