import ast
import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from transformers import HfArgumentParser
from trl import ModelConfig

from arpo_trl import options
from arpo_trl.command_line import parse_settings
from arpo_trl.common.settings import JudgeArguments, Range, ToolLimits, check_fields, setting
from arpo_trl.config import ARPOConfig
from arpo_trl.errors import ConfigError, DataError
from arpo_trl.evaluation.settings import EvalSettings
from arpo_trl.scripts.start import required_model
from arpo_trl.tools.builtin import ToolArguments
from support import script

OURS = [
    ToolLimits,
    JudgeArguments,
    ARPOConfig,
    ToolArguments,
    EvalSettings,
    script("train").TrainArguments,
    script("sft").ColdStartArguments,
]


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Oven:
    dish: str
    shelf: int = setting(2, "Where it stands.", at_least=1)
    minutes: float = setting(30.0, "How long.", above=0, unit="minutes")
    fan: float = setting(0.5, "How fast.", at_least=0, at_most=1)
    share: float = setting(1.0, "How much of it.", above=0, at_most=1)
    tilt: float = setting(0.0, "Any way.")
    seed: int = setting(0, "Of the draw.")
    crumbs: int | None = setting(None, "How many.", at_least=1, unit="crumbs")
    light: str = setting("red", "Its colour.", choices=Colour)
    lamps: list[str] = setting(list, "Their colours.", choices=Colour)
    door: str | None = setting(None, "Its state.", choices=["open", "shut"])


# What is checked -----------------------------------------------------------------------------------------------------


def test_a_path_in_place_of_a_text_becomes_its_text():
    settings = EvalSettings(model=Path("m"), data=Path("rows.jsonl"), output=Path("run"))
    assert (settings.model, settings.data, settings.output) == ("m", "rows.jsonl", "run")
    assert settings.identity() == EvalSettings(model="m", data="rows.jsonl", output="run").identity()
    assert json.loads(json.dumps(settings.identity()))["data"] == "rows.jsonl"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"shelf": 1, "minutes": 1, "fan": 0, "share": 1e-9, "tilt": -1e9, "seed": -3},
        {"fan": 1.0, "crumbs": 1, "light": Colour.BLUE, "lamps": ["blue", "red", "blue"], "door": "shut"},
        {"crumbs": None, "lamps": [], "door": None},
    ],
)
def test_values_within_their_ranges_are_accepted(settings):
    check_fields(Oven("pie", **settings))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("shelf", 0, "an integer of at least 1"),
        ("shelf", 2.0, "an integer of at least 1"),
        ("shelf", True, "an integer of at least 1"),
        ("shelf", "2", "an integer of at least 1"),
        ("shelf", None, "an integer of at least 1"),
        ("minutes", 0, "a number of more than 0 minutes"),
        ("minutes", math.inf, "a number of more than 0 minutes"),
        ("minutes", "30", "a number of more than 0 minutes"),
        ("minutes", True, "a number of more than 0 minutes"),
        ("fan", 1.1, "a number in [0, 1]"),
        ("fan", math.nan, "a number in [0, 1]"),
        ("share", 0.0, "a number in (0, 1]"),
        ("tilt", -math.inf, "a finite number"),
        ("tilt", None, "a finite number"),
        ("seed", 0.5, "an integer"),
        ("crumbs", 0, "an integer of at least 1 crumb"),
        ("light", "green", "one of ['red', 'blue']"),
        ("light", None, "one of ['red', 'blue']"),
        ("light", ["red"], "one of ['red', 'blue']"),
        ("lamps", ["red", "green"], "a list of some of ['red', 'blue']"),
        ("lamps", "red", "a list of some of ['red', 'blue']"),
        ("lamps", None, "a list of some of ['red', 'blue']"),
        ("door", "ajar", "one of ['open', 'shut']"),
    ],
)
def test_an_invalid_value_is_an_error_that_names_setting_value_and_expectation(name, value, expected):
    with pytest.raises(ConfigError) as refused:
        check_fields(Oven("pie", **{name: value}))
    assert str(refused.value) == f"{name} is {value!r}; expected {expected}."


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (Range(at_least=16, unit="tokens"), "at least 16 tokens"),
        (Range(at_least=1, unit="tokens"), "at least 1 token"),
        (Range(above=0, unit="seconds"), "more than 0 seconds"),
        (Range(at_least=0, at_most=1), "in [0, 1]"),
        (Range(above=0, at_most=60, unit="seconds"), "in (0, 60] seconds"),
        (Range(at_most=0), "in (-inf, 0]"),
        (Range(), ""),
    ],
)
def test_a_range_reads_as_a_text(limits, text):
    assert str(limits) == text


