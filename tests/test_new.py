from pathlib import Path

import pytest

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
