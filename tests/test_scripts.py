"""The paper's configuration on rows of its layout, as a user starts it."""

import pytest

from arpo_trl.logs.trajectories import read_trees
from shipped import replacements, run, save_data
from support import save_tiny_model

pytestmark = pytest.mark.slow


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
