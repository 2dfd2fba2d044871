"""Typical mistakes of newcomers result in one line with a remedy and no traceback: the rows of a page."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import httpx
import pytest
import torch
import yaml
from datasets import Dataset
from trl import GRPOConfig

from arpo_trl import ARPOConfig, ARPOTrainer, HierarchicalReward, cli, command_line, load_arpo_dataset
from arpo_trl.common.pretrained import load_pretrained
from arpo_trl.errors import ArpoError, ConfigError
from arpo_trl.scripts.start import start_errors
from arpo_trl.tools.builtin import ToolArguments, build_tools
from arpo_trl.training.prefix_sharing import pack_rows
from support import save_tiny_model, script, tokenizer
from test_view import logged, save

PAGE = Path(__file__).parents[1] / "docs/mistakes.md"
ROW = re.compile(r"^\| `(.*?)` \| (.*) \|$", re.MULTILINE)
ROWS = ROW.findall(PAGE.read_text("utf-8"))
COLD_START = ROW.findall(PAGE.read_text("utf-8").partition("## The cold start")[2].partition("\n## ")[0])
"""The rows whose YAML file is that of `arpo-trl sft`."""
SLOW = re.compile(
    r"report_to|eval_strategy|dtype: |attn_|use_peft|reward: my_code:(one|by|fails|texts)|optim_args|: broken|resume_"
    r"|long\.jsonl|dtype float99"
)
"""Mistakes that are found once the model is loaded, or later."""
CODE = '''
def fails(completions, **_):
    return [1 / 0 for _ in completions]


def texts(completions, **_):
    return ["good"] * len(completions)


def one(completions, **_):
    return [1.0]


def by_gold(completions, gold):
    return [0.0] * len(completions)


def untyped(text):
    """Repeat.

    Args:
        text: What.
    """


def two_arguments(text: str, count: int) -> str:
    """Repeat.

    Args:
        text: What.
        count: How often.
    """
    return text * count
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the rows of the page name."""
    made = tmp_path_factory.mktemp("home")
    save_tiny_model(made / "model")
    for step in (2, 10):
        shutil.copytree(made / "model", made / f"checkpoints/checkpoint-{step}")
    shutil.copytree(made / "model", made / "earlier")
    save(made / "earlier", logged(9), name="step-000009")
    shutil.copytree(made / "model", made / "broken")
    (made / "broken/model.safetensors").write_bytes(b"{" * 100)
    tokenizer().save_pretrained(made / "adapter")
    (made / "adapter/adapter_config.json").write_text("{}", "utf-8")
    for name in ("empty", "runs", "taken"):
        (made / name).mkdir()
    (made / "taken/trajectories").write_text("notes", "utf-8")
    (made / "my_code.py").write_text(CODE, "utf-8")
    row = {"question": "What is 1 + 1?", "answer": "2", "task": "math"}
    for name, rows in {
        "questions": [row], "empty": [], "texts": [{"text": "1 + 1 = 2"}], "maths": [{**row, "task": "maths"}],
        "misspelt": [{"question": "What is 1 + 1?", "anwser": "2"}],
        "demonstrations": [{"prompt": "What is 1 + 1?", "text": "<answer>2</answer>"}],
        "long": [{**row, "question": "what " * 3000}],
        "roles": [{"prompt": [{"role": "usr", "content": "What is 1 + 1?"}], "answer": "2", "task": "math"}],
    }.items():  # fmt: skip
        (made / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows), "utf-8")
    (made / "broken.jsonl").write_text('{"question": "What is 1 + 1?"\n', "utf-8")
    (made / "torn.jsonl").write_text('{"prompt": "Hi.", "text": "Hi."}\n\n{"messages":', "utf-8")
    (made / "latin1.jsonl").write_bytes('{"question": "café?", "answer": "2"}'.encode("latin-1"))
    (made / "list.yaml").write_text("- seed\n", "utf-8")
    (made / "table.csv").write_text("question,answer\n", "utf-8")
    (made / "table.xlsx").write_bytes(b"PK")
    return made