# What is shown -------------------------------------------------------------------------------------------------------


def test_the_range_is_added_to_the_help():
    helps = {setting.name: setting.metadata.get("help") for setting in dataclasses.fields(Oven)}
    assert helps["shelf"] == "Where it stands. At least 1."
    assert helps["minutes"] == "How long. More than 0 minutes."
    assert helps["fan"] == "How fast. In [0, 1]."
    assert (helps["tilt"], helps["light"]) == ("Any way.", "Its colour.")


def test_flags_and_help_are_made_by_transformers_parser():
    parser = HfArgumentParser(Oven)
    (oven,) = parser.parse_args_into_dataclasses(["--dish", "pie", "--shelf", "3", "--lamps", "red", "blue"])
    assert (oven.shelf, oven.lamps, oven.crumbs) == (3, ["red", "blue"], None)
    shown = " ".join(parser.format_help().split())
    assert "Where it stands. At least 1. (default: 2)" in shown
    assert "--light {red,blue} Its colour." in shown


@pytest.mark.parametrize("copy", [dict, lambda metadata: metadata.copy(), lambda metadata: {**metadata}])
def test_a_copy_of_metadata_has_only_the_entries_of_a_parser(copy):
    """transformers 5.17 and TRL call `copy`, transformers 5.24 calls `dict`."""
    shelf, light = (setting.metadata for setting in dataclasses.fields(Oven) if setting.name in ("shelf", "light"))
    assert copy(shelf) == {"help": "Where it stands. At least 1."}
    assert copy(light) == {"help": "Its colour.", "metavar": "{red,blue}"}
    assert "range" in shelf and light["choices"] == ["red", "blue"]


# The settings of this package ----------------------------------------------------------------------------------------


