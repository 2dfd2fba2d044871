"""Code and commands in the documentation work as shown."""

import importlib
import json
import re
import shlex
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset

import arpo_trl
from arpo_trl import ARPOConfig, cli, errors
from arpo_trl.command_line import parse_settings
from arpo_trl.commands.launch import split_words
from arpo_trl.data.layouts import MAPPABLE, convert_row
from arpo_trl.data.loading import ROLLOUT_COLUMNS, TRL_COLUMNS
from arpo_trl.data.prompts import SYSTEM_PROMPTS
from arpo_trl.evaluation.benchmarks import BENCHMARKS, SUITES, custom_benchmark, find_benchmarks
from arpo_trl.evaluation.report import METRIC_NAMES
from arpo_trl.evaluation.settings import EvalSettings
from arpo_trl.publishing.trajectory_dataset import TRAJECTORY_SCHEMA
from arpo_trl.rollout.protocols.parsers import OWN, RESPONSE_TEMPLATES, VLLM_FAMILIES
from arpo_trl.rollout.tree import RolloutTree, StopReason
from arpo_trl.tools.builtin import ToolArguments
from arpo_trl.tools.search.cache import CacheMode
from arpo_trl.tools.search.providers import PROVIDERS
from support import save_tiny_model, script, tokenizer

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
TOOLS = (DOCS / "tools.md").read_text("utf-8")


def blocks(language: str) -> list[tuple[str, str]]:
    """The pages' blocks of code in that language: the page's name, and the code."""
    fenced = rf"^ *```{language}\n(.*?)^ *```"
    found = [(page.name, re.findall(fenced, page.read_text("utf-8"), re.MULTILINE | re.DOTALL)) for page in PAGES]
    return [(name, code) for name, codes in found for code in codes]


def settings_in(page: str, example: str, folder: Path) -> tuple[Any, ...]:
    """What the page's program reads from a file with this example, and with the settings that it needs besides.

    Raises:
        ConfigError: A key is not a setting, or a value is wrong.
    """
    program = {"cold-start.md": "sft", "evaluation.md": "eval"}.get(page, "train")
    kinds = (EvalSettings, ToolArguments) if program == "eval" else script(program).SETTINGS
    needed = {} if program == "eval" else {"dataset": "rows.jsonl", "output_dir": str(folder), "use_cpu": True}
    if page == "vllm.md":
        needed |= {"use_vllm": True, "vllm_mode": "server"}
    missing = {name: value for name, value in needed.items() if name not in yaml.safe_load(example)}
    (folder / "run.yaml").write_text(yaml.safe_dump(missing) + example if missing else example)
    return parse_settings(kinds, ["--config", str(folder / "run.yaml")])


@pytest.mark.parametrize(("page", "example"), blocks("yaml"))
def test_every_yaml_example_has_settings_of_its_program(page: str, example: str, tmp_path: Path) -> None:
    settings_in(page, example, tmp_path)


def test_every_provider_and_mode_is_in_the_tables() -> None:
    described = set(re.findall(r"^\| `(\w+)` \|", TOOLS, re.MULTILINE)) - {"search_provider", "search_cache_mode"}
    assert described == {"local", "recorded", *PROVIDERS.own, *(mode.value for mode in CacheMode)}
    assert set(re.findall(r"\b[A-Z]+_API_KEY\b", TOOLS)) - {"VISIT_SUMMARY_API_KEY", "SUMMARY_API_KEY"} == {
        variable for name in PROVIDERS.own if (variable := PROVIDERS.get(name).key_variable)
    }


def test_every_parser_of_calls_is_in_the_table() -> None:
    section = TOOLS.partition("\n## How calls are written\n")[2].partition("\n## ")[0]
    table = section.partition("| models | parser |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", table)) - {"response_template"}
    assert named == {OWN, *RESPONSE_TEMPLATES, *VLLM_FAMILIES}


def test_the_columns_of_your_own_are_read(tmp_path: Path) -> None:
    (example,) = [code for page, code in blocks("yaml") if page == "data.md"]
    arguments, *_ = settings_in("data.md", example, tmp_path)
    assert arguments.columns == {"question": "body", "answer": "meta.gold"}


def test_the_benchmark_of_your_own_can_be_run(tmp_path: Path) -> None:
    (example,) = [code for page, code in blocks("yaml") if page == "evaluation.md"]
    settings, _ = settings_in("evaluation.md", example, tmp_path)
    custom = [custom_benchmark(description) for description in settings.custom]
    assert find_benchmarks(settings.benchmarks, custom) == custom