@pytest.fixture
def make(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`make(mistake)` makes a mistake of the page and returns the line that it ends in."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "my_code", raising=False)
    monkeypatch.setenv("COLUMNS", "1000")
    for name in ("SERPER_API_KEY", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(folder / "no_keys"))

    def run(main, *words: str) -> str:
        monkeypatch.setattr("sys.argv", list(words))
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr().err
        assert ended.value.code == 2, said
        assert "Traceback" not in said
        return said.strip().splitlines()[-1]

    def train(changes: dict[str, object]) -> str:
        shutil.rmtree("run", ignore_errors=True)
        settings = {
            "model_name_or_path": "model", "dataset": "questions.jsonl", "output_dir": "run", "num_generations": 2,
            "per_device_train_batch_size": 2, "max_completion_length": 16, "max_steps": 1, "tools": ["python"],
            "report_to": "none", **changes,
        }  # fmt: skip
        Path("config.yaml").write_text(json.dumps(settings), "utf-8")  # JSON is YAML
        return run(script("train").main, "train.py", "--config", "config.yaml")

    def cold_start(changes: dict[str, object]) -> str:
        shutil.rmtree("run", ignore_errors=True)
        settings = {
            "model_name_or_path": "model", "dataset": "demonstrations.jsonl", "output_dir": "run", "max_steps": 1,
            "per_device_train_batch_size": 2, "report_to": "none", **changes,
        }  # fmt: skip
        Path("config.yaml").write_text(json.dumps(settings), "utf-8")
        return run(script("sft").main, "sft.py", "--config", "config.yaml")

    def evaluate(code: str) -> str:
        names = {"ARPOTrainer": ARPOTrainer, "GRPOConfig": GRPOConfig, "HierarchicalReward": HierarchicalReward}
        names |= {"load_arpo_dataset": load_arpo_dataset, "model": "model", "reward": lambda completions: [0.0]}
        names["config"] = ARPOConfig("run", num_generations=2, per_device_train_batch_size=2, use_cpu=True)
        names["rows"] = Dataset.from_list([{"prompt": "What is 1 + 1?"}])
        with pytest.raises(ArpoError) as raised:
            eval(code, names)
        return f"{type(raised.value).__name__}: {raised.value}"

    def made(mistake: str, *, in_cold_start: bool = False) -> str:
        if mistake.startswith("arpo-trl "):
            return run(cli.main, *shlex.split(mistake))
        if "(" in mistake:
            return evaluate(mistake)
        return (cold_start if in_cold_start else train)(yaml.safe_load(mistake))

    return made


@pytest.mark.parametrize(
    ("mistake", "line"),
    [pytest.param(*row, marks=[pytest.mark.slow] if SLOW.search(row[0]) else [], id=row[0]) for row in ROWS],
)
def test_a_mistake_has_the_message_on_the_page(make, mistake: str, line: str) -> None:
    said = re.sub(
        r"^(\w+Error|arpo-trl[\w ]*: error): ", "", make(mistake, in_cold_start=(mistake, line) in COLD_START)
    )
    parts = [re.escape(part) for part in line.replace("\\", "").split("…")]
    assert re.fullmatch(".*".join(parts), said), said


@pytest.mark.parametrize("in_cold_start", [False, True])
@pytest.mark.parametrize("setting", ["dataset", "model_name_or_path", "resume_from_checkpoint"])
def test_a_name_with_300_characters_ends_in_one_line(make, setting: str, in_cold_start: bool) -> None:
    said = make(json.dumps({setting: "x" * 300 + ".jsonl"}), in_cold_start=in_cold_start)
    assert re.match(r"(Config|Data)Error: ", said) and "xxx" in said


def test_the_page_has_more_than_a_hundred_mistakes() -> None:
    assert len(ROWS) == len(set(ROWS)) > 120


def test_a_search_setting_without_search_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    build_tools(ToolArguments(tools=[], search_index="passages.jsonl"))
    assert "search_index is set, but tools is [], without search. Add search to tools." in caplog.text


@pytest.mark.parametrize("words", [["--config=settings.yaml"], ["--config", "settings.yaml"]])
def test_the_configuration_follows_a_space_or_an_equals_sign(tmp_path, monkeypatch, words) -> None:
    monkeypatch.chdir(tmp_path)
    Path("settings.yaml").write_text("tools: [python]\n", "utf-8")
    (arguments,) = command_line.parse_settings((ToolArguments,), words)
    assert arguments.tools == ["python"]
    with pytest.raises(ConfigError, match="--config is set without a value"):
        command_line.parse_settings((ToolArguments,), ["--config"])


def test_invalid_yaml_is_an_error_of_one_line(tmp_path) -> None:
    (tmp_path / "tab.yaml").write_text("a: 1\n\tb: 2\n", "utf-8")
    with pytest.raises(ConfigError, match=r"tab.yaml is not valid YAML: [^\n]*found character '\\t'[^\n]*$"):
        command_line.parse_settings((ToolArguments,), ["--config", str(tmp_path / "tab.yaml")])


def test_a_folder_without_a_model_is_an_error(tmp_path):
    (tmp_path / "notes.txt").touch()

    def load(name: str) -> None:
        raise OSError("no file\nnamed config.json")

    with pytest.raises(ConfigError) as raised:
        load_pretrained("configuration", str(tmp_path), load)
    assert str(raised.value) == (
        f"The configuration of {str(tmp_path)!r} cannot be loaded: OSError: no file named config.json. Expected a "
        "folder that save_pretrained wrote, or a Hub id."
    )


@pytest.mark.parametrize(
    ("what", "files", "is_refused"),
    [
        ("configuration", ["adapter_config.json", "tokenizer_config.json"], True),
        ("tokenizer", ["adapter_config.json"], True),
        ("tokenizer", ["adapter_config.json", "tokenizer_config.json"], False),  # its own tokenizer is broken
        ("adapter", ["adapter_config.json"], False),
        ("configuration", ["adapter_config.json", "config.json"], False),
    ],
)
def test_an_adapter_in_place_of_a_model_is_to_be_merged(tmp_path, what, files, is_refused):
    for file in files:
        (tmp_path / file).touch()

    def load(name: str) -> None:
        raise ValueError("Unrecognized model")

    with pytest.raises(ConfigError) as raised:
        load_pretrained(what, str(tmp_path), load)
    merge = f"it is an adapter. Merge it into its model first: arpo-trl merge {tmp_path} --output FOLDER"
    assert (merge in str(raised.value)) == is_refused


def test_an_error_that_this_packages_own_code_raises_by_accident_keeps_its_traceback(monkeypatch):
    with pytest.raises(ValueError, match="A row has no token") as raised, start_errors():
        pack_rows(torch.ones(1, 2), torch.zeros(1, 2), 1)
    assert not isinstance(raised.value, ConfigError)


def test_an_error_of_a_type_that_its_package_defines_is_converted_and_one_of_the_users_code_is_not():
    class Own(Exception): ...

    with pytest.raises(ConfigError, match=r"cannot start\. httpx says: Invalid port: 'x'"), start_errors():
        httpx.URL("http://127.0.0.1:x")  # its InvalidURL is an Exception of no built-in type
    assert httpx.InvalidURL.__mro__[1] is Exception
    with pytest.raises(Own), start_errors():
        raise Own
    with pytest.raises(KeyError), start_errors():  # a built-in type that is no verdict on a setting
        {}["missing"]


def test_a_variable_keeps_the_traceback_of_other_errors(monkeypatch):
    with pytest.raises(ConfigError, match="Training cannot start"), start_errors():
        json.loads("{")
    with pytest.raises(json.JSONDecodeError), start_errors(lambda: False):  # training has begun
        json.loads("{")
    monkeypatch.setenv("ARPO_TRACEBACK", "1")
    with pytest.raises(json.JSONDecodeError), start_errors():
        json.loads("{")
