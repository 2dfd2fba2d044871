"""`arpo-trl plot` and `arpo-trl timeline`."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from arpo_trl.errors import ConfigError, DataError
from arpo_trl.evaluation.engines import fingerprint
from arpo_trl.evaluation.settings import EvalSettings
from arpo_trl.logs.curves import PANELS, Panel, curves
from arpo_trl.logs.picture import COLOURS, picture
from arpo_trl.logs.trajectories import TrajectoryLog, logged_trees
from arpo_trl.options import RolloutSchedule
from arpo_trl.publishing.push import Snapshot
from arpo_trl.rollout.rules.threshold import Threshold
from arpo_trl.viewing.plot import draw_plot
from arpo_trl.viewing.timeline import tree_events, write_timeline
from support import Scripted, one_search, run_command
from test_view import logged


def run_with(folder: Path, *history: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return folder


def test_numbers_that_no_picture_can_show_are_left_out() -> None:
    values = [10**400, -(10**400), math.inf, math.nan, None, "1", 2]
    history = [{"step": step, "reward": value} for step, value in enumerate(values)]
    (panel,) = [panel for panel in PANELS if "reward" in panel.lines]
    assert list(curves(panel, history).values()) == [[(6, 2.0)]]


OF_TOOLS = {
    **{"arpo/entropy/after_search": "after search", "arpo/entropy/after_python": "after python"},
    "arpo/tools/search/failed": "share of search that failed",
}


@pytest.mark.slow
@pytest.mark.parametrize("extension", ["png", "svg"])
@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.name)
def test_every_kind_is_drawn_with_all_its_lines(tmp_path: Path, panel: Panel, extension: str) -> None:
    of_tools = {key: label for key, label in OF_TOOLS.items() if key.startswith(f"arpo/{panel.name}/")}
    labels = {**panel.lines, **of_tools}
    rows = [{"step": step, **{key: i * step for i, key in enumerate(labels)}} for step in (1, 2)]
    path = draw_plot([run_with(tmp_path / "a", *rows)], panel.name, tmp_path / f"picture.{extension}")
    if extension == "png":
        pixels = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int) @ [0x10000, 0x100, 1]
        assert {int(colour[1:], 16) for colour in COLOURS[: len(labels)]} <= set(np.unique(pixels).tolist())
    else:
        text = path.read_text("utf-8")
        assert text.startswith("<?xml") and all(f"<!-- {label} -->" in text for label in labels.values())


OKABE_ITO = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"]


@pytest.mark.parametrize("points", [2, 200])
@pytest.mark.parametrize(("runs", "metrics"), [(1, 6), (1, 12), (2, 6), (9, 6)])
def test_no_two_lines_look_the_same_and_all_colours_are_those_of_okabe_and_ito(
    runs: int, metrics: int, points: int
) -> None:
    lines = {
        Path(f"run{i}"): {f"metric {j}": [(step, 0.5) for step in range(points)] for j in range(metrics)}
        for i in range(runs)
    }
    drawn = picture(PANELS[0], lines).axes[0].lines
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in drawn}
    assert len(looks) == len(drawn) == runs * metrics
    assert {colour for colour, _, _ in looks} <= set(OKABE_ITO)


def test_a_picture_is_saved_in_the_runs_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with(tmp_path / "a", {"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.75})
    assert run_command(monkeypatch, "plot", str(run)) == 0
    assert capsys.readouterr().out == f"{run}/reward.png\n"
    assert matplotlib.image.imread(run / "reward.png").shape[:2] == (760, 1280)  # 6.4 × 3.8 inches at 200 dpi


def test_the_lines_of_several_runs_name_their_run(tmp_path: Path) -> None:
    runs = [run_with(tmp_path / name, {"step": 1, "arpo/tools/calls_per_leaf": 2}) for name in ("a", "b")]
    draw_plot(runs, "tools", tmp_path / "both.svg")
    text = (tmp_path / "both.svg").read_text()
    assert "<!-- a: calls per leaf -->" in text and "<!-- b: calls per leaf -->" in text


def test_runs_whose_folders_have_the_same_name_are_told_apart() -> None:
    runs = {Path(f"runs/seed{i}/rl"): {"reward": [(1, 0.5)]} for i in (0, 1)}
    (legend,) = picture(PANELS[0], runs).legends
    assert [text.get_text() for text in legend.get_texts()] == ["seed0/rl: reward", "seed1/rl: reward"]


def test_the_legend_has_the_name_of_each_run_as_it_is_written(tmp_path: Path) -> None:
    runs = {Path(name): {"reward": [(1, 0.5)]} for name in ("_x", "p$1$_{")}
    figure = picture(PANELS[0], runs)
    figure.savefig(tmp_path / "both.svg")
    text = (tmp_path / "both.svg").read_text()
    assert "<!-- _x: reward -->" in text and "<!-- p$1$_{: reward -->" in text


def test_a_run_without_such_metrics_and_an_unknown_format_are_refused(tmp_path: Path) -> None:
    run = run_with(tmp_path / "a", {"step": 1, "reward": 0.5})
    with pytest.raises(DataError, match=r"has no logged phases. Pass the output_dir"):
        draw_plot([run], "phases")
    with pytest.raises(ConfigError, match=r"--output is x.gif; expected a file that ends in .png, .svg, .pdf"):
        draw_plot([run], "reward", Path("x.gif"))


def test_a_timeline_tells_decoding_tools_and_waiting_per_path() -> None:
    events = list(tree_events(logged(group=2), rank=1, pid=3))
    names = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names == {"group 2, rank 1", "path 0", "path 0,1,0"}
    spans = [(event["tid"], event["name"], event["ts"], event["dur"]) for event in events if event["ph"] == "X"]
    # The search ran for 0.1 s of the 0.25 s between its call and its result; microseconds
    assert spans == [
        (1, "decode", 0, 500_000),
        (1, "tool search", 500_000, 100_000),
        (1, "wait", 600_000, 150_000),
        (1, "decode", 750_000, 250_000),
        (2, "decode", 750_000, 500_000),
    ]


def check_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a file, once it is what readers of the Trace Event Format take without leaving anything out.

    An object with `traceEvents`. Each event has a name, a phase, a process and a thread, counted from 1. Metadata (M)
    names each process and thread once. Complete events (X) have a start and a length in whole microseconds, and those
    of a thread do not overlap.
    """
    trace = json.loads(path.read_text("utf-8"))
    assert trace["displayTimeUnit"] in ("ms", "ns")
    events: list[dict[str, Any]] = trace["traceEvents"]
    named, used, spans = [], set(), {}
    for event in events:
        assert {"name", "ph", "pid", "tid", "args"} <= event.keys()
        assert type(event["pid"]) is int and type(event["tid"]) is int and min(event["pid"], event["tid"]) >= 1
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name") and isinstance(event["args"]["name"], str)
            named.append((event["pid"], event["tid"] if event["name"] == "thread_name" else None))
            continue
        assert event["ph"] == "X" and isinstance(event["cat"], str)
        assert type(event["ts"]) is int and type(event["dur"]) is int and min(event["ts"], event["dur"]) >= 0
        used |= {(event["pid"], None), (event["pid"], event["tid"])}
        spans.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    assert len(named) == len(set(named)) and used <= set(named)
    for of_thread in spans.values():
        of_thread.sort()
        assert all(end <= start for (_, end), (start, _) in pairwise(of_thread))
    return events