@pytest.mark.parametrize(
    ("row", "answers"), re.findall(r"\| `(\{.*\})` \| `(\[.*\])` \|", (DOCS / "data.md").read_text("utf-8"))
)
def test_every_row_in_the_table_of_layouts_has_the_answers_beside_it(row: str, answers: str) -> None:
    converted = convert_row(json.loads(row), 0, None)
    assert converted is not None
    assert converted["answer"] == json.loads(answers)


def test_the_names_that_rows_may_or_must_not_have_are_listed() -> None:
    text = (DOCS / "data.md").read_text("utf-8")
    sections = {section.partition("\n")[0]: set(re.findall(r"`(\w+)`", section)) for section in text.split("\n## ")}
    assert sections["Columns"] == {"columns", *MAPPABLE}
    assert sections["Prompts"] >= set(SYSTEM_PROMPTS)
    assert sections["Errors"] == {"DataError", *ROLLOUT_COLUMNS, *TRL_COLUMNS}


def test_the_public_names_and_errors_are_in_the_tables() -> None:
    names, raised = (DOCS / "api.md").read_text("utf-8").split("\n## Errors\n")
    described = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`[^|]*)\|", names, re.MULTILINE)))
    assert sorted(described) == sorted(arpo_trl.__all__)
    kinds = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`[^|]*)\|", raised, re.MULTILINE)))
    assert set(kinds) == {
        name for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.ArpoError) and kind is not errors.ArpoError
    }  # fmt: skip


def test_the_columns_of_a_trajectories_dataset_are_in_the_table(tmp_path: Path) -> None:
    text = (DOCS / "hub.md").read_text("utf-8").partition("### The trajectories as a dataset")[2]
    described = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| ([^|]*)\|", text, re.MULTILINE)))
    assert described[: len(TRAJECTORY_SCHEMA)] == TRAJECTORY_SCHEMA.names


def test_every_benchmark_and_score_is_in_the_tables() -> None:
    text = (DOCS / "evaluation.md").read_text("utf-8")
    described = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| .*$", text, re.MULTILINE))))
    assert described >= {*BENCHMARKS, *SUITES, *METRIC_NAMES} - {"accuracy"}


# Commands and code ---------------------------------------------------------------------------------------------------


def shell_lines(file: Path) -> list[str]:
    """Lines of a page's blocks of commands and what it has in backticks, or of a configuration's head.

    Lines that go on with a backslash are joined.
    """
    text = file.read_text("utf-8")
    if file.suffix == ".yaml":
        text = text.replace("\n#", "\n")
    else:
        fenced = re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
        blocks = [block for language, block in fenced if language in ("", "bash")]
        inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        text = "\n".join([*blocks, *inline])
    return text.replace("\\\n", " ").splitlines()


def commands(start: str, wanted: str = "") -> list[tuple[str, list[str]]]:
    """Of each command with `wanted` in it the words from `start` on, at least three, and the file it stands in."""
    found = []
    right = [page for page in PAGES if page.name != "mistakes.md"]  # test_newcomer.py makes its mistakes
    for file in (*right, *sorted((ROOT / "configs").glob("*.yaml"))):
        for line in shell_lines(file):
            command = re.match(r"\s*(?:\w+=\S+ +)*(?:srun [^']*')?((?:accelerate launch|arpo-trl|python) .*)", line)
            if command is None or wanted not in command[1] or f"{start} " not in command[1]:
                continue
            text = command[1][command[1].index(f"{start} ") :].rstrip("'").replace("…", "")
            text = re.sub(r"\[.*?\]", "", re.sub(r'"\$[^"]*"', "1", text))  # variables, and what may be left out
            words = shlex.split(text, comments=True)
            if len(words) > 2:
                found.append((file.name, words))
    return found


@pytest.fixture
def readers_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Paths of the configurations that pages speak of as the reader's own, by name."""
    (tmp_path / "my.yaml").write_text("dataset: rows.jsonl\noutput_dir: runs/my\n")
    (tmp_path / "eval.yaml").write_text("model: runs/mine\nbenchmarks: [gsm8k]\n")
    monkeypatch.chdir(ROOT)
    return {name: str(tmp_path / name) for name in ("my.yaml", "eval.yaml")}


def named(value: object) -> str | None:
    return value if isinstance(value, str) else None


@pytest.mark.parametrize(("where", "words"), commands("train.py") + commands("sft.py"), ids=named)
def test_every_command_that_trains_parses(where: str, words: list[str], readers_own: dict[str, str]) -> None:
    given = [readers_own.get(word, word) for word in words[1:]]
    parse_settings(script(words[0].removesuffix(".py")).SETTINGS, [*given, "--use_cpu", "true"])


@pytest.mark.parametrize(("where", "words"), commands("accelerate launch", ".py"), ids=named)
def test_every_command_that_launches_parses(where: str, words: list[str]) -> None:
    arguments = launch_command_parser().parse_args(words[2:])
    assert (ROOT / arguments.training_script).exists()
    assert arguments.config_file is None or (ROOT / arguments.config_file).exists()


