"""Published row layouts, each converted as intended."""

import json
import random
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


def test_the_key_of_an_entry_of_a_parquet_map_is_no_answer() -> None:
    with pytest.raises(DataError, match=r"'answer' contains \('value', 'a'\); expected text"):
        convert_row({"question": "q", "answer": [("value", "a")], "task": "qa"}, 0, None)


FIELDS = (
    *("prompt", "question", "Question", "messages", "answer", "golden_answers", "possible_answers", "solution"),
    *("reward_model", "extra_info", "choices", "options", "A", "B", "aliases", "task", "ability", "id", "level"),
    *("canary", "Body", "Correct Answer", "Incorrect Answer 1", "question_type"),
)
KEYS = ("value", "aliases", "target", "text", "label", "answer", "role", "content", "from", "ground_truth", "index")
TEXTS = (
    *("x", "A", "(B)", "1", "proof", "math", "qa", "", "  ", "\\boxed{3}", "\\boxed", "\\fbox{", "#### 3", "\ud800"),
    *('["a"]', '{"value": 1}', "[", '{"ground_truth": "a"}', '[{"role": "user", "content": "x"}]', "[null]", "[[]]"),
)
VALUES = (0, 1, -1, 10**30, 10**5000, 0.0, 1.5, float("nan"), float("inf"), True, False, None, b"x")


def any_value(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.random()
    if kind < 0.6 or depth == 3:
        return draw.choice(TEXTS if kind < 0.3 else VALUES)
    items = [any_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return items if kind < 0.8 else {draw.choice(KEYS): item for item in items}


def test_any_row_is_converted_or_refused_with_a_reason() -> None:
    draw = random.Random(0)
    converted = 0
    for number in range(5000):
        row = {"question": "q", **{field: any_value(draw) for field in draw.sample(FIELDS, 4)}}
        try:
            row = convert_row(row, number, None) or {}
        except DataError:
            continue
        if row:
            converted += 1
            assert all(row["answer"])
            assert {type(part) for part in (*row["answer"], row["id"], row["prompt"][-1]["content"])} == {str}
    assert converted > 200


@pytest.mark.parametrize("gold", [float("nan"), float("inf"), [1.0, float("-inf")]])
def test_a_gold_that_is_not_a_number_is_an_error(gold: Any) -> None:
    with pytest.raises(DataError, match=r"'answer' contains -?(nan|inf); expected text or a finite number"):
        convert({"row": {"question": "q", "answer": gold}})


def test_an_integer_with_more_digits_than_python_writes_is_an_error() -> None:
    with pytest.raises(DataError, match="'answer' contains a number with too many digits"):
        convert({"row": {"question": "q", "answer": 10**10_000}})


@pytest.mark.parametrize("meta", [None, {"level": None, "n": None, "kind": None, "opts": None}])
def test_a_null_that_a_column_map_names_for_an_optional_key_is_no_value(meta: Any) -> None:
    columns = {"level": "meta.level", "id": "meta.n", "task": "meta.kind", "choices": "meta.opts"}
    row = convert_row({"question": "q", "answer": "5", "meta": meta, "level": 2}, 7, None, columns=columns)
    assert row is not None
    assert (row["level"], row["id"], row["task"]) == (None, "7", None)
    assert (row["prompt"][-1]["content"], row["answer"]) == ("q", ["5"])


def test_a_blank_field_that_a_column_map_names_is_not_replaced_by_another() -> None:
    row = {"body": " ", "problem": "What is 5 + 5?", "messages": [{"role": "user", "content": "?"}], "answer": "3"}
    for name in ("question", "prompt"):
        with pytest.raises(DataError, match="expected some text"):
            convert_row(row, 0, None, columns={name: "body"})
    given = {"question": "?", "answer": "3", "choices": ["2", "3"], "ability": "math", "uuid": "u", "Level": 4}
    columns = {name: f"my_{name}" for name in ("choices", "task", "id", "level")}
    blank = convert_row(given | dict.fromkeys(columns.values(), ""), 8, "", columns=columns)
    assert blank == {
        "prompt": [{"role": "user", "content": "?"}],
        "answer": ["3"],
        "task": None,
        "id": "8",
        "level": None,
    }


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
