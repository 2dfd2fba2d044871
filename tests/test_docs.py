"""What the documentation shows works as it stands there."""

import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from arpo_trl import cli
from arpo_trl.cli import parse_settings
from arpo_trl.evaluation.benchmarks import BENCHMARKS, SUITES, custom_benchmark, find_benchmarks
from arpo_trl.evaluation.report import METRIC_NAMES
from arpo_trl.evaluation.settings import EvalSettings
from arpo_trl.publishing.trajectory_dataset import TRAJECTORY_SCHEMA
from arpo_trl.tools.builtin import ToolArguments
from arpo_trl.tools.search.cache import CacheMode
from arpo_trl.tools.search.providers import PROVIDERS
from support import script

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
TOOLS = (DOCS / "tools.md").read_text("utf-8")


@pytest.mark.parametrize("example", re.findall(r"```yaml\n(.*?)```", TOOLS, re.DOTALL))
def test_every_yaml_example_is_read(example: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(example)
    (arguments,) = parse_settings((ToolArguments,), ["--config", str(tmp_path / "run.yaml")])
    assert arguments.tools


def test_every_provider_and_mode_is_in_the_tables() -> None:
    described = set(re.findall(r"^\| `(\w+)` \|", TOOLS, re.MULTILINE)) - {"search_provider", "search_cache_mode"}
    assert described == {"local", "recorded", *PROVIDERS.own, *(mode.value for mode in CacheMode)}
    assert set(re.findall(r"\b[A-Z]+_API_KEY\b", TOOLS)) - {"VISIT_SUMMARY_API_KEY", "SUMMARY_API_KEY"} == {
        variable for name in PROVIDERS.own if (variable := PROVIDERS.get(name).key_variable)
    }


@pytest.mark.parametrize(
    "example", re.findall(r"```yaml\n(.*?)```", (DOCS / "evaluation.md").read_text("utf-8"), re.DOTALL)
)
def test_every_yaml_example_of_an_evaluation_is_read(example: str, tmp_path: Path) -> None:
    (tmp_path / "eval.yaml").write_text(example)
    settings, _ = parse_settings((EvalSettings, ToolArguments), ["--config", str(tmp_path / "eval.yaml")])
    custom = [custom_benchmark(description) for description in settings.custom]
    assert find_benchmarks(settings.benchmarks, custom) == custom


@pytest.mark.parametrize("example", re.findall(r"```yaml\n(.*?)```", (DOCS / "hub.md").read_text("utf-8"), re.DOTALL))
def test_every_yaml_example_of_adapters_and_the_hub_is_read(example: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"dataset: rows.jsonl\nuse_cpu: true\n{example}")
    parse_settings(script("train").SETTINGS, ["--config", str(tmp_path / "run.yaml")])


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
    for file in (*PAGES, *sorted((ROOT / "configs").glob("*.yaml"))):
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
    else:
        cli._parser().parse_args(given)


def test_every_script_that_is_named_is_there() -> None:
    texts = [file.read_text("utf-8") for file in PAGES]
    scripts = {name for text in texts for name in re.findall(r"\b(?:benchmarks|tests)/\w+\.(?:py|sh)\b", text)}
    assert len(scripts) > 20
    assert [name for name in sorted(scripts) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    "code", [code for file in PAGES for code in re.findall(r"```python\n(.*?)```", file.read_text("utf-8"), re.DOTALL)]
)
def test_every_example_in_python_imports_what_there_is(code: str) -> None:
    """README's first one runs, in test_shipped.py."""
    compile(code, "example", "exec")
    for line in re.findall(r"^(?:from|import) .*", code, re.MULTILINE):
        exec(line, {})