@pytest.mark.parametrize(("where", "words"), commands("arpo-trl"), ids=named)
def test_every_command_of_arpo_trl_parses(where: str, words: list[str], readers_own: dict[str, str]) -> None:
    given = [readers_own.get(word, word) for word in words[1:]]
    if given[0] == "eval":
        parse_settings((EvalSettings, ToolArguments), given[1:])
    elif given[0] in ("train", "sft") and given[1:] != ["--help"]:
        _, rest = split_words([readers_own["my.yaml"] if word == "config.yaml" else word for word in given[1:]])
        parse_settings(script(given[0]).SETTINGS, [*rest, "--use_cpu", "true"])
    elif given[0] in cli.COMMANDS:
        importlib.import_module(f"arpo_trl.commands.{cli.COMMANDS[given[0]][0].partition(':')[0]}")
    else:
        cli._parser().parse_args(given)


def test_every_script_that_is_named_is_there() -> None:
    texts = [file.read_text("utf-8") for file in PAGES]
    scripts = {name for text in texts for name in re.findall(r"\b(?:benchmarks|tests)/\w+\.(?:py|sh)\b", text)}
    assert len(scripts) > 20
    assert [name for name in sorted(scripts) if not (ROOT / name).exists()] == []


def test_a_new_example_comes_with_a_test_that_runs_it() -> None:
    """These are run here, in test_examples.py and in the file beside them."""
    assert Counter(page for page, _ in blocks("python")) == {
        "README.md": 2,  # the first in test_shipped.py
        "algorithm.md": 2,
        "api.md": 1,
        "cold-start.md": 2,  # test_site.py
        "data.md": 2,
        "environments.md": 4,  # test_environment_docs.py too
        "evaluation.md": 1,  # test_evaluation_callback.py
        "from-grpo.md": 1,
        "from-verl.md": 1,
        "hub.md": 1,  # test_trajectory_dataset.py
        "rewards.md": 2,
        "tools.md": 3,
    }
    assert Counter(page for page, _ in blocks("json")) == {"cold-start.md": 1}  # test_site.py


def test_the_scripted_example_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its turns are read, its call runs, and its reward sees both: 538 = 1538 − 1000."""
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "api.md").read_text("utf-8"), re.DOTALL)
    seen = SimpleNamespace(turns=[], calls=[])

    def python(code: str) -> str:
        """Run it.

        Args:
            code: It.
        """
        seen.calls.append(code)
        return "538"

    def reward(turns: list[list[str]], **_: Any) -> list[float]:
        seen.turns += turns
        return [0.0] * len(turns)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    rows = Dataset.from_list([{"prompt": "what is 1538 - 1000"}])
    model = save_tiny_model(tmp_path / "model")
    exec(code, {"tokenizer": tokenizer(), "model": model, "reward": reward, "dataset": rows, "python": python})
    assert set(seen.calls) == {"print(1538 - 1000)"}
    written = ["<python>print(1538 - 1000)</python>", "<answer>\\boxed{538}</answer>"]
    assert seen.turns == [written] * 16


def test_the_rule_and_the_credit_that_are_shown_can_be_chosen(tmp_path: Path) -> None:
    for code in re.findall(r"```python\n(.*?)```", (DOCS / "algorithm.md").read_text("utf-8"), re.DOTALL):
        exec(code, {"__name__": "example"})
    config = ARPOConfig(
        str(tmp_path), branch_rule="early", branch_rule_kwargs={"until_depth": 3}, advantage_attribution="own_turns"
    )
    rule: Any = config.make_branch_rule()
    assert [rule.judge(SimpleNamespace(depth=depth), None).fires for depth in (1, 3, 4)] == [True, True, False]
    tree = RolloutTree([9])
    observation = tree.add_observation(tree.add_turn(0, [1, 1], "", [-0.5] * 2, []).index, [2], [], "")
    for address in ((0,), (0, 1)):
        turn = tree.add_turn(observation.index, [3] * len(address), "", [-0.5] * len(address), [])
        tree.end(turn.index, address, StopReason.EOS)
    advantages, weights = config.make_credit()([tree], torch.zeros(2), torch.tensor([1.0, -0.5]))
    # two tokens of the first turn and one of its result are shared; then the leaves have one and two tokens
    assert advantages[0, :4].tolist() == [0.0, 0.0, 0.0, 1.0]
    assert advantages[1].tolist() == [0.0, 0.0, 0.0, -0.5, -0.5]
    assert weights is None


# Links ---------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        to = page.parent / path if path else page
        if not to.exists() or (anchor and anchor not in anchors(to)):
            broken.append(target)
    assert broken == []