def own_fields(kind: type) -> list[dataclasses.Field]:
    """The fields that `kind` or one of its bases in this package declares."""
    ours = [base for base in kind.__mro__ if base in OURS]
    names = {name for base in ours for name in base.__annotations__}
    return [setting for setting in dataclasses.fields(kind) if setting.name in names]


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_every_number_has_a_range_and_every_setting_a_sentence(kind):
    hints = get_type_hints(kind)
    numbers = [
        setting for setting in own_fields(kind) if {int, float} & {hints[setting.name], *get_args(hints[setting.name])}
    ]
    assert len(numbers) >= {ARPOConfig: 17, ToolArguments: 9, EvalSettings: 11}.get(kind, 0)
    assert [setting.name for setting in numbers if "range" not in setting.metadata] == []
    assert [setting.name for setting in own_fields(kind) if not setting.metadata["help"].endswith(".")] == []


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (ToolArguments, {"tools": ["bash"]}, r"tools is \['bash'\]; expected a list of some of \['search', 'python'"),
        (ToolArguments, {"search_max_chars": 9}, "search_max_chars is 9; expected an integer of at least 10 char"),
        (ToolArguments, {"python_timeout_s": 0}, "python_timeout_s is 0; expected a number of more than 0 seconds"),
        (ToolArguments, {"mcp_timeout_s": math.inf}, "mcp_timeout_s is inf; expected a number of more than 0 seconds"),
        (EvalSettings, {"samples": 1.5}, "samples is 1.5; expected an integer of at least 1"),
        (EvalSettings, {"top_p": 1.5}, r"top_p is 1.5; expected a number in \(0, 1\]"),
        (EvalSettings, {"tool_protocol": "xml"}, r"tool_protocol is 'xml'; expected one of \['tags', "),
        (OURS[5], {"dataset": "d", "accuracy": "f1"}, "accuracy is 'f1'; expected one of .*'paper_f1'"),
        (OURS[5], {"dataset": "d", "judge_url": "http://x"}, "Only one of judge_url and judge_model is set"),
        (OURS[6], {"dataset": "d", "max_tool_result_tokens": 8}, "max_tool_result_tokens is 8; expected .* 16 tokens"),
    ],
)
def test_every_class_checks_its_fields(kind: type, given: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        kind(**given)


@pytest.mark.parametrize("name", ["share_calls", "shared_prefix_forward"])
def test_a_bare_off_of_yaml_is_a_choice_not_a_bool(name: str, tmp_path: Path):
    (tmp_path / "run.yaml").write_text(f"dataset: rows.jsonl\nuse_cpu: true\n{name}: off\n")
    settings = parse_settings(script("train").SETTINGS, ["--config", str(tmp_path / "run.yaml")])
    (config,) = (each for each in settings if isinstance(each, ARPOConfig))
    assert getattr(config, name) == "off"


@pytest.mark.parametrize("name", ["save_strategy", "eval_strategy", "logging_strategy"])
@pytest.mark.parametrize("program", ["train", "sft"])
def test_a_bare_no_of_yaml_is_a_strategy_not_a_bool(program: str, name: str, tmp_path: Path):
    (tmp_path / "run.yaml").write_text(f"dataset: rows.jsonl\nuse_cpu: true\noutput_dir: out\n{name}: no\n")
    settings = parse_settings(script(program).SETTINGS, ["--config", str(tmp_path / "run.yaml")])
    assert [getattr(each, name) for each in settings if hasattr(each, name)] == ["no"]


@pytest.mark.parametrize("nothing", ["no", "null", "false", "none"])
@pytest.mark.parametrize("program", ["train", "sft"])
def test_no_tracker_is_none_in_any_spelling_of_yaml(program: str, nothing: str, tmp_path: Path):
    (tmp_path / "run.yaml").write_text(f"dataset: rows.jsonl\nuse_cpu: true\noutput_dir: out\nreport_to: {nothing}\n")
    settings = parse_settings(script(program).SETTINGS, ["--config", str(tmp_path / "run.yaml")])
    assert [each.report_to for each in settings if hasattr(each, "report_to")] == [[]]


@pytest.mark.parametrize("value", ["-1e-5", "-1.5E+3", "-.5e1", "-1.", "-1e5", "-inf"])
@pytest.mark.parametrize("program", ["train", "sft"])
def test_a_negative_number_with_an_exponent_is_a_value_and_no_flag(program: str, value: str):
    words = ["--dataset", "rows.jsonl", "--use_cpu", "true", "--output_dir", "out", "--learning_rate", value]
    with pytest.raises(ConfigError, match=f"learning_rate is {float(value)}; expected a (finite )?number"):
        parse_settings(script(program).SETTINGS, words)


def test_a_number_with_an_exponent_is_a_number_at_every_depth(tmp_path):
    """YAML 1.1, and thus TRL's parser, reads 1e-6 as text, which a scheduler refuses only at the first step."""
    (tmp_path / "run.yaml").write_text(
        "dataset: rows.jsonl\nuse_cpu: true\noutput_dir: out\nlearning_rate: 1e-5\n"
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-6}\n"
    )
    _, settings = parse_settings(
        [script("train").TrainArguments, ARPOConfig], ["--config", str(tmp_path / "run.yaml")]
    )
    assert (settings.learning_rate, settings.lr_scheduler_kwargs) == (1e-5, {"min_lr": 1e-6})


