import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from datasets import load_dataset

from arpo_trl.errors import DataError
from arpo_trl.logs.trajectories import LogFile, LoggedTree, TrajectoryLog, log_files
from arpo_trl.publishing.trajectory_dataset import dataset_card, export_rows
from support import ANSWER, Scripted


def searching(request, context):
    return ANSWER if request.key[-1] else f"<search>iron {request.key[1]}</search>"


def log(folder, name: str, script=searching, rewards=(1.0, None, 0.0, 0.5)):
    tree = Scripted(script, leaves=4, at_root=4)().trees[0]
    return TrajectoryLog(folder, 1.0, 0, 3).write(
        name,
        [
            LoggedTree(
                step=7,
                group=2,
                prompt="what is «it»\u2028?",
                tree=tree,
                rewards=list(rewards),
                advantages=[0.5, 0.0, -1.5, 1.0],
            )
        ],
    )


def rows(folder, logs, split="train"):
    splits = export_rows([file for path in logs if (file := LogFile.of(path))], folder / "data")
    (folder / "README.md").write_text(dataset_card("me/trees", splits), "utf-8")
    return load_dataset(str(folder), split=split, cache_dir=str(folder / "cache"))


def test_a_leaf_is_a_row_with_all_that_was_logged_of_it(tmp_path):
    made = rows(tmp_path / "out", [log(tmp_path, "step-000007")])
    assert len(made) == 4
    row = made[1]
    assert {name: row[name] for name in ("step", "rollout", "rank", "group", "leaf")} == {
        **{"step": 7, "rollout": "step-000007", "rank": 3, "group": 2, "leaf": 1}
    }
    assert (row["prompt"], row["reward"], row["advantage"]) == ("what is «it»\u2028?", None, 0.0)
    assert row["completion"] == [
        {"role": "assistant", "content": "<search>iron 1</search>", "name": None},
        {"role": "tool", "content": "facts about iron 1", "name": "search"},
        {"role": "assistant", "content": ANSWER, "name": None},
    ]
    (call,) = row["tool_calls"]
    assert (call["name"], json.loads(call["arguments"]), call["failure"]) == ("search", {"query": "iron 1"}, None)
    assert row["shared_with"] == 1 and row["completion_tokens"] > 10


def test_the_dataset_is_loaded_as_on_the_page(tmp_path, monkeypatch):
    rows(tmp_path / "out", [log(tmp_path, "step-000007")])
    page = (Path(__file__).parents[1] / "docs" / "hub.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    names: dict[str, Any] = {}
    exec(code.replace("me/my-trees", str(tmp_path / "out")), names)
    assert names["trajectories"]["leaf"] == [0, 1, 2, 3]


def test_a_path_without_a_call_has_none(tmp_path):
    row = rows(tmp_path / "out", [log(tmp_path, "step-000000", lambda request, context: ANSWER)])[0]
    assert (row["tool_calls"], len(row["completion"]), row["shared_with"]) == ([], 1, 1)


def test_evaluations_are_a_split_of_their_own(tmp_path):
    logs = [log(tmp_path, name) for name in ("step-000000", "step-000001", "eval-000001")]
    made = rows(tmp_path / "out", logs)
    assert sorted(set(made["rollout"])) == ["step-000000", "step-000001"]
    evaluated = load_dataset(str(tmp_path / "out"), split="evaluation", cache_dir=str(tmp_path / "cache"))
    assert set(evaluated["rollout"]) == {"eval-000001"}


def test_the_card_names_only_the_splits_that_there_are():
    head = yaml.safe_load(dataset_card("me/trees", ["evaluation"]).split("---\n")[1])
    assert head["configs"][0]["data_files"] == [{"split": "evaluation", "path": "data/evaluation.parquet"}]


def test_a_broken_log_is_named(tmp_path):
    path = tmp_path / "step-000000-rank0.jsonl"
    path.write_text("{}\n")
    with pytest.raises(DataError, match=r"step-000000-rank0\.jsonl, line 1: not a logged tree"):
        export_rows(log_files(tmp_path), tmp_path / "data")


def test_a_file_with_another_name_is_not_a_log(tmp_path):
    for name in (
        "step-000001-rankx.jsonl",
        "foo-rank0.jsonl",
        "notes.jsonl",
        "step-000001-rank0.jsonl.partial-0a1b2c3d",
    ):
        (tmp_path / name).write_text("")
    assert log_files(tmp_path) == []
