"""An output folder with another run's model or trajectories is an error."""

import errno
import fcntl
import inspect
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import Trainer

from arpo_trl.errors import ConfigError, DataError
from arpo_trl.publishing.push import Snapshot
from arpo_trl.quickstart import stages
from arpo_trl.quickstart.__main__ import main as quickstart
from arpo_trl.runs.checkpoints import Checkpoints
from arpo_trl.runs.output_folder import (
    check_output,
    last_whole_checkpoint,
    remove_earlier_run,
    sole_run,
    wants_to_resume,
)


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


def prepare(folder: Path, resume: str | bool | None = None, overwrite: bool = False, model: str | None = None) -> None:
    check_output(str(folder), resume=resume, overwrite=overwrite, model=model)
    if overwrite:
        remove_earlier_run(str(folder))


@pytest.mark.parametrize("remove", [lambda folder: Checkpoints(folder).clear(), remove_earlier_run])
def test_weights_that_a_killed_process_wrote_are_removed_at_the_next_start(tmp_path, remove):
    others = [".tmp", ".tmp12345", ".tmp1234567", ".tmp-abcde", ".tmpAb12cD.txt", "tmpAb12cD", ".tmpfolder/.tmpAb12cD"]
    fill(tmp_path, ".tmpAb12cD", *others, ".tmpabcdef/notes.txt")
    remove(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*others, ".tmpabcdef/notes.txt"}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("model.safetensors", "a finished model (model.safetensors)"),
        ("model-00001-of-00002.safetensors", "a finished model (model-00001-of-00002.safetensors)"),
        ("adapter_model.safetensors", "a finished model (adapter_model.safetensors)"),
        ("trajectories/step-000000-rank0.jsonl", "trajectories"),
        ("checkpoint-2/model.safetensors", "checkpoint-2"),
    ],
)
@pytest.mark.parametrize("resume", [None, False, "false"])
def test_what_an_earlier_run_left_is_refused(tmp_path, name, found, resume):
    fill(tmp_path, name)
    with pytest.raises(ConfigError) as raised:
        prepare(tmp_path, resume)
    assert f"contains {found} of an earlier run" in str(raised.value)
    assert "overwrite_output_dir" in str(raised.value)
    assert ("resume_from_checkpoint" in str(raised.value)) == (found == "checkpoint-2")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_readme_that_is_no_model_card_is_not_replaced(tmp_path, overwrite):
    (tmp_path / "README.md").write_text("# My project\n")
    with pytest.raises(ConfigError, match=r"contains a README\.md that is no model card, .* Choose another"):
        prepare(tmp_path, overwrite=overwrite)
    assert (tmp_path / "README.md").read_text() == "# My project\n"
    prepare(tmp_path, resume=True)
    (tmp_path / "README.md").write_text("---\nlibrary_name: transformers\n---\n")
    prepare(tmp_path, overwrite=overwrite)


@pytest.mark.parametrize("resume", [["x"], {"a": 1}, 5, 1e400])
def test_a_checkpoint_that_is_no_name_is_refused(tmp_path, resume):
    with pytest.raises(ConfigError, match=r"resume_from_checkpoint is .*; expected true, false or a checkpoint"):
        prepare(tmp_path, resume)


def test_a_name_that_no_folder_can_have_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for output, resume in ((tmp_path, "a\0b"), (tmp_path, str(tmp_path / "loop")), (tmp_path / ("x" * 300), None)):
        with pytest.raises(DataError, match=r"(output_dir|resume_from_checkpoint) is .*, which the system refuses: "):
            prepare(output, resume)


def test_the_newest_checkpoint_is_named_and_not_the_last_by_name(tmp_path):
    with pytest.raises(ConfigError, match="contains checkpoint-10 of an earlier run"):
        prepare(fill(tmp_path, "checkpoint-2/a", "checkpoint-10/a", "checkpoint-best/a"))


