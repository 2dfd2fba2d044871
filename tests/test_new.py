import os
import shutil
from pathlib import Path

import pytest

from arpo_trl.commands.new import TEMPLATE, make_demonstrations
from arpo_trl.quickstart.model import save_cold_start_base
from arpo_trl.quickstart.taught import save_taught_model
from support import run_command


def new(monkeypatch, folder: Path | str, fails: BaseException | None) -> int:
    """The exit status of `arpo-trl new`, whose model is one file, after which `fails` is raised."""

    def save(folder: Path, *_: object) -> None:
        folder.mkdir()
        (folder / "model.safetensors").touch()
        if fails is not None:
            raise fails

    monkeypatch.setattr("arpo_trl.quickstart.taught.save_taught_model", save)
    return run_command(monkeypatch, "new", folder)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (OSError(28, "No space left on device"), 2, "OSError: The disk is full: {} cannot be written"),
        (KeyboardInterrupt(), 130, "Interrupted."),
    ],
    ids=["full", "interrupted"],
)
def test_a_failure_leaves_nothing_and_the_command_can_run_again(
    monkeypatch, capsys, tmp_path, error, status, said, exists
):
    folder = tmp_path / "my own"
    if exists:
        folder.mkdir()
    assert new(monkeypatch, folder, error) == status
    assert capsys.readouterr().err.splitlines()[-1].startswith(said.format(folder))
    assert [path.name for path in tmp_path.rglob("*")] == (["my own"] if exists else [])
    assert new(monkeypatch, folder, None) == 0
    assert {"README.md", "config.yaml", "questions.jsonl", ".gitignore", "model/model.safetensors"} <= files(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["my own"]
    assert f"cd '{folder}'\n" in capsys.readouterr().out


def test_the_current_folder_can_become_the_project(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert new(monkeypatch, ".", None) == 0
    assert "config.yaml" in files(tmp_path)


def test_the_files_of_a_project_can_be_written_though_those_of_the_package_cannot(monkeypatch, tmp_path):
    template = shutil.copytree(TEMPLATE, tmp_path / "installed")
    (template / "__pycache__").mkdir(exist_ok=True)
    for path in [*template.iterdir(), template]:
        os.utime(path, (0, 0))
        path.chmod(0o555 if path.is_dir() else 0o444)
    monkeypatch.setattr("arpo_trl.commands.new.TEMPLATE", template)
    assert new(monkeypatch, tmp_path / "project", None) == 0
    made = [tmp_path / "project", *(tmp_path / "project").iterdir()]
    assert "__pycache__" not in [path.name for path in made]
    assert all(path.stat().st_mode & 0o200 and path.stat().st_mtime > 0 for path in made)


def test_the_weights_of_the_tiny_models_are_as_readable_as_their_folder(tmp_path):
    demonstrations = make_demonstrations(seed=0)[:32]
    save_taught_model(tmp_path / "taught", ["What is the capital of France?"] * 9, demonstrations, 1)
    save_cold_start_base(tmp_path / "base")
    for folder in (tmp_path / "taught", tmp_path / "base"):
        assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
