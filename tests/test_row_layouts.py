"""Published row layouts, each converted as intended."""

import json
from pathlib import Path
from typing import Any

import pytest

from arpo_trl.data.layouts import convert_row, read_columns
from arpo_trl.errors import ConfigError, DataError

CASES = [json.loads(line) for line in (Path(__file__).parent / "cases" / "rows.jsonl").read_text("utf-8").splitlines()]


def convert(case: dict[str, Any]) -> dict[str, Any] | None:
    return convert_row(case["row"], 0, None, task=case.get("given_task"), columns=case.get("columns"))


@pytest.mark.parametrize("case", CASES, ids=[f"{i}-{case['kind']}" for i, case in enumerate(CASES, 1)])
def test_cases(case: dict[str, Any]) -> None:
    if "error" in case:
        with pytest.raises(DataError) as raised:
            convert(case)
        assert case["error"] in str(raised.value)
        return
    row = convert(case)
    if case.get("skipped"):
        assert row is None
        return
    assert row is not None
    assert row["prompt"][-1]["content"] == case["question"]
    assert (row["answer"], row["task"]) == (case["answer"], case["task"])
    assert row["id"] == case.get("id", row["id"])


@pytest.mark.parametrize("gold", [float("nan"), float("inf"), [1.0, float("-inf")]])
def test_a_gold_that_is_no_number_is_an_error(gold: Any) -> None:
    with pytest.raises(DataError, match=r"'answer' contains -?(nan|inf); expected text or a finite number"):
        convert({"row": {"question": "q", "answer": gold}})


def test_an_integer_with_more_digits_than_python_writes_is_an_error() -> None:
    with pytest.raises(DataError, match="'answer' contains a number with too many digits"):
        convert({"row": {"question": "q", "answer": 10**10_000}})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("question", "columns is 'question'; expected a mapping to field names"),
        ("[1]", r"columns is '\[1\]'; expected a mapping to field names"),
        ({"question": 3}, "columns is {'question': 3}; expected a mapping to field names"),
        ({"gold": "answer"}, r"columns has the keys \['gold'\]; expected some of"),
    ],
)
def test_a_column_map_is_checked(columns: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_columns(columns)
    assert read_columns(None) is None
    assert read_columns({"question": "body"}) == read_columns('{"question": "body"}') == {"question": "body"}
