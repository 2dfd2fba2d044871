"""The documentation as a site: it builds without a warning, its generated page is current, and its notebooks run."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

import run_notebooks
import settings_page
from arpo_trl.cli import parse_settings
from arpo_trl.data.demonstrations import IGNORED, encode_dataset
from arpo_trl.evaluation.settings import EvalSettings
from arpo_trl.rollout.protocols import TagProtocol
from arpo_trl.tools.builtin import ToolArguments
from support import script, tokenizer

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def sections(text: str) -> dict[str, str]:
    """The sections of a page by their titles."""
    return {section.partition("\n")[0]: section for section in text.split("\n## ")}


def test_the_page_of_settings_equals_the_code() -> None:
    """Sections are titled with the versions of TRL and transformers; those of other versions are not compared."""
    generated, page = sections(settings_page.page()), sections(settings_page.PAGE.read_text("utf-8"))
    assert {*generated} >= {title for title, *_ in settings_page.OURS}
    outdated = [title for title in generated if title in page and page[title].strip() != generated[title].strip()]
    assert outdated == [], "run: python docs/_build/settings_page.py"
    assert [title for title, *_ in settings_page.OURS if title not in page] == []


def test_every_setting_of_a_command_is_on_the_page() -> None:
    listed = set(re.findall(r"^\| `(\w+)` \|", settings_page.page(), re.MULTILINE))
    kinds = {*script("train").SETTINGS, *script("sft").SETTINGS, EvalSettings, ToolArguments}
    assert {field.name for kind in kinds for field in dataclasses.fields(kind)} - listed == set()


def test_a_setting_has_its_range_in_its_own_column() -> None:
    rows = sections(settings_page.page())["Trees, batches and credit"].splitlines()
    (row,) = [row for row in rows if row.startswith("| `branches_per_fork`")]
    meaning = "Z: extra turns under a tool result that branches."
    assert row == f"| `branches_per_fork` | `1` | `int`, at least 1 | {meaning} |"


def test_every_setting_of_the_released_scripts_has_one_here() -> None:
    """What stands in backticks in the last column is a setting, but for what is not in the YAML file."""
    known = {row[1] for row in re.finditer(r"^\| `(\w+)` \|", settings_page.page(), re.MULTILINE)}
    elsewhere = {"threshold", "server", "grpo", "HierarchicalReward", "BRIGHTDATA_API_KEY", "WANDB_PROJECT"}
    rows = re.findall(r"^\| .* \| .* \| (.*) \|$", (DOCS / "from-verl.md").read_text("utf-8"), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([A-Za-z_]\w+)(?:: [^`]*)?`", row)}
    assert len(named) > 40
    assert named - known == elsewhere


@pytest.mark.parametrize("page", ["from-verl.md", "cold-start.md"])
def test_every_yaml_example_is_read(page: str, tmp_path: Path) -> None:
    name = "sft" if page == "cold-start.md" else "train"
    (example,) = re.findall(r"```yaml\n(.*?)```", (DOCS / page).read_text("utf-8"), re.DOTALL)
    given = "" if "dataset:" in example else f"dataset: rows.jsonl\noutput_dir: {tmp_path}\n"
    (tmp_path / "run.yaml").write_text(f"use_cpu: true\n{given}{example}")
    parse_settings(script(name).SETTINGS, ["--config", str(tmp_path / "run.yaml")])


def test_rows_of_the_papers_layout_become_demonstrations(tmp_path: Path) -> None:
    """The turns carry loss, the question and the result of the tool do not."""
    namespace: dict[str, Any] = {}
    code, _ = re.findall(r"```python\n(.*?)```", (DOCS / "cold-start.md").read_text("utf-8"), re.DOTALL)
    exec(code, namespace)
    text = "<think>find it</think><search>iron</search>\n<result>\n1538\n</result>\n<answer>\\boxed{1538}</answer>"
    conversations = [{"from": "human", "value": "what is it"}, {"from": "gpt", "value": text}]
    namespace["write"]([{"system": "use tools", "conversations": conversations}], tmp_path / "sft.jsonl")
    rows = Dataset.from_json(str(tmp_path / "sft.jsonl"), cache_dir=str(tmp_path))
    encoded, too_long = encode_dataset(rows, TagProtocol(tokenizer(), {}), 4096)
    (row,) = encoded
    learned = tokenizer().decode([label for label in row["labels"] if label != IGNORED])
    assert learned.startswith("<think>find it</think><search>iron</search><answer>")
    assert "what is it" not in learned and "<result>" not in learned
    assert too_long == 0


@pytest.mark.parametrize("notebook", run_notebooks.NOTEBOOKS, ids=lambda path: path.stem)
def test_links_of_notebooks_lead_to_files(notebook: Path) -> None:
    targets = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", notebook.read_text("utf-8"))
    assert targets
    assert [target for target in targets if not (notebook.parent / target).exists()] == []


def test_notebooks_keep_only_printed_text() -> None:
    assert len(run_notebooks.NOTEBOOKS) == 4
    for path in run_notebooks.NOTEBOOKS:
        text = path.read_text("utf-8")
        assert len(text) < 40_000
        assert not re.search(r"image/png|text/html|/home/|/root/|\\u001b", text)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", run_notebooks.NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_runs(notebook: Path, tmp_path: Path) -> None:
    run = run_notebooks.executed(notebook, tmp_path)
    assert any(cell.get("outputs") for cell in run.cells)


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_no_other_host(tmp_path: Path) -> None:
    """Links, anchors, the navigation and the docstrings' cross-references are checked by the build."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 25
    loaded = re.compile(
        r"<(?:script|img|iframe)[^>]+src=\"(?:https?:)?//|<link[^>]+(?:stylesheet|icon)[^>]+href=\"https?:"
    )
    assert [page for page in pages if loaded.search(page.read_text("utf-8"))] == []
    reference = (tmp_path / "site" / "reference.html").read_text("utf-8")
    for page in pages:  # from the disk, a link to a folder would show a list of its files
        links = re.findall(r'href="([^":#?]+)"', page.read_text("utf-8"))
        assert [link for link in links if page.name != "404.html" and not (page.parent / link).is_file()] == []
    assert 'id="arpo_trl.ARPOTrainer"' in reference and 'id="arpo_trl.load_arpo_dataset"' in reference
    settings = (tmp_path / "site" / "settings.html").read_text("utf-8")
    assert '<td data-label="default">' in settings  # shown on a phone, which has no room for the table's head
    assert "H_turn" in (tmp_path / "site" / "concepts.html").read_text("utf-8")
