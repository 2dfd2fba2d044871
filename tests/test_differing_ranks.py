"""What differs between two processes: a decision of a callback counts for both, other rows or folders
are errors."""

import json
from typing import Any

import pytest

from ranks import launch
from resuming import save_calling_model

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> list[dict[str, Any]]:
    """What each rank has seen."""
    folder = tmp_path_factory.mktemp("differing")
    launch("ddp", "tests/differing_ranks.py", save_calling_model(folder / "model"), str(folder))
    return [json.loads((folder / f"rank{rank}.json").read_text("utf-8")) for rank in (0, 1)]


def test_what_a_callback_decides_on_one_rank_all_ranks_do(said):
    """The second epoch has all its 5 steps, and ends the training: at step 8."""
    assert said[0]["decided"] == said[1]["decided"]
    assert said[0]["decided"] == {
        "seen": [
            *(["epoch", 0], ["log", 1], ["evaluate", 2], ["save", 2], ["log", 3]),
            *(["epoch", 3], ["log", 8]),
        ],
        "steps": 8,
    }


def test_rows_that_differ_between_ranks_are_an_error_on_all(said):
    for rank in said:
        of_train, of_evaluation = (
            f"The processes have different rows in the {name}, so that they would not share its rows. All of them "
            "need all rows, in the same order. Give `shuffle` and `train_test_split` a seed, as in "
            "dataset.train_test_split(test_size=0.1, seed=42)."
            for name in ("training dataset", "evaluation dataset held out")
        )
        assert rank["rows"] == {"order": of_train, "number": of_train, "evaluation": of_evaluation, "equal": "none"}


def test_an_output_folder_that_is_not_shared_is_an_error_on_all(said):
    for number, rank in enumerate(said):
        errors = rank["folders"]
        assert errors["output"].startswith("output_dir of rank 1 is not the folder of rank 0, so each")
        assert f"This is rank {number}, with " in errors["output"] and f"node{number}. Put it on" in errors["output"]
        assert f"node{number}/checkpoint-2: rank 0 step 2, rank 1 an error. Put it on" in errors["checkpoint"]
    assert [rank["folders"]["left"] for rank in said] == ["['checkpoint-2']", "[]"]
