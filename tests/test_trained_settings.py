"""A run's settings become the settings of its evaluation."""

import dataclasses
import json
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.command_line import parse_settings
from arpo_trl.commands import ask
from arpo_trl.common.run_files import TRAINING_CONFIG
from arpo_trl.common.settings import ToolLimits
from arpo_trl.data.prompts import SYSTEM_PROMPTS, tags_system_prompt
from arpo_trl.errors import ConfigError, DataError
from arpo_trl.evaluation.command import evaluate
from arpo_trl.evaluation.parsing import parse_evaluation
from arpo_trl.evaluation.settings import EvalSettings
from arpo_trl.publishing.model_card import Card, describe
from arpo_trl.publishing.trained_settings import LEFT_OUT, TAKEN, EvaluationSettings
from arpo_trl.rollout.protocols.tags import TagProtocol
from arpo_trl.tools.builtin import ToolArguments, build_tools
from support import ON_CPU, save_tiny_model, script

TRAINED = {
    "dataset": "rows.jsonl", "tools": ["search"], "search_index": "corpus.jsonl", "search_top_k": 2,
    "max_completion_length": 208, "max_tool_calling_iterations": 5, "tool_protocol": "chat_template",
    "tool_parser": "hermes", "tool_timeout_s": 3.0, "max_tool_result_tokens": 100, "system_prompt": "deepsearch",
    "chat_template_kwargs": {"enable_thinking": False},
}  # fmt: skip