def test_the_last_whole_checkpoint_has_its_state_and_weights(tmp_path):
    fill(tmp_path, "checkpoint-2/model.safetensors", "checkpoint-4/model.safetensors", "checkpoint-8/optimizer.pt")
    assert last_whole_checkpoint(tmp_path)[0] is None
    for step in (2, 8):
        (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text('{"global_step": 2}', "utf-8")
    whole, faults = last_whole_checkpoint(tmp_path)
    assert whole == tmp_path / "checkpoint-2"
    assert faults[0] == f"{tmp_path / 'checkpoint-8'} contains no weights."
    assert faults[1].startswith(f"{tmp_path / 'checkpoint-4' / 'trainer_state.json'} cannot be read: ")
    (tmp_path / "checkpoint-8/pytorch_model_fsdp_0").mkdir()
    assert last_whole_checkpoint(tmp_path) == (tmp_path / "checkpoint-8", [])


def test_a_folder_without_a_run_is_accepted(tmp_path):
    prepare(tmp_path / "new")
    prepare(fill(tmp_path, "notes.txt", "data/rows.jsonl", "runs/events.out"))


def test_a_resumed_run_is_accepted(tmp_path):
    """Also before its first checkpoint, so that a job can be restarted with the same command."""
    prepare(fill(tmp_path, "trajectories/step-000000-rank0.jsonl"), "true")
    prepare(fill(tmp_path, "checkpoint-2/a", "model.safetensors"), True)
    prepare(tmp_path, str(tmp_path / "checkpoint-2"))


def test_a_run_that_cannot_resume_does_not_replace_a_model(tmp_path):
    fill(tmp_path / "a", "model.safetensors")
    fill(tmp_path / "b", "checkpoint-2/a")
    for resume in (True, str(tmp_path / "b" / "checkpoint-2")):
        with pytest.raises(ConfigError, match="contains a finished model"):
            prepare(tmp_path / "a", resume)


def test_overwriting_removes_the_run_and_nothing_else(tmp_path):
    fill(
        tmp_path,
        "model.safetensors",
        "adapter_config.json",
        "trajectories/step-000000-rank0.jsonl",
        "trainer_state.json",
    )
    mine = ["checkpoint-best/a", "checkpoint-notes.md", "data/rows.jsonl", "model_before.safetensors", "notes.txt"]
    fill(tmp_path, "checkpoint-2/a", ".unfinished/checkpoint-4/a", *mine)
    fill(tmp_path, "model-00001-of-00002.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
    prepare(tmp_path, overwrite=True)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == mine


def test_only_rank_0_looks_and_removes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    prepare(fill(tmp_path, "model.safetensors"))
    prepare(tmp_path, overwrite=True)
    assert (tmp_path / "model.safetensors").exists()


def test_a_run_does_not_remove_its_own_model(tmp_path):
    fill(tmp_path, "model.safetensors", "checkpoint-2/model.safetensors")
    for model in (tmp_path, tmp_path / "checkpoint-2"):
        with pytest.raises(ConfigError, match="which model_name_or_path needs"):
            prepare(tmp_path, overwrite=True, model=str(model))
    with pytest.raises(ConfigError, match="both set"):
        prepare(tmp_path, "true", overwrite=True)


@pytest.mark.parametrize(
    ("given", "meant"),
    [("true", True), (True, True), ("None", False), (None, False), ("a/checkpoint-2", "a/checkpoint-2")],
)
def test_resuming_is_read_from_flags_and_files(given, meant):
    assert wants_to_resume(given) == meant


def test_the_path_of_a_checkpoint_may_begin_in_a_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(tmp_path / "run", "checkpoint-2/arpo_state.json", "trajectories/step-000000-rank0.jsonl")
    prepare(Path("~/run"), "~/run/checkpoint-2")
    assert wants_to_resume("~/run/checkpoint-2") == str(tmp_path / "run" / "checkpoint-2")


@pytest.mark.parametrize("name", ["trajectories", ".unfinished", "curves", "checkpoint-5"])
def test_a_file_in_the_place_of_a_runs_folder_is_an_error_that_names_it(tmp_path, name):
    fill(tmp_path, name)
    for overwrite in (False, True):  # no run wrote it, so it is not removed
        with pytest.raises(ConfigError) as raised:
            prepare(tmp_path, overwrite=overwrite)
        assert str(raised.value) == (
            f"{tmp_path / name} is a file, but a run creates a folder of this name. Move it, or choose another "
            "output_dir."
        )
    assert (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["README.md", "training_config.yaml", "trainer_state.json", "evaluation.md"])
def test_a_folder_in_the_place_of_a_runs_file_is_an_error_that_names_it(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=rf"{name} is a folder, but a run creates a file of this name\. Move it"):
        prepare(tmp_path)


def test_a_link_to_nowhere_in_the_place_of_a_runs_folder_is_an_error(tmp_path):
    (tmp_path / "trajectories").symlink_to("missing")
    with pytest.raises(ConfigError, match="trajectories is a file, but a run creates a folder"):
        prepare(tmp_path)


def test_files_with_other_names_and_links_to_folders_may_be_in_an_output_folder(tmp_path):
    fill(tmp_path, "checkpoint-notes.txt", "checkpoint-5.txt", "trajectories.txt", "elsewhere/notes.txt")
    (tmp_path / "trajectories").symlink_to("elsewhere")
    prepare(tmp_path)


HOLDER = """
import sys
from arpo_trl.runs.output_folder import sole_run
with sole_run(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process with a run in the folder `run`. It ends when its input does."""
    words = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_second_run_in_the_same_folder_is_an_error_that_names_the_first(tmp_path, other):
    expected = rf"output_dir .*run is in use by another run \(process {other.pid} on .+\).* choose another output_dir"
    for _ in range(2):
        with pytest.raises(ConfigError, match=expected), sole_run(str(tmp_path / "run")):
            pytest.fail("both runs were accepted")
    with sole_run(str(tmp_path / "another")):
        pass
    other.communicate()
    with sole_run(str(tmp_path / "run")):
        pass


def test_a_killed_run_leaves_no_lock(tmp_path, other):
    fill(tmp_path / "run", "checkpoint-2/a")
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert (tmp_path / "run/_lock").exists()
    prepare(tmp_path / "run", resume=True)
    with sole_run(str(tmp_path / "run")):
        assert (tmp_path / "run/_lock").read_text().startswith(f"process {os.getpid()} on ")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-2"]


def test_a_process_that_a_run_has_forked_does_not_keep_its_lock(tmp_path):
    reader, writer = os.pipe()
    with sole_run(str(tmp_path)):
        if (child := os.fork()) == 0:
            os.close(writer)
            os.read(reader, 1)  # until the parent closes the pipe
            os._exit(0)
    os.close(reader)
    words = [sys.executable, "-c", HOLDER, str(tmp_path)]
    second = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, close_fds=True)
    os.close(writer)
    os.waitpid(child, 0)
    assert second.stdout == "locked\n"


def test_the_lock_of_a_killed_run_is_no_earlier_run(tmp_path):
    prepare(fill(tmp_path, "_lock"))


def test_a_run_that_writes_nothing_leaves_no_folder(tmp_path):
    with pytest.raises(ConfigError, match="mistake"), sole_run(str(tmp_path / "run")):
        raise ConfigError("mistake")
    assert not (tmp_path / "run").exists()
    with sole_run(str(tmp_path)):
        pass
    assert tmp_path.exists()


def test_other_ranks_lock_nothing(tmp_path, other, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with sole_run(str(tmp_path / "run")):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP])
def test_a_run_starts_where_files_cannot_be_locked(tmp_path, monkeypatch, code):
    def refused(*_: object) -> None:
        raise OSError(code, "no locks")

    monkeypatch.setattr(fcntl, "lockf", refused)
    with sole_run(str(tmp_path / "run")):
        pass