def test_trace_readers_accept_the_whole_file(tmp_path: Path) -> None:
    """Two ranks with trees of the same number, and times whose ends and lengths round differently.

    The turn lasts from 0.6 to 2.4 µs, which round to 1 and 2. Its length of 1.8 would round to 2, and it would end at
    3, after the start of the next span.
    """
    tree = dataclasses.replace(
        logged(), spans={1: (6e-7, 2.4e-6), 2: (2.4e-6, 4e-6), 3: (4e-6, 5e-6), 4: (4e-6, 7e-6)}
    )
    for rank in (0, 1):
        TrajectoryLog(tmp_path / "trajectories", 1.0, 0, rank).write("step-000000", [tree, logged(0, group=1)])
    events = check_trace(write_timeline(tmp_path, 0))
    assert sorted({event["pid"] for event in events}) == [1, 2, 3, 4]


@pytest.mark.parametrize("schedule", list(RolloutSchedule))
def test_the_timeline_of_the_samplers_trees_is_read_completely(tmp_path: Path, schedule: RolloutSchedule) -> None:
    rollout = Scripted(one_search, leaves=4, at_root=2, schedule=schedule)()
    trees = logged_trees(
        rollout.trees, [1.0] * 4, [0.0] * 4, step=0, first_group=0, decode=str, rule=Threshold(), spans=rollout.spans
    )
    TrajectoryLog(tmp_path / "trajectories", 1.0, 0, 0).write("step-000000", trees)
    events = check_trace(write_timeline(tmp_path, None))
    # two paths, each forked into two: a turn, its search, and two turns under the result
    assert [event["name"] for event in events].count("decode") == 6
    assert sum(event["name"] == "thread_name" for event in events) == 4


