"""The documentation as a site: it builds without a warning, its generated page is current, and its notebooks run."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import datasets
import nbformat
import pytest
from datasets import Dataset
from nbclient.exceptions import CellExecutionError

import run_notebooks
import settings_page
from arpo_trl.data.demonstrations import IGNORED, encode_dataset
from arpo_trl.evaluation.settings import EvalSettings
from arpo_trl.rollout.protocols import TagProtocol
from arpo_trl.tools.builtin import ToolArguments
from support import child_environment, script, tokenizer

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


def test_names_in_a_meaning_are_code() -> None:
    text = "Import paths such as my_rewards:exact, with <b> and 2*3; see 'qa' and arpo_trl.data.layouts."
    shown = "Import paths such as `my_rewards:exact`, with `<b>` and 2\\*3; see `qa` and `arpo_trl.data.layouts`."
    assert settings_page.in_table(text) == shown


def verl_rows() -> list[list[str]]:
    """The cells of each row: the flags, their values, and what replaces them here."""
    lines = (DOCS / "from-verl.md").read_text("utf-8").splitlines()
    return [line.strip("|").split("|") for line in lines if line.startswith("| ") and not line.startswith("| flag |")]


def test_every_setting_of_the_released_scripts_has_one_here() -> None:
    """What stands in backticks in the last column is a setting, but for what is not in the YAML file."""
    known = {row[1] for row in re.finditer(r"^\| `(\w+)` \|", settings_page.page(), re.MULTILINE)}
    elsewhere = {"threshold", "server", "grpo", "HierarchicalReward", "BRIGHTDATA_API_KEY", "WANDB_PROJECT"}
    named = {name for *_, here in verl_rows() for name in re.findall(r"`([A-Za-z_]\w+)(?:: [^`]*)?`", here)}
    assert len(named) > 40
    assert named - known == elsewhere


RELEASED_FLAGS = """
--config-path --config-name
algorithm.adv_estimator algorithm.kl_ctrl.kl_coef
data.train_files data.val_files data.prompt_key data.train_batch_size data.max_prompt_length data.max_response_length
actor_rollout_ref.model.path actor_rollout_ref.model.enable_gradient_checkpointing
actor_rollout_ref.model.use_remove_padding
actor_rollout_ref.actor.optim.lr actor_rollout_ref.actor.ppo_mini_batch_size
actor_rollout_ref.actor.use_dynamic_bsz actor_rollout_ref.actor.ppo_max_token_len_per_gpu
actor_rollout_ref.actor.use_kl_loss actor_rollout_ref.actor.kl_loss_coef actor_rollout_ref.actor.kl_loss_type
actor_rollout_ref.actor.fsdp_config.param_offload actor_rollout_ref.actor.fsdp_config.optimizer_offload
actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu actor_rollout_ref.rollout.tensor_model_parallel_size
actor_rollout_ref.rollout.name actor_rollout_ref.rollout.mode actor_rollout_ref.rollout.gpu_memory_utilization
actor_rollout_ref.rollout.n actor_rollout_ref.rollout.initial_rollouts actor_rollout_ref.rollout.beam_size
actor_rollout_ref.rollout.branch_probability actor_rollout_ref.rollout.entropy_weight
actor_rollout_ref.rollout.tools.tool_instances.search.class_path
actor_rollout_ref.rollout.tools.tool_instances.search.params.cache_file
actor_rollout_ref.rollout.tools.tool_instances.search.params.api_key
actor_rollout_ref.rollout.tools.tool_instances.search.params.zone
actor_rollout_ref.rollout.tools.tool_instances.python.params.conda_path
actor_rollout_ref.rollout.tools.tool_instances.python.params.conda_env
actor_rollout_ref.rollout.multi_turn.enable
actor_rollout_ref.ref.log_prob_max_token_len_per_gpu actor_rollout_ref.ref.fsdp_config.param_offload
reward_model.reward_manager custom_reward_function.path custom_reward_function.name
trainer.critic_warmup trainer.logger trainer.project_name trainer.experiment_name trainer.n_gpus_per_node
trainer.nnodes trainer.save_freq trainer.test_freq trainer.total_epochs trainer.default_local_dir
trainer.val_before_train trainer.rollout_data_dir hydra.run.dir
""".split()
"""The flags of the reasoning scripts and of the 14B deep search script, and those with which users set its tools."""
CONFIGURED = [
    f"actor_rollout_ref.rollout.tools.{key}" for key in ("call_limit", "timeout", "max_workers", "retry_count")
]
"""Keys of the scripts' YAML file that the page lists too."""