def run_with(tmp_path, settings) -> str:
    """A run's folder with the file that a training with `settings` writes."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    words = ["--config", str(tmp_path / "run.yaml"), "--use_cpu", "true", "--output_dir", str(tmp_path)]
    arguments, tools, config, model = parse_settings(script("train").SETTINGS, words)
    (tmp_path / TRAINING_CONFIG).write_text(yaml.safe_dump(describe(model, arguments, tools, config)))
    return str(tmp_path)


def test_evaluated_settings_equal_trained_ones(tmp_path, capsys):
    settings, tools = parse_evaluation(["--model", run_with(tmp_path, TRAINED), "--data", "rows.jsonl"])
    expected = {**TRAINED, "max_tool_calls": 5}
    for name in ("dataset", "max_tool_calling_iterations"):
        del expected[name]
    found = vars(settings) | vars(tools)
    assert {name: found[name] for name in expected} == expected
    assert settings.call_limits() == {"python": 5, "search": 5}  # no tool has a limit besides that of all together
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "settings of its training: --search-index corpus.jsonl --search-top-k 2 --tools search" in said
    assert "--max-completion-length 208" in said and "--max-tool-calls 5" in said


def test_defaults_of_training_are_those_of_the_evaluation_too(tmp_path):
    config = parse_settings(script("train").SETTINGS, ["--dataset", "rows.jsonl", "--use_cpu", "true"])[2]
    settings, _ = parse_evaluation(["--model", run_with(tmp_path, {"dataset": "rows.jsonl"}), "--data", "rows.jsonl"])
    assert settings.max_completion_length == config.max_completion_length
    assert settings.max_tool_calls == config.max_tool_calling_iterations == 6


def test_flags_win_over_the_file_which_wins_over_the_run(tmp_path, capsys):
    run = run_with(tmp_path, TRAINED)
    (tmp_path / "eval.yaml").write_text("search_top_k: 3\nmax_completion_length: 300\n")
    words = ["--model", run, "--data", "x", "--config", str(tmp_path / "eval.yaml"), "--max-completion-length", "400"]
    settings, tools = parse_evaluation([*words, "--tools", "python"])
    assert (tools.search_top_k, settings.max_completion_length, tools.tools) == (3, 400, ["python"])
    assert settings.max_tool_calls == 5
    assert "--max-completion-length" not in capsys.readouterr().err


def test_a_file_can_keep_the_system_messages_of_the_rows(tmp_path):
    (tmp_path / "eval.yaml").write_text("system_prompt: null\n")
    words = ["--model", run_with(tmp_path, TRAINED), "--data", "x", "--config", str(tmp_path / "eval.yaml")]
    assert parse_evaluation(words)[0].system_prompt is None


def test_a_folder_without_a_run_changes_nothing(tmp_path, capsys):
    settings, _ = parse_evaluation(["--model", str(tmp_path), "--data", "rows.jsonl"])
    assert settings.max_tool_calls == EvalSettings().max_tool_calls == 20
    assert capsys.readouterr().err == ""


def test_an_unlimited_number_of_calls_stays_none(tmp_path):
    run = run_with(tmp_path, {"dataset": "rows.jsonl"})
    with open(os.path.join(run, TRAINING_CONFIG), "a") as file:
        file.write("max_tool_calling_iterations: null\n")
    settings, _ = parse_evaluation(["--model", run, "--data", "rows.jsonl"])
    assert settings.max_tool_calls is None and settings.call_limits() == {}


def test_a_downloaded_folder_decides_nothing_dangerous(tmp_path, monkeypatch, capsys):
    hostile = {
        "tools": ["os:system"], "allow_unsafe": True, "search_url": "http://evil.example", "search_top_k": 1,
        "python_executor_url": "http://evil.example", "mcp_servers": [{"command": "sh"}], "search_cache": "/etc/x",
    }  # fmt: skip
    (tmp_path / TRAINING_CONFIG).write_text(yaml.safe_dump(hostile))
    monkeypatch.chdir(tmp_path)
    _, tools = parse_evaluation(["--model", str(tmp_path), "--data", "rows.jsonl"])
    assert tools == dataclasses.replace(ToolArguments(), search_top_k=1)
    said = capsys.readouterr().err
    assert "not used: allow_unsafe, mcp_servers, python_executor_url, search_cache, search_url, tools;" in said
    (tmp_path / "own.py").write_text("def lookup(country: str) -> str: ...\n")
    own = EvaluationSettings.of({"tools": ["own:lookup", "search"]})
    assert own.values["tools"] == ["own:lookup", "search"]
    monkeypatch.chdir("/")
    assert "tools" not in EvaluationSettings.of({"tools": ["own:lookup"]}).values


def test_every_setting_of_the_tools_is_taken_over_or_left_out():
    assert {field.name for field in dataclasses.fields(ToolArguments)} == TAKEN | LEFT_OUT
    assert not TAKEN & LEFT_OUT
    limits = {field.name for field in dataclasses.fields(ToolLimits)}
    assert limits <= {field.name for field in dataclasses.fields(EvalSettings)}


def test_a_file_that_no_run_wrote_is_an_error(tmp_path):
    (tmp_path / TRAINING_CONFIG).write_text("tools: search\n")
    with pytest.raises(DataError, match=r"training_config.yaml.tools is 'search'; expected a list"):
        parse_evaluation(["--model", str(tmp_path), "--data", "rows.jsonl"])


def test_the_system_prompt_of_all_rows_is_a_setting_of_the_saved_model(tmp_path):
    """So the evaluation uses it, and `ask`, which has no row."""
    path = save_tiny_model(tmp_path / "model")

    def saved(train: list[str | None], evaluated: list[str | None] | None = None) -> str | None:
        trainer = ARPOTrainer(
            path,
            lambda completions, **_: [0.0] * len(completions),
            ARPOConfig(str(tmp_path / "run"), num_generations=2, per_device_train_batch_size=2, **ON_CPU),
            train_dataset=rows_with(train),
            eval_dataset=None if evaluated is None else {"held out": rows_with(evaluated)},
        )
        trainer.save_model(str(tmp_path / "saved"))
        return parse_evaluation(["--model", str(tmp_path / "saved")])[0].system_prompt

    assert saved(["Think well."] * 2) == "Think well."
    assert saved([SYSTEM_PROMPTS["reasoning"]], [SYSTEM_PROMPTS["reasoning"]]) == "reasoning"
    assert saved(["Think well."], ["Be brief."]) is None
    assert saved([None, None]) == ""


def rows_with(system: list[str | None]) -> Dataset:
    question = {"role": "user", "content": "what is 1"}
    return Dataset.from_list(
        [{"prompt": [*([{"role": "system", "content": text}] if text else []), question]} for text in system]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "flag", "has_system"),
    [
        (
            {"question": "what is 1"},
            "'Solve the task step by step.",
            True,
        ),  # training describes the tools to such rows
        ({"prompt": [{"role": "user", "content": "what is 1"}]}, "''", False),
        (None, None, True),
    ],
)
def test_a_question_is_asked_with_the_prompt_of_training_and_evaluation(
    tmp_path, monkeypatch, capsys, row, flag, has_system
):
    models = [save_tiny_model(tmp_path / "model")]
    if row is not None:
        (tmp_path / "rows.jsonl").write_text(json.dumps({**row, "answer": "1", "task": "math"}))
        words = [
            *("--model_name_or_path", models[0], "--dataset", str(tmp_path / "rows.jsonl"), "--tools", "python"),
            *("--output_dir", str(tmp_path / "run"), "--use_cpu", "true", "--report_to", "none", "--save_steps", "1"),
            *("--num_generations", "2", "--per_device_train_batch_size", "2", "--max_completion_length", "16"),
            *("--max_steps", "1"),
        ]
        monkeypatch.setattr("sys.argv", ["train.py", *words])
        script("train").main()
        models = [str(tmp_path / "run"), str(tmp_path / "run/checkpoint-1")]
    prompts = []
    encode = TagProtocol.encode_prompt
    monkeypatch.setattr(TagProtocol, "encode_prompt", lambda self, given: prompts.append(given) or encode(self, given))
    question = [{"role": "user", "content": "what is 2"}]
    system = tags_system_prompt(build_tools(ToolArguments(["python"])))
    expected = [{"role": "system", "content": system}, *question] if has_system else question
    (tmp_path / "asked.jsonl").write_text('{"question": "what is 2", "answer": "2", "task": "math"}')
    for model in models:
        capsys.readouterr()
        options = ["--tools", "python", "--max-completion-length", "16", "--context", "2000"]
        assert ask.main([model, "what is 2", *options]) == 0
        assert flag is None or f" --system-prompt {flag} " in capsys.readouterr().err
        assert prompts.pop() == expected
        output = ["--data", str(tmp_path / "asked.jsonl"), "--output", str(tmp_path / Path(model).name / "eval")]
        evaluate(*parse_evaluation(["--model", model, *output, *options]))
        assert prompts.pop() == expected
        prompts.clear()


def test_arguments_of_the_template_may_be_json(tmp_path):
    words = ["--model", "m", "--data", "rows.jsonl", "--chat-template-kwargs"]
    settings, _ = parse_evaluation([*words, '{"enable_thinking": false}'])
    assert settings.chat_template_kwargs == {"enable_thinking": False}
    with pytest.raises(ConfigError, match=r"chat_template_kwargs is 'true'; expected a mapping"):
        parse_evaluation([*words, "true"])
    with pytest.raises(ConfigError, match=r"chat_template_kwargs is not valid JSON \(Expecting .*\): {a: 1}"):
        parse_evaluation([*words, "{a: 1}"])


@pytest.mark.parametrize("calls", [3, None])
@pytest.mark.parametrize(
    "prompt",
    [
        "deepsearch",
        "",
        'It\'s a task. Use "tools":\n\n```\n<search>$HOME `ls`</search>\n```\n````` and \\boxed{}.\n',
    ],
)
def test_the_card_has_the_whole_command(tmp_path, prompt, calls):
    run_with(tmp_path, {**TRAINED, "system_prompt": prompt, "max_tool_calling_iterations": calls})
    text = Card.of(tmp_path, "me/policy").text([])
    # In Markdown a block ends at the first line that is at least as long a fence as its first line.
    ((_, command),) = re.findall(r"^(`{3,})\n(arpo-trl eval .*?)\n\1`*$", text, re.DOTALL | re.MULTILINE)
    settings, tools = parse_evaluation(shlex.split(command)[2:])
    assert settings.system_prompt == prompt and settings.chat_template_kwargs == {"enable_thinking": False}
    assert settings.max_tool_calls == calls
    same, its_tools = parse_evaluation(["--model", str(tmp_path), "--data", "questions.jsonl"])
    assert dataclasses.replace(settings, model=same.model) == same
    assert tools == its_tools
