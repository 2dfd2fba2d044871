import errno
from pathlib import Path

import pytest

from arpo_trl.common.files import whole_file, whole_folder, write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_has_its_name_once_it_is_whole(tmp_path):
    path = tmp_path / "log.v1.jsonl"
    path.write_text("old")
    with whole_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old" and names(tmp_path) == ["log.v1.jsonl", "log.v1.jsonl.partial"]
    assert path.read_text() == "new" and names(tmp_path) == ["log.v1.jsonl"]


def test_an_error_leaves_the_old_file_and_nothing_else_and_the_next_writer_succeeds(tmp_path):
    path = tmp_path / "log"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), whole_file(path) as partial:
        partial.write_text("torn")
        raise OSError("full")
    assert path.read_text() == "old" and names(tmp_path) == ["log"]
    write_whole(path, "né")
    assert path.read_bytes() == b"n\xc3\xa9" and names(tmp_path) == ["log"]


def test_lone_surrogates_are_an_error_unless_they_are_to_be_replaced(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "a", "\ud800")
    assert names(tmp_path) == []
    write_whole(tmp_path / "a", "\ud800", errors="replace")
    assert (tmp_path / "a").read_text() == "?"


def test_a_folder_has_its_name_when_complete_and_contains_no_files_of_earlier_attempts(tmp_path):
    path = tmp_path / "new" / "model"
    with pytest.raises(OSError, match="full"), whole_folder(path) as partial:
        (partial / "torn").touch()
        raise OSError("full")
    assert names(tmp_path / "new") == []
    (tmp_path / "new" / "model.partial" / "of a crash").mkdir(parents=True)
    with whole_folder(path) as partial:
        (partial / "weights").touch()
        assert not path.exists()
    assert names(tmp_path / "new") == ["model"] and names(path) == ["weights"]


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_ctrl_c_leaves_nothing(tmp_path, whole):
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "log") as partial:
        (partial if whole is whole_file else partial / "weights").touch()
        raise KeyboardInterrupt
    assert names(tmp_path) == []


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_a_full_disk_is_an_error_that_names_the_file_or_folder(tmp_path, whole):
    with pytest.raises(OSError, match="No space left") as raised, whole(tmp_path / "log"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path / "log"))
