"""What the documentation shows works as it stands there."""

import re
from pathlib import Path

import pytest

from arpo_trl.cli import parse_settings
from arpo_trl.evaluation.benchmarks import BENCHMARKS, SUITES, custom_benchmark, find_benchmarks
from arpo_trl.evaluation.report import METRIC_NAMES
from arpo_trl.evaluation.settings import EvalSettings
from arpo_trl.tools.build import ToolArguments
from arpo_trl.tools.search_cache import CacheMode
from arpo_trl.tools.search_providers import PROVIDERS
from arpo_trl.trajectory_dataset import TRAJECTORY_SCHEMA
from support import script

DOCS = Path(__file__).parents[1] / "docs"
TOOLS = (DOCS / "tools.md").read_text("utf-8")


@pytest.mark.parametrize("example", re.findall(r"```yaml\n(.*?)```", TOOLS, re.DOTALL))
def test_every_yaml_example_is_read(example: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(example)
    (arguments,) = parse_settings((ToolArguments,), ["--config", str(tmp_path / "run.yaml")])
    assert arguments.tools


def test_every_provider_and_mode_is_in_the_tables() -> None:
    described = set(re.findall(r"^\| `(\w+)` \|", TOOLS, re.MULTILINE)) - {"search_provider", "search_cache_mode"}
    assert described == {"local", "recorded", *PROVIDERS, *(mode.value for mode in CacheMode)}
    assert set(re.findall(r"\b[A-Z]+_API_KEY\b", TOOLS)) - {"VISIT_SUMMARY_API_KEY", "SUMMARY_API_KEY"} == {
        kind.key_variable for kind in PROVIDERS.values() if kind.key_variable
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
    (tmp_path / "run.yaml").write_text(f"dataset: rows.jsonl\nuse_cpu: true\nbf16: false\n{example}")
    parse_settings(script("train").SETTINGS, ["--config", str(tmp_path / "run.yaml")])


def test_the_columns_of_a_trajectories_dataset_are_in_the_table(tmp_path: Path) -> None:
    text = (DOCS / "hub.md").read_text("utf-8").partition("### The trajectories as a dataset")[2]
    described = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| ([^|]*)\|", text, re.MULTILINE)))
    assert described[: len(TRAJECTORY_SCHEMA)] == TRAJECTORY_SCHEMA.names


def test_every_benchmark_and_score_is_in_the_tables() -> None:
    text = (DOCS / "evaluation.md").read_text("utf-8")
    described = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| .*$", text, re.MULTILINE))))
    assert described >= {*BENCHMARKS, *SUITES, *METRIC_NAMES} - {"accuracy"}
