"""The commands of an installed wheel, outside the checkout: `python -m pip install --target FOLDER arpo_trl-….whl`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages with the wheel that this checkout makes, and nothing else."""
    built = tmp_path_factory.mktemp("built")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(built), str(ROOT)]
    subprocess.run(wheel, check=True)
    (file,) = built.glob("arpo_trl-*.whl")
    with zipfile.ZipFile(file) as archive:
        names = set(archive.namelist())
        assert not [name for name in names if name.startswith(("tests", "benchmarks", "src"))]
        for kind in ("configs", "accelerate_configs"):
            assert {f"arpo_trl/{kind}/{path.name}" for path in (ROOT / kind).glob("*.yaml")} <= names
        archive.extractall(built / "site")
    return built / "site"


@pytest.fixture(scope="module")
def command(site: Path) -> Command:
    """Runs `arpo-trl WORDS` in a folder with the installed package."""

    def run(folder: Path, *words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment |= {"ACCELERATE_USE_CPU": "true", "COLUMNS": "120"}
        call = [sys.executable, "-c", "import sys; from arpo_trl.cli import main; main()", *words]
        done = subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == status, (words, done.returncode, done.stdout[-2000:], done.stderr[-4000:])
        return done

    return run


@pytest.fixture(scope="module")
def project(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project after the commands that `arpo-trl new` prints."""
    folder = tmp_path_factory.mktemp("home")
    said = command(folder, "new", "my-agent").stdout
    assert "cd my-agent\n    arpo-trl train --config config.yaml" in said
    command(folder / "my-agent", "train", "--config", "config.yaml")
    return folder / "my-agent"


def test_the_package_is_the_installed_one_and_has_a_version(command: Command, site: Path, tmp_path: Path) -> None:
    assert re.fullmatch(r"arpo-trl \d+\.\d+\.\d+\S*\n", command(tmp_path, "--version").stdout)
    assert f"in {site}/arpo_trl" in command(tmp_path, "doctor").stdout


@pytest.mark.parametrize("words", [("--help",), ("train", "--help"), ("sft", "--help"), ("new", "--help")])
def test_help_imports_nothing_heavy(command: Command, tmp_path: Path, words: tuple[str, ...]) -> None:
    assert command(tmp_path, *words).stdout.startswith("usage: arpo-trl")
    code = (
        f"import sys; sys.argv[1:] = {list(words)!r}\nfrom arpo_trl.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "sys.exit(str({'torch', 'transformers', 'trl', 'accelerate'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


def test_a_new_project_trains_and_its_readme_is_true(command: Command, project: Path) -> None:
    history = json.loads((project / "runs/first/trainer_state.json").read_text("utf-8"))["log_history"]
    rewards = [row["reward"] for row in history if "reward" in row]
    assert len(rewards) == 10
    assert sum(rewards[-3:]) > sum(rewards[:3])  # it learns to look up and to copy
    readme = (project / "README.md").read_text("utf-8")
    lines = [line.partition("#")[0].split() for line in readme.split("```")[1].splitlines() if line]
    assert [line[1] for line in lines] == ["train", "tree", "ask", "eval"]
    assert "step 9, group" in command(project, "tree", "runs/first", "--step", "9").stdout
    asked = command(project, "ask", "runs/first", "What is the capital of France?", "--temperature", "0")
    assert "<lookup>" in asked.stdout and "Answer: " in asked.stdout
    assert "settings of its training: --tools my_tools:lookup" in asked.stderr
    words = ["--model", "runs/first", "--data", "questions.jsonl", "--limit", "20", "--output", "runs/eval"]
    evaluated = command(project, "eval", *words)
    assert "settings of its training: --tools my_tools:lookup --max-completion-length 64" in evaluated.stderr
    described = json.loads((project / "runs/eval/results.json").read_text("utf-8"))
    assert described["tools"]["offered"] == ["lookup"]
    assert described["settings"]["max_completion_length"] == 64


def test_a_second_training_does_not_replace_the_first(command: Command, project: Path) -> None:
    before = (project / "runs/first/model.safetensors").stat().st_mtime_ns
    refused = command(project, "train", "--config", "config.yaml", status=2)
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("ConfigError")]
    assert "output_dir runs/first holds a finished model (model.safetensors) of an earlier run" in line
    assert "Traceback" not in refused.stderr
    assert (project / "runs/first/model.safetensors").stat().st_mtime_ns == before
    command(project, "train", "--config", "config.yaml", "--max_steps", "1", "--overwrite_output_dir", "true")
    assert len(list((project / "runs/first/trajectories").glob("*.jsonl"))) == 1


def test_the_cold_start_of_a_project_trains(command: Command, project: Path) -> None:
    command(project, "sft", "--config", "sft.yaml", "--max_steps", "2")
    assert (project / "runs/sft/model.safetensors").exists()
    refused = command(project, "sft", "--config", "sft.yaml", "--max_steps", "2", status=2)
    assert "holds a finished model" in refused.stderr


def test_a_shipped_configuration_is_found_by_its_name(command: Command, tmp_path: Path) -> None:
    """Its files are not there: the error is that of the training program, with its exit status."""
    refused = command(tmp_path, "train", "--config", "quickstart", "--accelerate", "single", status=2)
    (line,) = [line for line in refused.stderr.splitlines() if "Error: " in line]
    assert "runs/quickstart" in line


def test_an_earlier_quickstart_is_not_replaced(command: Command, tmp_path: Path) -> None:
    (tmp_path / "q/rl").mkdir(parents=True)
    (tmp_path / "q/rl/model.safetensors").touch()
    refused = command(tmp_path, "quickstart", "--output", "q", status=2)
    assert "output_dir q/rl holds a finished model (model.safetensors)" in refused.stderr
