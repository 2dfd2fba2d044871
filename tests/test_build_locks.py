"""An abandoned lock of a killed build does not block a run. A lock that a process holds is not removed."""

import logging
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton

from arpo_trl.common import build_locks
from arpo_trl.common.build_locks import remove_left_build_locks
from arpo_trl.errors import ConfigError

HOLDER = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """A lock of a build in which nothing has changed for ten minutes, with a PyTorch that waits for its removal."""
    monkeypatch.setattr(cpp_extension, "FileBaton", FileBaton, raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    folder = tmp_path / "cpu_adam"
    folder.mkdir()
    for name in ("build.ninja", "cpu_adam.o", "lock"):
        (folder / name).touch()
        os.utime(folder / name, (time.time() - 600,) * 2)
    return folder / "lock"


def test_a_lock_without_a_holder_is_removed_with_a_warning(lock, caplog):
    remove_left_build_locks(None)
    assert not lock.exists() and (lock.parent / "cpu_adam.o").exists()
    assert f"{lock} is the lock of a build that was killed" in caplog.text


def test_a_lock_for_which_pytorch_does_not_wait_stays(lock, caplog, monkeypatch):
    """The kernel releases the locks of PyTorch 2.15, whose files stay after each build."""
    monkeypatch.delattr(cpp_extension, "FileBaton")
    remove_left_build_locks(None)
    assert lock.exists() and not caplog.text


def test_without_deepspeed_nothing_is_touched(lock, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    remove_left_build_locks(None)
    assert lock.exists()
    remove_left_build_locks({"zero_optimization": {"stage": 3}})  # as `TrainingArguments.deepspeed` has it
    assert not lock.exists()


@pytest.mark.slow
def test_a_lock_that_a_process_of_pytorch_holds_stays_until_it_is_killed(lock, caplog):
    lock.unlink()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        os.utime(lock, (time.time() - 600,) * 2)
        start = time.monotonic()
        remove_left_build_locks(None)
        assert lock.exists() and not caplog.text
        assert time.monotonic() - start < build_locks.QUIET_S / 2
    finally:
        holder.kill()
        holder.communicate()
    assert lock.exists()
    remove_left_build_locks(None)
    assert not lock.exists()


def test_while_the_folder_still_changes_another_machine_may_be_building(lock, monkeypatch, caplog):
    (lock.parent / "cpu_adam.o").touch()
    changed = (lock.parent / "cpu_adam.o").stat().st_mtime
    now = [changed + 1.0]

    def sleep(seconds: float) -> None:
        assert lock.exists()
        now[0] += 300 * seconds

    monkeypatch.setattr(build_locks, "time", SimpleNamespace(time=lambda: now[0], sleep=sleep))
    remove_left_build_locks(None)
    assert not lock.exists() and changed + build_locks.QUIET_S <= now[0] < changed + build_locks.QUIET_S + 30
    assert "no process of this machine holds it. It is removed in 119 s unless" in caplog.text


def test_a_build_of_another_machine_that_ends_meanwhile_is_waited_for(lock, monkeypatch, caplog):
    lock.touch()
    threading.Timer(0.5, lock.unlink).start()
    remove_left_build_locks(None)
    assert not lock.exists() and "was left" not in caplog.text


def test_only_the_first_process_of_a_machine_removes_it_and_the_others_wait(lock, monkeypatch, caplog):
    monkeypatch.setenv("LOCAL_RANK", "1")
    second = threading.Thread(target=remove_left_build_locks, args=(None,), daemon=True)
    second.start()
    second.join(1.0)
    assert second.is_alive() and lock.exists()
    monkeypatch.setenv("LOCAL_RANK", "0")
    remove_left_build_locks(None)
    second.join(60.0)
    assert not second.is_alive()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_lock_that_cannot_be_removed_is_named_with_the_remedy(lock):
    lock.unlink()
    lock.mkdir()
    os.utime(lock, (time.time() - 600,) * 2)
    with pytest.raises(ConfigError, match=r"cpu_adam/lock is the lock of a build.*set TORCH_EXTENSIONS_DIR"):
        remove_left_build_locks(None)
