"""What the documentation shows works as it stands there."""

import re
from pathlib import Path

import pytest

from arpo_trl.cli import parse_settings
from arpo_trl.tools.build import ToolArguments
from arpo_trl.tools.search_cache import CacheMode
from arpo_trl.tools.search_providers import PROVIDERS

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