def test_a_config_file_sets_environment_variables_and_flags_take_precedence_over_it(tmp_path, monkeypatch):
    monkeypatch.setenv("OF_THE_FILE", "of the shell")
    file = tmp_path / "run.yaml"
    file.write_text("dataset: rows.jsonl\nuse_cpu: true\noutput_dir: out\nseed: 3\nenv: {OF_THE_FILE: 7}\n")
    _, settings = parse_settings([script("train").TrainArguments, ARPOConfig], ["--seed", "4", "--config", str(file)])
    assert (settings.seed, os.environ["OF_THE_FILE"]) == (4, "7")
    file.write_text("env: [A]\n")
    with pytest.raises(ConfigError, match=r"env is \['A'\]; expected environment variables, as lines of NAME: value"):
        parse_settings(script("train").SETTINGS, ["--config", str(file)])


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_steps", "1.5", "an integer of at least -1."),
        ("max_steps", "null", "an integer of at least -1."),
        ("warmup_steps", "-5", "a number of at least 0."),
        ("eval_steps", "-1", "a number of at least 0."),
        ("accelerator_config", "3", "a text or a mapping."),
        ("save_total_limit", "1.5", "an integer."),
        ("torch_compile", "3", "true or false."),
        ("optim_args", "3", "a text."),
        ("label_names", "3", "a list."),
        ("lr_scheduler_type", "cosin", "one of ['linear', 'cosine', "),
        ("save_strategy", "never", "one of ['no', 'steps', "),
        ("save_strategy", "true", "one of ['no', 'steps', "),
    ],
)
@pytest.mark.parametrize("program", ["train", "sft"])
def test_a_value_that_does_not_fit_a_setting_of_transformers_is_named(program, name, value, expected, tmp_path):
    (tmp_path / "run.yaml").write_text(f"dataset: rows.jsonl\nuse_cpu: true\noutput_dir: out\n{name}: {value}\n")
    with pytest.raises(ConfigError) as raised:
        parse_settings(script(program).SETTINGS, ["--config", str(tmp_path / "run.yaml")])
    assert re.fullmatch(rf"{name} is .+; expected {re.escape(expected)}.*", str(raised.value))


@pytest.mark.parametrize(
    "line",
    [
        *("resume_from_checkpoint: true", "fsdp: true", "fsdp: [full_shard, auto_wrap]", "report_to: [tensorboard]"),
        *("report_to: tensorboard", "debug: []", "accelerator_config: {split_batches: false}", "logging_steps: 0.1"),
        *("save_steps: null", "eval_steps: null", "optim: adamw_torch", "warmup_steps: 0.1", "seed: 3"),
        *("lr_scheduler_kwargs: '{}'", "label_names: labels", "save_total_limit: null", "learning_rate: 1e-3"),
    ],
)
@pytest.mark.parametrize("program", ["train", "sft"])
@pytest.mark.filterwarnings("ignore")
def test_what_transformers_accepts_is_accepted(program, line, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"dataset: rows.jsonl\nuse_cpu: true\noutput_dir: out\nsave_strategy: epoch\n{line}\n"
    )
    settings = parse_settings(script(program).SETTINGS, ["--config", str(tmp_path / "run.yaml")])
    if program == "sft":
        dataclasses.replace(settings[1])  # of an ARPOConfig, TRL refuses it


def test_what_trl_accepts_is_accepted():
    assert ARPOConfig("out", use_cpu=True, scale_rewards=False).scale_rewards == "none"
    assert ARPOConfig("out", use_cpu=True, scale_rewards=True).scale_rewards == "group"
    assert ARPOConfig("out", use_cpu=True, delta=None).delta is None


def test_the_default_of_a_field_of_a_users_class_is_accepted():
    @dataclass
    class Mine(ARPOConfig):
        target: float = None  # type: ignore[assignment]

    Mine("out", use_cpu=True)
    with pytest.raises(ConfigError, match="target is 'high'; expected a number"):
        Mine("out", use_cpu=True, target="high")


