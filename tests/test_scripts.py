"""The paper's configuration on rows of its layout, as a user starts it."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, modeling_utils

from arpo_trl.logs.trajectories import read_trees
from arpo_trl.runs.interrupts import Interrupts
from shipped import replacements, run, save_data
from support import save_tiny_model

pytestmark = pytest.mark.slow


def earlier_run(folder: Path) -> list[Path]:
    files = [folder / "model-00001-of-00002.safetensors", folder / "trajectories" / "step-000000-rank0.jsonl"]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x", "utf-8")
    return files


@pytest.mark.parametrize(
    ("name", "config", "mistake"),
    [
        ("train", "quickstart.yaml", ["--lora_r", "0"]),
        ("train", "quickstart.yaml", ["--dataset", "missing.jsonl"]),
        ("train", "reasoning_10k.yaml", ["--search_index", "missing.jsonl", "--dataset", "rows.parquet"]),
        ("sft", "quickstart_sft.yaml", ["--model_name_or_path", "./missing"]),
        ("sft", "quickstart_sft.yaml", ["--model_name_or_path", "model", "--dataset", "missing.jsonl"]),
    ],
)
def test_a_mistake_at_the_start_leaves_the_run_that_would_be_overwritten(
    tmp_path, monkeypatch, capsys, name, config, mistake
):
    monkeypatch.chdir(tmp_path)
    save_data(tmp_path)
    save_tiny_model(tmp_path / "model")
    files = earlier_run(tmp_path / "out")
    with pytest.raises(SystemExit, match="2"):
        run(config, "--output_dir", "out", "--overwrite_output_dir", "true", *mistake, name=name)
    assert mistake[1] in capsys.readouterr().err
    assert all(file.exists() for file in files)


def test_a_cold_start_of_a_quantized_model_without_an_adapter_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        flags = ["--output_dir", str(tmp_path / "out"), "--model_name_or_path", "model", "--load_in_4bit", "true"]
        run("quickstart_sft.yaml", *flags, name="sft")
    assert "there is no adapter to train. Set use_peft: true" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "config"), [("train", "quickstart.yaml"), ("sft", "quickstart_sft.yaml")])
def test_a_second_run_does_not_remove_the_files_of_the_first_while_it_runs(
    tmp_path, monkeypatch, capsys, name, config
):
    monkeypatch.chdir(tmp_path)
    save_data(tmp_path)
    save_tiny_model(tmp_path / "model")
    files = earlier_run(tmp_path / "out")
    code = (
        "import sys; from arpo_trl.runs.output_folder import sole_run\n"
        "with sole_run(sys.argv[1]): print(1, flush=True); input()"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "out")]
    root = Path(__file__).parents[1]
    with subprocess.Popen(words, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"1\n"
        with pytest.raises(SystemExit, match="2"):
            run(config, "--output_dir", "out", "--overwrite_output_dir", "true", name=name)
        first.communicate(b"\n")
    assert f"output_dir out is in use by another run (process {first.pid} on" in capsys.readouterr().err
    assert all(file.exists() for file in files)


def test_the_papers_configuration_trains_on_rows_of_its_layout_and_reports_faults(tmp_path, caplog):
    save_data(tmp_path)
    earlier_run(tmp_path / "out")
    run(
        "reasoning_10k.yaml",
        *("--overwrite_output_dir", "true"),
        *replacements(save_tiny_model(tmp_path / "model"), tmp_path, tmp_path / "out"),
        *("--max_steps", "2", "--gradient_accumulation_steps", "1", "--steps_per_generation", "1"),
        *("--trajectory_log_rate", "1"),
    )
    for alarm in ("alarm/unparsed", "alarm/truncated", "alarm/zero_variance_groups"):
        assert f"arpo/{alarm}:" in caplog.text
    assert len(list((tmp_path / "out" / "trajectories").glob("*.jsonl"))) == 2
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert "\x08" not in next(read_trees(tmp_path / "out/trajectories/step-000000-rank0.jsonl")).prompt


OF_SAFETENSORS = "Error while serializing: I/O error: No space left on device (os error 28)"


def fill_the_disk(monkeypatch, folder: str) -> None:
    """Weights no longer fit into the folders of this name."""
    save = modeling_utils.safe_save_file

    def full(weights: object, path: str, **more: object) -> None:
        if Path(path).parent.name == folder:
            raise SafetensorError(OF_SAFETENSORS)
        save(weights, path, **more)

    monkeypatch.setattr(modeling_utils, "safe_save_file", full)


def starts(name: str, folder: Path) -> list[str]:
    """The configuration and the flags of a run of one step."""
    save_data(folder)
    model = save_tiny_model(folder / "model")
    if name == "train":
        small = ("--gradient_accumulation_steps", "1", "--steps_per_generation", "1")
        return ["reasoning_10k.yaml", *replacements(model, folder, folder / "out"), *small]
    messages = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "<answer>2</answer>"}]
    (folder / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n", "utf-8")
    return [
        *("quickstart_sft.yaml", "--model_name_or_path", model, "--dataset", str(folder / "rows.jsonl")),
        *("--output_dir", str(folder / "out"), "--max_steps", "1", "--use_cpu", "true"),
    ]


@pytest.mark.parametrize("name", ["train", "sft"])
@pytest.mark.parametrize("saves", ["steps", "no"])
def test_a_disk_that_is_full_at_the_end_is_one_line_that_names_the_last_checkpoint(
    tmp_path, monkeypatch, capsys, name, saves
):
    started = starts(name, tmp_path)
    fill_the_disk(monkeypatch, "out")
    with pytest.raises(SystemExit, match="2"):
        run(*started, "--save_strategy", saves, "--save_steps", "1", name=name)
    out = tmp_path / "out"
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(
        f"CheckpointError: The trained model could not be saved to {out} (SafetensorError: {OF_SAFETENSORS}); "
    )
    assert "MB are free there. " in said
    if saves == "no":
        assert "There is no checkpoint, so the model is lost. Free some space, and set save_strategy" in said
        return
    assert f"The last checkpoint is {out / 'checkpoint-1'}. Free some space, then resume" in said
    monkeypatch.undo()
    run(*started, "--save_strategy", saves, "--save_steps", "1", "--resume_from_checkpoint", "true", name=name)
    assert (out / "model.safetensors").exists()


def test_a_cold_start_that_was_killed_in_a_checkpoint_resumes_from_the_one_before(tmp_path, caplog, capsys):
    started, out = starts("sft", tmp_path), tmp_path / "out"
    saves = ("--save_strategy", "steps", "--save_steps", "1", "--max_steps")
    run(*started, *saves, "2", name="sft")
    torn = out / "checkpoint-2" / "trainer_state.json"
    torn.write_text(torn.read_text("utf-8")[:100], "utf-8")
    run(*started, *saves, "3", "--resume_from_checkpoint", "true", name="sft")
    assert f"A checkpoint is not used: {torn}: not valid JSON" in caplog.text
    assert json.loads((out / "checkpoint-3" / "trainer_state.json").read_text("utf-8"))["global_step"] == 3
    for path in out.glob("checkpoint-*"):
        (path / "trainer_state.json").unlink()
    with pytest.raises(SystemExit, match="2"):
        run(*started, *saves, "4", "--resume_from_checkpoint", "true", name="sft")
    said = capsys.readouterr().err
    assert f"CheckpointError: No checkpoint in {out} is complete. {out / 'checkpoint-3'}" in said
    assert "Delete its checkpoint folders to start a new run." in said


@pytest.mark.parametrize("name", ["train", "sft"])
def test_a_signal_during_the_final_save_ends_the_run_when_the_model_is_saved(tmp_path, monkeypatch, capsys, name):
    started, save, out = starts(name, tmp_path), modeling_utils.safe_save_file, tmp_path / "out"

    def interrupted(*args: object, **more: object) -> None:
        signal.raise_signal(signal.SIGINT)
        save(*args, **more)

    def leave(status: int) -> NoReturn:
        raise SystemExit(status)

    monkeypatch.setattr(modeling_utils, "safe_save_file", interrupted)
    monkeypatch.setattr("arpo_trl.runs.interrupts.leave", leave)  # it would end the tests, too
    monkeypatch.setattr(Interrupts, "stopped", False)
    with pytest.raises(SystemExit, match="130"):
        run(*started, "--save_strategy", "no", name=name)
    said = capsys.readouterr().err
    assert "SIGINT: stopping when the model is saved. Ctrl-C again stops immediately." in said
    assert said.splitlines()[-1] == f"Interrupted by SIGINT. The trained model is saved in {out}."
    assert AutoModelForCausalLM.from_pretrained(out).config.model_type
    assert (out / "README.md").exists() == (name == "train")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "train",
            "CheckpointError: checkpoint-1 could not be written to {out} (SafetensorError: {error}); 0 MB are free "
            "there. There is no earlier checkpoint. Free some space, then resume with --resume_from_checkpoint true, "
            "in a script of your own with trainer.train(resume_from_checkpoint=True).",
        ),
        (
            "sft",
            "OSError: The disk is full: {out} cannot be written (No space left on device); 0 MB are free there. "
            "Free some space.",
        ),
    ],
)
def test_a_disk_that_is_full_at_a_checkpoint_is_one_line(tmp_path, monkeypatch, capsys, name, said):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    started = starts(name, tmp_path)
    fill_the_disk(monkeypatch, "checkpoint-1")
    with pytest.raises(SystemExit, match="2"):
        run(*started, "--save_strategy", "steps", "--save_steps", "1", name=name)
    expected = said.format(out=tmp_path / "out", error=OF_SAFETENSORS)
    assert capsys.readouterr().err.splitlines()[-1] == expected