def test_a_run_starts_where_there_are_no_locks_or_the_folder_is_a_file(tmp_path, monkeypatch):
    with sole_run(str(fill(tmp_path, "file") / "file")):
        pass
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with sole_run(str(tmp_path / "run")):
        pass


def test_a_quickstart_does_not_remove_the_files_of_a_run(tmp_path, other, monkeypatch, capsys):
    fill(tmp_path / "run", "model.safetensors")
    (tmp_path / "quick").mkdir()
    (tmp_path / "quick/sft").symlink_to(tmp_path / "run")
    monkeypatch.setattr("sys.argv", ["arpo-trl", "--output", str(tmp_path / "quick"), "--overwrite_output_dir"])
    with pytest.raises(SystemExit):
        quickstart()
    assert f"in use by another run (process {other.pid} on" in capsys.readouterr().err
    assert (tmp_path / "run/model.safetensors").exists()


def test_a_quickstart_that_was_broken_off_is_refused_in_the_words_of_its_flags(tmp_path, monkeypatch, capsys):
    fill(tmp_path / "q", "sft/model.safetensors", "rl/checkpoint-2/a")
    flags = ["--task", "shop", "--output", str(tmp_path / "q")]
    for broken_off in ("sft", "rl"):
        monkeypatch.setattr("sys.argv", ["arpo-trl", *flags])
        with pytest.raises(SystemExit):
            quickstart()
        said = capsys.readouterr().err
        assert said.startswith(f"ConfigError: --output {tmp_path / 'q' / broken_off} contains ")
        assert " choose another --output. " in said and "resume" not in said
        (tmp_path / "q/sft/model.safetensors").unlink(missing_ok=True)


def test_a_quickstart_has_its_folder_to_itself_until_its_end(tmp_path, other, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["arpo-trl", "--task", "shop", "--output", str(tmp_path / "run")])
    monkeypatch.setattr(stages, "run", lambda *_, **__: print((tmp_path / "run/_lock").read_text()))
    with pytest.raises(SystemExit):
        quickstart()
    said = capsys.readouterr()
    assert said.out == "" and f"run is in use by another run (process {other.pid} on" in said.err
    assert said.err.startswith("ConfigError: --output ") and said.err.endswith("or choose another --output.\n")
    other.communicate()
    quickstart()
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"process {os.getpid()} on ")


def test_the_lock_is_not_pushed(tmp_path):
    with sole_run(str(tmp_path)), Snapshot(run=fill(tmp_path, "config.json"), model=tmp_path) as pushed:
        assert (tmp_path / "_lock").exists()
        assert [path.name for path in pushed.iterdir()] == ["config.json"]
    for method in (Trainer.push_to_hub, Trainer._push_from_checkpoint):  # of `sft`
        assert 'ignore_patterns=["_*"' in inspect.getsource(method)