def test_the_timeline_is_that_of_the_newest_rollout_or_of_a_step(tmp_path: Path) -> None:
    log = TrajectoryLog(tmp_path / "trajectories", 1.0, 0, 0)
    for step in (3, 12):
        log.write(f"step-{step:06d}", [logged(step)])
    log.write("eval-000013", [logged(13)])
    path = write_timeline(tmp_path, None)
    assert path == write_timeline(tmp_path / "trajectories", 12) == tmp_path / "trajectories/timeline-step-000012.json"
    assert len(json.loads(path.read_text())["traceEvents"]) == 8
    assert write_timeline(tmp_path, 3, tmp_path / "t.json") == tmp_path / "t.json"
    with pytest.raises(DataError, match="has no logged training rollout of step 13"):
        write_timeline(tmp_path, 13)


def test_a_timeline_is_no_part_of_the_runs_model(tmp_path: Path) -> None:
    """A push would publish texts of turns and tool results, and an evaluation could not be resumed."""
    (tmp_path / "config.json").write_text("{}")
    TrajectoryLog(tmp_path / "trajectories", 1.0, 0, 0).write("step-000000", [logged()])
    before = fingerprint(EvalSettings(model=str(tmp_path)))
    write_timeline(tmp_path, None)
    assert fingerprint(EvalSettings(model=str(tmp_path))) == before
    with Snapshot(run=tmp_path, model=tmp_path) as pushed:
        assert [path.name for path in pushed.iterdir()] == ["config.json"]


def test_a_fingerprint_differs_if_any_tensor_does(tmp_path: Path) -> None:
    """As after merging an adapter without the first and the last tensors again."""

    def saved(**changed: float) -> str | None:
        tensors = {name: torch.zeros(1200, 1024) for name in "abc"} | {"scale": torch.ones(())}
        for name, value in changed.items():
            tensors[name] += value
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        return fingerprint(EvalSettings(model=str(tmp_path)))

    before = saved()
    assert saved() == before
    assert len({before, *(saved(**{name: 1.0}) for name in ("a", "b", "c", "scale"))}) == 5
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    assert fingerprint(EvalSettings(model=str(tmp_path))) is not None


def test_trees_without_times_have_no_timeline(tmp_path: Path) -> None:
    path = TrajectoryLog(tmp_path / "trajectories", 1.0, 0, 0).write("step-000000", [logged(0)])
    assert path is not None
    row = json.loads(path.read_text())
    del row["spans"]
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="have no times: an older version"):
        write_timeline(tmp_path, None)
