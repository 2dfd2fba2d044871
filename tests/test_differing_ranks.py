"""What differs between two processes: a decision of a callback counts for both."""

import json
from typing import Any

import pytest

from ranks import launch
from resuming import save_calling_model

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> list[dict[str, Any]]:
    """What each rank has seen."""
    folder = tmp_path_factory.mktemp("ranks")
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
