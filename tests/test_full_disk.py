import errno
import sqlite3
from pathlib import Path

import pytest
from safetensors import SafetensorError

from arpo_trl.command_line import report_errors
from arpo_trl.common.full_disk import as_free_space, full_disk_message, is_full_disk, naming
from arpo_trl.errors import ConfigError

FULL = OSError(errno.ENOSPC, "No space left on device")
OF_A_LIMIT = SafetensorError("Error while serializing: I/O error: File too large (os error 27)")
OF_SAFETENSORS = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def caused_by(cause: BaseException) -> Exception:
    """As after `raise … from cause`."""
    error = RuntimeError("cannot write")
    error.__cause__ = cause
    return error


def raised_during(first: BaseException, *, hidden: bool = False) -> Exception:
    """As raised in the handler of `first`; with `hidden`, by `raise … from None`."""
    error = RuntimeError("cannot close")
    error.__context__, error.__suppress_context__ = first, hidden
    return error


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OF_SAFETENSORS,
        RuntimeError("Disk quota exceeded (os error 122)"),
        OSError(errno.EFBIG, "File too large"),
        OF_A_LIMIT,
        sqlite3.OperationalError("database or disk is full"),
        OSError("300000 requested and 16352 written"),  # numpy
        raised_during(RuntimeError("basic_ios::clear: iostream error")),  # torch
        caused_by(FULL),
        raised_during(caused_by(FULL)),
    ],
    ids=repr,
)
def test_a_full_disk_is_recognized(error):
    assert is_full_disk(error)


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied"),
        OSError(errno.EACCES, "No space left on device"),  # the number counts
        RuntimeError("cannot write"),
        RuntimeError("the server answered 413: File too large"),
        raised_during(FULL, hidden=True),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_other_errors_are_not_a_full_disk(error):
    assert not is_full_disk(error)


def test_an_error_that_causes_itself_ends_the_search():
    error = RuntimeError("a")
    error.__cause__ = caused_by(error)
    assert not is_full_disk(error)


def test_the_free_space_of_a_missing_path_is_that_of_the_folder_above(monkeypatch, tmp_path):
    asked = []

    class Usage:
        free = 12_400_000

    monkeypatch.setattr("shutil.disk_usage", lambda path: asked.append(path) or Usage)
    assert as_free_space(tmp_path / "a" / "b") == "12 MB are free there"
    assert asked == [tmp_path]


def test_the_context_names_the_path_unless_the_error_does_and_changes_no_other_error(tmp_path):
    with pytest.raises(OSError, match="quota") as raised, naming(tmp_path):
        raise caused_by(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert (raised.value.errno, raised.value.filename) == (errno.EDQUOT, str(tmp_path))
    with pytest.raises(OSError, match="'b'"), naming(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device", "b")
    with pytest.raises(ConfigError, match="ours"), naming(tmp_path):
        raise ConfigError("ours") from FULL
    with pytest.raises(ValueError, match="other"), naming(tmp_path):
        raise ValueError("other")


def ends(error: BaseException) -> object:
    """The exit status of a command that raises `error`."""

    @report_errors
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


def test_a_command_says_in_one_line_which_file_does_not_fit_and_how_much_is_free(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("arpo_trl.common.full_disk.as_free_space", lambda path: f"3 MB are free at {Path(path).name}")
    assert ends(caused_by(OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "a")))) == 2
    assert capsys.readouterr().err == (
        f"RuntimeError: The disk is full: {tmp_path / 'a'} cannot be written (No space left on device); 3 MB are free "
        "at a. Free some space.\n"
    )


def test_a_command_says_in_one_line_that_the_disk_is_full_if_no_file_is_named(capsys):
    assert ends(OF_SAFETENSORS) == 2
    assert capsys.readouterr().err == f"SafetensorError: The disk is full ({OF_SAFETENSORS}). Free some space.\n"
    assert "free there" in full_disk_message(OSError(errno.ENOSPC, "No space left on device", b"bytes"))


@pytest.mark.parametrize("error", [OF_A_LIMIT, OSError(errno.EFBIG, "File too large")], ids=["rust", "python"])
def test_a_file_over_a_limit_is_no_full_disk_and_has_a_remedy_of_its_own(error, tmp_path):
    with pytest.raises(OSError) as raised, naming(tmp_path / "a"):
        raise error
    assert full_disk_message(raised.value) == (
        f"A file is too large: {tmp_path / 'a'} cannot be written (File too large); it exceeds the size of a file "
        "that ulimit -f or the file system allows. Raise the limit (ulimit -f unlimited), or write to another "
        "file system."
    )


def test_the_file_of_a_copy_that_does_not_fit_is_the_one_that_is_written(tmp_path):
    error = OSError(errno.ENOSPC, "No space left on device", "source", None, str(tmp_path / "target"))
    assert full_disk_message(error).startswith(f"The disk is full: {tmp_path / 'target'} cannot be written")


def test_a_traceback_is_kept_on_demand(monkeypatch):
    monkeypatch.setenv("ARPO_TRACEBACK", "1")

    @report_errors
    def main() -> None:
        raise FULL

    with pytest.raises(OSError, match="No space"):
        main()
