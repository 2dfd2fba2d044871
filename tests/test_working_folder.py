"""A tool that changes the working folder does not move the run's files."""

import os

import pytest

from arpo_trl.common.working_folder import kept_working_folder


@pytest.mark.parametrize("is_removed", [False, True])
def test_a_change_of_the_working_folder_is_undone_with_a_warning(is_removed, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    with kept_working_folder():
        os.chdir(tmp_path / "other")
        if is_removed:
            (tmp_path / "other").rmdir()
    assert os.getcwd() == str(tmp_path)
    place = "a folder that no longer exists" if is_removed else tmp_path / "other"
    assert f"changed the working folder of the run to {place}. It is {tmp_path} again" in caplog.text


def test_a_change_before_the_context_is_undone_too(tmp_path, monkeypatch, caplog):
    """Such as one by a tool that a rollout ahead ran during the update."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    os.chdir(tmp_path / "other")
    with kept_working_folder(str(tmp_path)):
        assert os.getcwd() == str(tmp_path)
    assert "changed the working folder of the run" in caplog.text


def test_a_run_in_a_removed_folder_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    os.chdir(tmp_path / "other")
    (tmp_path / "other").rmdir()
    with kept_working_folder():
        os.chdir(tmp_path)
    assert caplog.text == ""


def test_an_unchanged_working_folder_is_no_warning(caplog):
    with kept_working_folder():
        pass
    assert caplog.text == ""
