"""The scripts as a user starts them: cold start, training, and the paper's configuration on rows of its layout."""

import json
import os
from pathlib import Path

import pytest

import forked
from arpo_trl.logs.trajectories import read_trees
from arpo_trl.quickstart.__main__ import measure, prepare
from arpo_trl.quickstart.report import draw, entropy_places, summarise, summary_table
from arpo_trl.viewing.curves import PANELS, curves
from shipped import replacements, run, save_data
from support import child_environment, save_tiny_model

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def launch(script: str, *flags: str) -> str:
    """What `accelerate launch` and the script wrote."""
    launcher = ("-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/single.yaml")
    return forked.run([*launcher, script, *flags], cwd=ROOT, env=child_environment([script, *flags], os.environ))


def test_the_quickstart_runs_from_cold_start_to_picture(tmp_path):
    data, sft, rl = tmp_path / "data", tmp_path / "sft", tmp_path / "rl"
    prepare(data, seed=0)
    for name in ("demonstrations", "train", "heldout"):  # a few rows are enough here
        lines = (data / f"{name}.jsonl").read_text("utf-8").splitlines(keepends=True)
        (data / f"{name}.jsonl").write_text("".join(lines[:64]), "utf-8")
    launch(
        "sft.py",
        *("--config", "configs/quickstart_sft.yaml", "--max_steps", "2", "--model_name_or_path", str(data / "base")),
        *("--dataset", str(data / "demonstrations.jsonl"), "--output_dir", str(sft)),
    )
    before = measure(sft, data, 0, temperature=1.0)
    assert len(before.trees) == len(before.records) == 64
    written = launch(
        "train.py",
        *("--config", "configs/quickstart.yaml", "--model_name_or_path", str(sft), "--output_dir", str(rl)),
        *("--dataset", str(data / "train.jsonl"), "--eval_dataset", str(data / "heldout.jsonl")),
        *("--search_index", str(data / "corpus.jsonl"), "--max_steps", "2", "--per_device_train_batch_size", "16"),
        *("--eval_steps", "1", "--per_device_eval_batch_size", "64", "--trajectory_log_rate", "1"),
    )
    assert written.count("During a rollout the KV cache takes up to") == 1
    history = json.loads((rl / "trainer_state.json").read_text("utf-8"))["log_history"]
    summary = {
        **dict.fromkeys(("accuracy_before", "accuracy_after", "greedy_before", "greedy_after"), 0.0),
        **{"seconds_sft": 1.0, "seconds_rl": 1.0},
        **summarise(history),
    }
    assert (summary["leaves"], summary["steps"]) == (32, 2)
    assert summary["branches"] + summary["topups"] == 16  # M − N = 4 in each of the 4 groups
    places = entropy_places(before.trees, ("search", "python"))
    assert list(places) == ["after search", "after python", "elsewhere"]
    draw(history, summary, places, places, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert summary_table(summary).row_count == 8
    for panel in PANELS:
        assert set(panel.lines.values()) <= set(curves(panel, history)), panel.name
    trees = [tree for file in sorted((rl / "trajectories").glob("step-*.jsonl")) for tree in read_trees(file)]
    assert len(trees) == 4


def test_the_papers_configuration_trains_on_rows_of_its_layout_and_reports_faults(tmp_path, caplog):
    save_data(tmp_path)
    run(
        "reasoning_10k.yaml",
        *replacements(save_tiny_model(tmp_path / "model"), tmp_path, tmp_path / "out"),
        *("--max_steps", "2", "--gradient_accumulation_steps", "1", "--steps_per_generation", "1"),
        *("--trajectory_log_rate", "1"),
    )
    for alarm in ("alarm/unparsed", "alarm/truncated", "alarm/zero_variance_groups"):
        assert f"arpo/{alarm}:" in caplog.text
    assert len(list((tmp_path / "out" / "trajectories").glob("*.jsonl"))) == 2
    assert "\x08" not in next(read_trees(tmp_path / "out/trajectories/step-000000-rank0.jsonl")).prompt
