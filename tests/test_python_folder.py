"""A folder that hostile code has filled is measured and removed, without recursion and with few descriptors."""

import os
import resource
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from arpo_trl.tools.python.folder import empty, holds_more, remove

DEEP = 1100  # beyond what Python recurses, what a path can name and, below, what a process opens


@pytest.fixture(autouse=True)
def removed(tmp_path: Path) -> Iterator[None]:
    """Removes what a failing test leaves: pytest cannot remove folders that are nested this deep."""
    yield
    subprocess.run(["rm", "-rf", str(tmp_path)], check=True)


@contextmanager
def few_descriptors(beyond: int) -> Iterator[None]:
    """At most as many more than are open now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))  # the limit is one of numbers, and lower ones may be free
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + beyond, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def nest(folder: Path, depth: int) -> None:
    """`depth` folders in each other, a file and a link in each."""
    here = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("nested", dir_fd=here)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=here))
        os.symlink("/", "link", dir_fd=here)
        below = os.open("nested", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


def test_folders_nested_beyond_recursion_paths_and_descriptors_are_removed(tmp_path: Path) -> None:
    nest(tmp_path, DEEP)
    with few_descriptors(8):
        empty(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_folders_without_rights_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for mode in (0o000, 0o100, 0o300, 0o500):
        made = folder / f"{mode:o}"
        (made / "in it").mkdir(parents=True)
        (made / "file").write_text("x")
        made.chmod(mode)
    folder.chmod(0o000)
    remove(folder)
    assert not folder.exists()


def test_what_links_point_to_stays(tmp_path: Path) -> None:
    kept, folder = tmp_path / "kept", tmp_path / "folder"
    kept.mkdir()
    (kept / "file").write_text("as it was")
    folder.mkdir()
    (folder / "link").symlink_to(kept)
    (folder / "file link").symlink_to(kept / "file")
    remove(folder)
    assert (kept / "file").read_text() == "as it was"


def test_a_folder_that_is_still_written_to_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    dies = threading.Event()

    def write() -> None:
        number = 0
        while not dies.wait(0.001):
            number += 1
            try:
                (folder / str(number)).touch()
            except FileNotFoundError:
                return

    writer = threading.Thread(target=write)
    writer.start()
    remove(folder)
    dies.set()
    writer.join()
    assert not folder.exists()


def test_a_folder_that_cannot_be_removed_is_named_in_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    folder.write_text("a file in its place")
    monkeypatch.setattr("arpo_trl.tools.python.folder._REMOVAL_WAIT_S", 0.0)
    with pytest.warns(UserWarning, match=rf"The folder {folder} of a Python worker cannot be removed \(.*\). Remove"):
        remove(folder)


def test_removing_a_missing_file_is_not_an_error(tmp_path: Path) -> None:
    remove(tmp_path / "never there")


def test_files_and_bytes_are_counted_in_all_folders_and_links_not_followed(tmp_path: Path) -> None:
    # Five entries: two folders, two files, a link. A file of 64 KiB takes at least 128 blocks of 512 bytes.
    (tmp_path / "a" / "b").mkdir(parents=True)
    with (tmp_path / "a" / "b" / "large").open("wb") as large:
        large.write(os.urandom(1 << 16))
        large.flush()
        os.fsync(large.fileno())  # some file systems know the blocks only then
    (tmp_path / "a" / "small").touch()
    (tmp_path / "link").symlink_to("/")
    assert not holds_more(tmp_path, files=5, size=1 << 20)
    assert holds_more(tmp_path, files=4, size=1 << 20)
    assert holds_more(tmp_path, files=5, size=(1 << 16) - 1)


def test_files_that_are_removed_meanwhile_do_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    for number in range(8):
        (tmp_path / "a" / str(number)).write_bytes(os.urandom(1 << 16))
    scan = os.scandir

    def removing(path: str) -> Any:
        entries = list(scan(path))
        for entry in entries[:2] if path.endswith("a") else ():
            os.unlink(entry.path)
        return nullcontext(entries)

    monkeypatch.setattr(os, "scandir", removing)
    assert holds_more(tmp_path, files=8, size=1 << 30)
    assert holds_more(tmp_path, files=100, size=1 << 16)


def test_a_sparse_file_counts_with_its_disk_usage(tmp_path: Path) -> None:
    with open(tmp_path / "holes", "wb") as file:
        file.truncate(1 << 30)
    assert not holds_more(tmp_path, files=1, size=1 << 16)


def test_a_folder_too_deep_to_read_is_over_the_limit(tmp_path: Path) -> None:
    nest(tmp_path, DEEP)
    assert holds_more(tmp_path, files=10**6, size=1 << 40)
    empty(tmp_path)