def test_every_flag_of_the_released_scripts_is_on_the_page() -> None:
    """Once, and the page lists no other. A name that begins with `….` is the end of a flag."""
    flags = sorted((*RELEASED_FLAGS, *CONFIGURED))

    def meant(name: str) -> list[str]:
        shortened = name.startswith("….")
        return [flag for flag in flags if (flag.endswith(name[1:]) if shortened else flag == name)]

    named = [name for first, *_ in verl_rows() for name in re.findall(r"`(.+?)`", first)]
    assert [(name, meant(name)) for name in named if len(meant(name)) != 1] == []
    assert sorted(flag for name in named for flag in meant(name)) == flags


def examples(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text("utf-8"), re.DOTALL)


def learned(rows: Dataset) -> str:
    """The text of the first demonstration that carries loss."""
    encoded, too_long = encode_dataset(rows, TagProtocol(tokenizer(), {}), 4096, "data.md")
    assert too_long == 0
    return tokenizer().decode([label for label in encoded[0]["labels"] if label != IGNORED])


def test_the_demonstration_on_the_page_teaches_the_models_turns() -> None:
    (row,) = examples("cold-start.md", "json")
    text = learned(Dataset.from_list([json.loads(row)]))
    assert text.startswith("<think>Look it up.</think><search>iron melting point</search><think>")
    assert "\\boxed{538}</answer>" in text
    assert "which temperature" not in text and "Iron melts" not in text


def test_rows_of_the_papers_layout_become_demonstrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The turns carry loss, the question and the result of the tool do not."""
    text = "<think>find it</think><search>iron</search>\n<result>\n1538\n</result>\n<answer>\\boxed{1538}</answer>"
    conversations = [{"from": "human", "value": "what is it"}, {"from": "gpt", "value": text}]
    (tmp_path / "published").mkdir()
    row = {"system": "use tools", "conversations": conversations}
    Dataset.from_list([row]).to_parquet(tmp_path / "published" / "train.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    convert, load = examples("cold-start.md", "python")
    exec(convert + load.replace("dongguanting/ARPO-SFT-54K", str(tmp_path / "published")), {})
    text = learned(Dataset.from_json("sft.jsonl", cache_dir=str(tmp_path)))
    assert text.startswith("<think>find it</think><search>iron</search><answer>")
    assert "what is it" not in text and "<result>" not in text


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
def test_every_notebook_runs(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", child_environment([], os.environ)["PYTHONPATH"])
    run = run_notebooks.executed(notebook, tmp_path)
    assert any(cell.get("outputs") for cell in run.cells)


@pytest.mark.slow
def test_a_command_of_a_notebook_that_fails_is_an_error(tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("!echo first"), nbformat.v4.new_code_cell("")]
    )
    path = tmp_path / "some.ipynb"
    for command, fails in (("true", False), ("arpo-trl tree nowhere", True)):
        notebook.cells[1].source = f"!{command}"
        path.write_text(nbformat.writes(notebook), "utf-8")
        with pytest.raises(CellExecutionError, match=command) if fails else nullcontext():
            assert run_notebooks.executed(path, tmp_path).cells[0].outputs[0].text.split() == ["first"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("sft", "ConfigError: The tokenizer of 'runs/notebook/base' cannot be loaded"),
        ("train", "DataError: The file or folder runs/notebook/questions.jsonl does not exist"),
    ],
)
def test_a_stage_of_the_quickstart_notebook_that_fails_shows_the_end_of_its_log(
    stage: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", child_environment([], os.environ)["PYTHONPATH"])
    notebook = nbformat.read(ROOT / "notebooks/quickstart.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    code[0].source = code[0].source.partition("\n\n\ndef ")[0]  # without data and model
    notebook.cells = [code[0], next(cell for cell in code if cell.source.startswith(f"!{{ARPO}} {stage}"))]
    nbformat.write(notebook, tmp_path / "some.ipynb")
    with pytest.raises(CellExecutionError, match=said):
        run_notebooks.executed(tmp_path / "some.ipynb", tmp_path)


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
