"""`arpo-trl plot` and `arpo-trl timeline`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from arpo_trl import cli
from arpo_trl.errors import ConfigError, DataError
from arpo_trl.logs.trajectories import TrajectoryLog
from arpo_trl.viewing.command import KINDS_OF_PLOTS
from arpo_trl.viewing.curves import PANELS
from arpo_trl.viewing.plot import draw_plot
from arpo_trl.viewing.timeline import tree_events, write_timeline
from test_view import logged


def run_with(folder: Path, *history: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return folder


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["arpo-trl", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_every_panel_can_be_drawn() -> None:
    assert tuple(panel.name for panel in PANELS) == KINDS_OF_PLOTS


def test_a_picture_goes_into_the_runs_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with(tmp_path / "a", {"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.75})
    assert command(monkeypatch, "plot", str(run)) == 0
    assert capsys.readouterr().out == f"{run}/reward.png\n"
    assert matplotlib.image.imread(run / "reward.png").shape[:2] == (760, 1280)  # 6.4 × 3.8 inches at 200 dpi


def test_the_lines_of_several_runs_name_their_run(tmp_path: Path) -> None:
    runs = [run_with(tmp_path / name, {"step": 1, "arpo/tools/calls_per_leaf": 2}) for name in ("a", "b")]
    draw_plot(runs, "tools", tmp_path / "both.svg")
    text = (tmp_path / "both.svg").read_text()
    assert "<!-- a: calls per leaf -->" in text and "<!-- b: calls per leaf -->" in text


def test_a_run_without_such_metrics_and_an_unknown_format_are_refused(tmp_path: Path) -> None:
    run = run_with(tmp_path / "a", {"step": 1, "reward": 0.5})
    with pytest.raises(DataError, match=r"has no logged phases. Give the output_dir"):
        draw_plot([run], "phases")
    with pytest.raises(ConfigError, match=r"--output is x.gif; expected a file that ends in .png, .svg, .pdf"):
        draw_plot([run], "reward", Path("x.gif"))


def test_a_timeline_tells_decoding_tools_and_waiting_per_path() -> None:
    events = list(tree_events(logged(group=2), rank=1))
    names = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names == {"group 2, rank 1", "path 0", "path 0,1,0"}
    spans = [(event["tid"], event["name"], event["ts"], event["dur"]) for event in events if event["ph"] == "X"]
    # The search ran for 0.1 s of the 0.25 s between its call and its result; microseconds
    assert spans == [
        (0, "decode", 0, 500_000),
        (0, "tool search", 500_000, 100_000),
        (0, "wait", 600_000, 150_000),
        (0, "decode", 750_000, 250_000),
        (1, "decode", 750_000, 500_000),
    ]


def test_the_timeline_is_that_of_the_newest_rollout_or_of_a_step(tmp_path: Path) -> None:
    log = TrajectoryLog(tmp_path / "trajectories", 1.0, 0, 0)
    for step in (3, 12):
        log.write(f"step-{step:06d}", [logged(step)])
    log.write("eval-000013", [logged(13)])
    path = write_timeline(tmp_path, None)
    assert path == tmp_path / "timeline-step-000012.json"
    assert len(json.loads(path.read_text())["traceEvents"]) == 8
    assert write_timeline(tmp_path, 3, tmp_path / "t.json") == tmp_path / "t.json"
    with pytest.raises(DataError, match="has no logged training rollout of step 13"):
        write_timeline(tmp_path, 13)


def test_trees_without_times_have_no_timeline(tmp_path: Path) -> None:
    path = TrajectoryLog(tmp_path / "trajectories", 1.0, 0, 0).write("step-000000", [logged(0)])
    assert path is not None
    row = json.loads(path.read_text())
    del row["spans"]
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="have no times: an older version"):
        write_timeline(tmp_path, None)