def test_a_run_without_a_folder_is_an_error():
    with pytest.raises(ConfigError, match="output_dir is empty; expected a folder"):
        ARPOConfig("", use_cpu=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model_revision": date(2024, 5, 1)}, "model_revision is datetime.date(2024, 5, 1); expected a text."),
        ({"lora_r": 1.5}, "lora_r is 1.5; expected an integer of at least 1."),
        ({"lora_r": 0}, "lora_r is 0; expected an integer of at least 1."),
        ({"lora_dropout": 2}, "lora_dropout is 2; expected a number in [0, 1]."),
        ({"lora_target_modules": 3}, "lora_target_modules is 3; expected a list."),
        ({"use_dora": "yes"}, "use_dora is 'yes'; expected true or false."),
    ],
)
def test_a_value_that_does_not_fit_a_setting_of_the_model_is_named(given, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        required_model(ModelConfig("m", **given))


@pytest.mark.parametrize(
    ("given", "used"),
    [(["q_proj"], ["q_proj"]), ("q_proj", ["q_proj"]), (["all-linear"], "all-linear"), (".*q_proj", ".*q_proj")],
)
def test_one_target_module_is_a_name_and_not_a_pattern(given, used):
    config = ModelConfig("m", use_peft=True, lora_target_modules=given)
    required_model(config)
    assert config.lora_target_modules == used


def test_a_model_may_be_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = ModelConfig("~/m")
    assert required_model(config) == config.model_name_or_path == f"{tmp_path}/m"
    settings = EvalSettings(model="~/m", adapter="~/a")
    assert (settings.model, settings.adapter) == (f"{tmp_path}/m", f"{tmp_path}/a")
    assert EvalSettings(model="me/m~1").model == required_model(ModelConfig("me/m~1")) == "me/m~1"
    with pytest.raises(DataError, match=r"~nobody-here/m begins with a user who has no home directory"):
        EvalSettings(model="~nobody-here/m")


def test_settings_of_lora_without_lora_are_a_warning(caplog):
    required_model(ModelConfig("m", use_peft=True, lora_r=8, lora_target_modules="all-linear"))
    assert caplog.text == ""
    required_model(ModelConfig("m", lora_r=8, lora_alpha=8))
    assert "lora_r and lora_alpha are set, but use_peft is not" in caplog.text


def test_training_and_evaluation_have_the_same_limits_of_tools():
    shared = {setting.name for setting in dataclasses.fields(ToolLimits)}
    assert shared == {"tool_protocol", "tool_parser", "tool_timeout_s", "tool_concurrency", "max_tool_result_tokens"}
    for kind in (ARPOConfig, EvalSettings):
        assert issubclass(kind, ToolLimits) and not shared & set(vars(kind)["__annotations__"])


# Imports -------------------------------------------------------------------------------------------------------------


def imported(module: str) -> set[str]:
    """The modules that `module` imports while it is loaded, not inside a function."""
    found = set()
    for statement in ast.parse(Path(importlib.util.find_spec(module).origin).read_text("utf-8")).body:
        if isinstance(statement, ast.Import):
            found |= {name.name for name in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            assert statement.module and not statement.level
            found.add(statement.module)
    return found


def test_the_configuration_imports_no_torch_code_of_this_package():
    seen, todo = set(), {"arpo_trl.config"}
    while todo:
        module = todo.pop()
        if module.startswith("arpo_trl") and module not in seen:
            seen.add(module)
            todo |= imported(module)
    assert {"arpo_trl.options", "arpo_trl.common.settings", "arpo_trl.rollout.engines.generation_rules"} <= seen
    assert not {module for module in seen if {name.partition(".")[0] for name in imported(module)} & {"torch"}}


def test_options_and_settings_load_at_once():
    heavy = {"torch", "transformers", "trl", "httpx"}
    code = f"import sys, arpo_trl.common.settings; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_every_option_explains_itself():
    kinds = [kind for kind in vars(options).values() if isinstance(kind, type) and kind.__module__ == options.__name__]
    assert len(kinds) >= 5 and all(kind.__doc__ for kind in kinds)
