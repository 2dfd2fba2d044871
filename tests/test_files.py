import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from arpo_trl.common.files import final_name, whole_file, whole_folder, write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_has_its_name_once_it_is_whole(tmp_path):
    path = tmp_path / "log.v1.jsonl"
    path.write_text("old")
    with whole_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old" and names(tmp_path) == ["log.v1.jsonl", partial.name]
        assert final_name(partial) == final_name(path) == "log.v1.jsonl"
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


def test_a_folder_has_its_name_when_complete(tmp_path):
    path = tmp_path / "new" / "model"
    with pytest.raises(OSError, match="full"), whole_folder(path) as partial:
        (partial / "torn").touch()
        raise OSError("full")
    assert names(tmp_path / "new") == []
    with whole_folder(path) as partial:
        (partial / "weights").touch()
        assert not path.exists()
    assert names(tmp_path / "new") == ["model"] and names(path) == ["weights"]


def test_two_writers_of_a_folder_or_file_do_not_mix(tmp_path):
    said = r"Another process has written it meanwhile: '.*model'"
    with pytest.raises(FileExistsError, match=said), whole_folder(tmp_path / "model") as second:
        (second / "second").touch()
        with whole_folder(tmp_path / "model") as first:
            (first / "first").touch()
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["first"]
    with whole_file(tmp_path / "log") as last, whole_file(tmp_path / "log") as first:
        last.write_text("last")
        first.write_text("first")
    assert names(tmp_path) == ["log", "model"] and (tmp_path / "log").read_text() == "last"


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        write_whole(tmp_path / "missing" / "page.html", "")
    assert raised.value.filename == str(tmp_path / "missing" / "page.html")


def test_a_link_stays_and_a_pipe_gets_the_content(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/page")  # dangling at first
    for text in ("old", "new"):
        write_whole(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "page").read_text() == text
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "pipe", "piped")
    assert os.read(reader, 100) == b"piped" and (tmp_path / "pipe").is_fifo()
    os.close(reader)
    assert names(tmp_path) == ["folder", "link", "pipe"] and names(tmp_path / "folder") == ["page"]


def test_weights_are_as_readable_as_their_folder(tmp_path):
    with whole_folder(tmp_path / "model") as partial:
        partial.chmod(0o755)
        save_file({"weight": torch.zeros(1)}, partial / "model.safetensors")
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode & 0o777 == 0o644


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
