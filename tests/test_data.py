"""Datasets: every layout becomes {prompt, answer, task, id}, and errors name each bad row."""

import difflib
import json
import logging
import os
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from arpo_trl.data import loading
from arpo_trl.data.files import read_file
from arpo_trl.data.layouts import shared_system_prompt, system_prompt_text
from arpo_trl.data.loading import load_arpo_dataset, validate_rows
from arpo_trl.data.prompts import SYSTEM_PROMPTS, default_system_prompt, tags_system_prompt
from arpo_trl.errors import ConfigError, DataError, ToolSpecError
from arpo_trl.evaluation.benchmarks import load_dataset_questions
from arpo_trl.scripts import sft
from support import python, search

REASONING = {"role": "system", "content": SYSTEM_PROMPTS["reasoning"]}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def verl_row(gold: Any = "3", ability: str | None = "math", question: str = "How many?") -> dict[str, Any]:
    system = "Put it in \x08oxed{} like \\[ \x08oxed{answer} \\]."
    return {
        "data_source": "mix",
        "prompt": [{"content": system, "role": "system"}, {"content": question, "role": "user"}],
        "ability": ability,
        "reward_model": {"ground_truth": gold, "style": "rule"},
        "extra_info": {"index": 7, "question": question, "split": "train"},
        "metadata": None,
    }


def load_one(tmp_path: Path, row: dict[str, Any], **settings: Any) -> dict[str, Any]:
    dataset = load_arpo_dataset(write_jsonl(tmp_path / "rows.jsonl", [row]), **settings)
    assert len(dataset) == 1
    return dataset[0]


def test_a_verl_row_is_converted_and_its_backspaces_repaired(tmp_path: Path) -> None:
    question = "in the form \x0crac{m}{n}, by the de\x0bfinition"
    assert load_one(tmp_path, verl_row(question=question)) == {
        "prompt": [
            {"role": "system", "content": r"Put it in \boxed{} like \[ \boxed{answer} \]."},
            user(r"in the form \frac{m}{n}, by the definition"),
        ],
        "answer": ["3"],
        "task": "math",
        "id": "7",
    }


def test_json_lines_may_be_in_a_json_file(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('{"question": "q", "answer": "1"}\n{"question": "r", "answer": "2"}\n')
    assert load_arpo_dataset(str(tmp_path / "rows.json"), task="math")["answer"][:] == [["1"], ["2"]]


def test_parquet_json_and_jsonl_hold_the_same_rows(tmp_path: Path) -> None:
    rows = [verl_row(), verl_row("Essex", "qa", "Which county?\u2028In England.")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "bom.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n \n", encoding="utf-8-sig")
    loaded = [load_arpo_dataset(str(file)).to_list() for file in sorted(tmp_path.iterdir())]
    assert len(loaded) == 4
    assert all(rows == loaded[0] for rows in loaded)
    assert [row["task"] for row in loaded[0]] == ["math", "qa"]


@pytest.mark.parametrize(
    ("fields", "prompt", "answer"),
    [
        ({"problem": "1+1?", "answer": 2}, "1+1?", ["2"]),
        ({"problem": "p", "question": "q", "answer": "025"}, "q", ["025"]),
        ({"Question": "Who?", "Answer": " Ann "}, "Who?", ["Ann"]),
        ({"question": "Who?", "final_answer": ["Ann", "Anna"]}, "Who?", ["Ann", "Anna"]),
        ({"question": "Sum?", "answer": "6+6=12, so\n#### 1,234"}, "Sum?", ["1234"]),
        ({"question": "Sum?", "answer": "#### -3 "}, "Sum?", ["-3"]),
        ({"question": "Sum?", "answer": "#### $1,234,567.50"}, "Sum?", ["$1234567.50"]),
        ({"question": "Where?", "answer": "#### (1, 2)"}, "Where?", ["(1, 2)"]),
        ({"question": "Which?", "answer": "#### 3,5"}, "Which?", ["3,5"]),
        ({"question": "What does #### 5 mean?", "answer": "a #### b"}, "What does #### 5 mean?", ["a #### b"]),
        ({"question": "Half?", "answer": 0.5}, "Half?", ["0.5"]),
        ({"prompt": "Half?", "answer": "1/2"}, "Half?", ["1/2"]),
    ],
)
def test_field_variants_are_read(tmp_path: Path, fields: dict[str, Any], prompt: str, answer: list[str]) -> None:
    row = load_one(tmp_path, fields, task="qa")
    assert (row["prompt"], row["answer"]) == ([REASONING, user(prompt)], answer)


def test_ids_and_levels_are_kept_as_text(tmp_path: Path) -> None:
    rows = [
        {"question": "a", "answer": "1", "task": "math", "idx": 0, "level": 3},
        {"question": "b", "answer": "1", "task": "math", "id": "x"},
        {"question": "c", "answer": "1", "task": "math"},
    ]
    dataset = load_arpo_dataset(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert dataset["id"][:] == ["0", "x", "2"]  # without one, the row's number
    assert dataset["level"][:] == ["3", None, None]


def test_the_system_prompt_is_kept_added_or_replaced(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "Be brief."}, user("Who?")]
    row = {"prompt": own, "answer": "Ann", "task": "qa"}
    bare = {"prompt": "Who?", "answer": "Ann", "task": "qa"}
    messages = {"prompt": [user("Who?")], "answer": "Ann", "task": "qa"}
    assert load_one(tmp_path, row)["prompt"] == own
    assert load_one(tmp_path, bare)["prompt"] == [REASONING, user("Who?")]
    assert load_one(tmp_path, messages)["prompt"] == [user("Who?")]  # whoever wrote messages wrote all of them
    deepsearch = [{"role": "system", "content": SYSTEM_PROMPTS["deepsearch"]}, user("Who?")]
    assert load_one(tmp_path, row, system_prompt="deepsearch")["prompt"] == deepsearch
    assert load_one(tmp_path, bare, system_prompt="deepsearch")["prompt"] == deepsearch
    literal = [{"role": "system", "content": "Think well."}, user("Who?")]
    assert load_one(tmp_path, row, system_prompt="Think well.")["prompt"] == literal


def test_a_misspelt_system_prompt_or_task_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"system_prompt is 'reasonning'; expected one of \['reasoning', 'deepsea"):
        load_arpo_dataset("rows.jsonl", system_prompt="reasonning")
    with pytest.raises(ConfigError, match="task is 'maths'; expected one of"):
        load_arpo_dataset("rows.jsonl", task="maths")


def test_the_argument_comes_before_a_row_s_own_task_and_that_before_ability(tmp_path: Path) -> None:
    assert load_one(tmp_path, {**verl_row(ability="qa"), "task": "math"}, task="qa")["task"] == "qa"
    assert load_one(tmp_path, {**verl_row(ability="qa"), "task": "math"})["task"] == "math"
    assert load_one(tmp_path, verl_row(ability="qa"))["task"] == "qa"
    assert load_one(tmp_path, verl_row(ability=None), task="qa")["task"] == "qa"


def test_silent_rows_are_judged_together_by_their_answers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def tasks(golds: list[str]) -> list[str]:
        rows = [{"question": "q", "answer": gold} for gold in golds]
        rows.append({"question": "q", "answer": "stated", "task": "qa"})  # has no say
        return load_arpo_dataset(write_jsonl(tmp_path / "rows.jsonl", rows))["task"][:-1]

    # 3 of 4 are a number or LaTeX: math, all of them
    assert tasks(["-1,000.5", r"\frac{1}{2}", "x^2", "Evelyn"]) == ["math"] * 4
    assert "4 row(s) do not state their task. It is set to math, since 75 %" in caplog.text
    # 1 of 4: qa
    assert tasks(["1999", "Essex", "Crystal Dynamics", "yes"]) == ["qa"] * 4
    # 2 of 4 tell nothing
    with pytest.raises(DataError, match=r"4 row\(s\), the first .*rows.jsonl, line 1, .*50%.* Set task to math or qa"):
        tasks(["1999", "3", "Essex", "yes"])


def test_a_verl_row_with_a_blank_answer_is_left_out_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [verl_row(), verl_row(" "), verl_row()])
    with caplog.at_level(logging.WARNING):
        assert len(load_arpo_dataset(file)) == 2
    assert f"1 row(s) without an answer excluded: {file}, line 2" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "task": "qa"}, r"no answer: the row has the fields \['question', 'task'\]"),
        ({"question": "q", "answer": None}, "no answer: 'answer' is null"),
        ({"question": None, "answer": "a"}, "no prompt or question: 'question' is null"),
        ({"answer": "a"}, r"no prompt or question: the row has the fields \['answer'\]"),
        ({"question": "q", "answer": " "}, "'answer' is ' '; expected at least one answer"),
        ({"question": "q", "answer": []}, r"'answer' contains no answer \(\[\]\); expected at least one"),
        ({"question": "q", "answer": ["a", ""]}, r"'answer' is \['a', ''\]"),
        ({"question": "q", "answer": ["a", None]}, "'answer' contains None"),
        ({"question": "q", "answer": {"a": 1}}, "'answer' contains {'a': 1}"),
        ({"question": " ", "answer": "a"}, "'prompt' is .* ' '}\\]; expected some text in it"),
        ({"prompt": [user("q"), user(" ")], "answer": "a"}, "message 1 of 'prompt' has the content ' '"),
        (
            {"prompt": [user("q") | {"tool_calls": [{"function": {"name": "f"}}]}], "answer": "a"},
            "message 0 of 'prompt' has tool_calls, which load_arpo_dataset would drop",
        ),
        (
            {
                "prompt": [user("q"), {"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}],
                "answer": "a",
            },
            "message 1 of 'prompt' has tool_calls, which load_arpo_dataset would drop",
        ),
        (
            {"messages": [user("q"), {"role": "assistant", "content": "a"}], "answer": "a"},
            "'messages' ends with a message of the role 'assistant', so the row is a demonstration",
        ),
        (
            {"question": "q", "answer": "['12']"},
            r"'answer' is .*, a list or a dict as Python prints it; expected JSON",
        ),
        ({"question": "q", "golden_answers": "['Poe'\n 'E. A. Poe']"}, "'golden_answers' is .* as Python prints it"),
        ({"question": "q", "answer": """["O'Neil", 'o']"""}, "'answer' is .* as Python prints it"),
        ({"question": "q", "answers": "{'text': array(['x'], dtype=object)}"}, "'answers' is .* as Python prints it"),
        ({"prompt": "[{'role': 'user', 'content': 'q'}]", "answer": "a"}, "'prompt' is .* as Python prints it"),
        ({"messages": "[{'content': 'q', 'role': 'user'}]", "answer": "a"}, "'messages' is .* as Python prints it"),
        ({"question": "q", "reward_model": "{'ground_truth': '1'}"}, "'reward_model' is .* as Python prints it"),
        ({"prompt": [], "answer": "a"}, r"'prompt' is \[\]"),
        ({"prompt": 5, "answer": "a"}, "'prompt' is 5"),
        ({"prompt": ["hi"], "answer": "a"}, "message 0 of 'prompt' is 'hi'; expected role"),
        ({"prompt": [user("q"), {"role": "user"}], "answer": "a"}, "message 1 of 'prompt' has the content None"),
        ({"question": "q", "answer": "a", "task": "code"}, "'task' is 'code'; expected one of"),
        (verl_row(ability="code"), "'ability' is 'code'; expected one of"),
        (verl_row(gold=None), "no reward_model.ground_truth: 'ground_truth' is null"),
    ],
)
def test_a_bad_row_is_named_with_its_field(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [verl_row(), row])
    with pytest.raises(DataError, match=f"rows.jsonl, line 2: {message}"):
        load_arpo_dataset(file)


@pytest.mark.parametrize(
    "text",
    ["{1, 2}", "[0, 1)", "['", "[1 2]", "{'a', 'b'}", "{'x': 1}", "['a'] + ['b']", r"\left[x'\right]", "[x]', [y]"],
)
def test_a_text_that_only_resembles_a_printed_list_is_an_answer_and_a_question(tmp_path: Path, text: str) -> None:
    row = load_one(tmp_path, {"question": text, "answer": text, "task": "qa"})
    assert (row["prompt"][-1]["content"], row["answer"]) == (text, [text])


@pytest.mark.parametrize("question", ["['a', 'b']", "{'name': 'x'}", "['a', 'b'] has which length?", "[{'a': 1}] is?"])
def test_a_question_may_be_a_list_of_python_and_an_answer_too_inside_a_list(tmp_path: Path, question: str) -> None:
    row = load_one(tmp_path, {"question": question, "answer": ["['a', 'b']"], "task": "qa"})
    assert (row["prompt"][-1]["content"], row["answer"]) == (question, ["['a', 'b']"])


def test_messages_keep_the_texts_that_templates_read_and_no_other_fields(tmp_path: Path) -> None:
    messages = [
        user("q") | {"weight": 1, "thinking": True, "name": ["x"]},
        {"role": "assistant", "content": "<search>x</search>", "reasoning_content": "I look it up."},
        {"role": "tool", "name": "search", "tool_call_id": "9", "content": "y"},
    ]
    dataset = load_arpo_dataset(
        write_jsonl(tmp_path / "rows.jsonl", [{"prompt": messages, "answer": "a", "task": "qa"}])
    )
    given = [{name: value for name, value in message.items() if value is not None} for message in dataset[0]["prompt"]]
    assert given == [user("q"), *messages[1:]]
    assert set(dataset[0]["prompt"][0]) == {"role", "content", "name", "tool_call_id", "reasoning_content"}


def test_a_prompt_that_ends_with_the_assistant_s_message_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shown = {"messages": [user("q"), {"role": "assistant", "content": "a"}], "answer": "a", "task": "qa"}
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [user("q")], "answer": "a", "task": "qa"}, shown])
    load_arpo_dataset(rows, columns={"prompt": "messages"})
    assert "1 of 2 prompts end with a message of the assistant, after which the model writes" in caplog.text
    assert f"remove it: {rows}, line 2" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.json",
            b'{"question": {"0": "q"}, "answer": {"0": "1"}}',
            r'contains one object of columns; .* orient="rec',
        ),
        (
            "a.json",
            b'{"question": ["q"], "answer": ["1"]}',
            "contains one object of columns; expected a list of objects",
        ),
        ("a.jsonl", b'{"question": "q", "answer": "1"}\n\n{"question"\n', "a.jsonl, line 3: not valid JSON"),
        ("a.jsonl", b"[1]\n", "a.jsonl, line 1: got a list; expected an object"),
        ("a.jsonl", b"", "a.jsonl .* contains no rows"),
        ("a.json", b"{}", "a.json contains a dict; expected a list of objects"),
        ("a.json", b"[", "a.json: not valid JSON"),
        ("a.json", b"[" * 100_000, "a.json: lists and mappings are nested more than 100 deep"),
        ("a.jsonl", b'{"question": "\xff"}', r"a.jsonl, line 1 is not UTF-8 text \(byte 14\)"),
        ("a.parquet", b"PAR1 no", "a.parquet is not a readable parquet file"),
        ("a.xlsx", b"PK", r"a.xlsx is not a dataset file; expected one of \('.jsonl'"),
        ("a.csv", b"question,answer", "a.csv .* contains no rows"),
        ("a.csv", b'question,answer\nq,"1', "a.csv, after line 1: not a readable CSV file"),
        ("a.csv", b"question,answer\nq,1\nq,1,2", "a.csv, line 3: more values than the header has names"),
        ("a.csv", b"question,answer\nq,\xff", "a.csv is not UTF-8 text .byte 18.. Convert it"),
        ("a.csv", b"question,answer,answer\nq,1,2", "a.csv: the header names 'answer' twice. Rename one of"),
        ("a.jsonl", b'{"question": "q", "answer": "1", "answer": "2"}', "the key 'answer' is set twice"),
        ("a.jsonl", b'{"question": "\xe2\x80\x8b", "answer": "1", "task": "qa"}', "expected some text in it"),
        (
            "a.jsonl",
            b'{"question": "q", "answer": "A", "task": "qa", "choices": {"text": ["a", "b"], "label": ["A", "A"]}}',
            "'choices' has the label 'A' twice",
        ),
    ],
)
def test_an_unreadable_file_is_an_error_with_the_place(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_arpo_dataset(str(tmp_path / name))


GOOD, NO_ANSWER = '{"question": "q", "answer": "1", "task": "math"}', '{"question": "q"}'


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("train-1.jsonl", f"{GOOD}\n\n{NO_ANSWER}\n", "line 3"),  # blank lines count
        ("train-1.json", f"[{GOOD}, {NO_ANSWER}]", "row 1"),
        ("train-1.json", f"{GOOD}\n\n{NO_ANSWER}\n", "line 3"),
        ("train-1.json", f'{{"data": [{GOOD}, {NO_ANSWER}]}}', "row 1"),
        ("train-1.csv", 'question,answer,task\n"two\nlines",1,math\nq,,math\n', "line 4"),
    ],
)
def test_an_error_in_a_folder_of_several_files_names_the_file_and_the_place_there(
    tmp_path: Path, name: str, text: str, place: str
) -> None:
    (tmp_path / name).with_stem("train-0").write_text(text.replace(NO_ANSWER, GOOD).replace("q,,", "q,1,"))
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=rf"{tmp_path}/{name}, {place}: "):
        load_arpo_dataset(str(tmp_path))


def test_an_error_in_a_parquet_file_names_the_row_of_that_file(tmp_path: Path) -> None:
    for part, answers in enumerate((["1", "2"], ["3", None])):
        table = pyarrow.table({"question": ["q", "q"], "answer": answers, "task": ["math", "math"]})
        pyarrow.parquet.write_table(table, tmp_path / f"train-0000{part}-of-00002.parquet")
    with pytest.raises(DataError, match=r"train-00001-of-00002.parquet, row 1: no answer"):
        load_arpo_dataset(str(tmp_path))


def test_rows_of_several_files_that_are_left_out_or_undecided_are_named_with_their_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blank = write_jsonl(tmp_path / "train-0.jsonl", [verl_row(), verl_row(" ")])
    write_jsonl(tmp_path / "train-1.jsonl", [verl_row(" "), verl_row()])
    load_arpo_dataset(str(tmp_path))
    assert f"2 row(s) without an answer excluded: {blank}, line 2; {tmp_path}/train-1.jsonl, line 1" in caplog.text
    write_jsonl(tmp_path / "train-1.jsonl", [{"question": "q", "answer": answer} for answer in ("1", "Ann")])
    with pytest.raises(DataError, match=r"2 row\(s\), the first of them .*train-1.jsonl, line 1, do not state"):
        load_arpo_dataset(str(tmp_path))


def test_a_long_cell_is_read_and_empty_names_of_columns_may_repeat(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"question,answer,task,,\n{'q' * 200_000},1,math,,\n")
    (row,) = load_arpo_dataset(str(tmp_path / "a.csv"))
    assert row["prompt"][-1]["content"] == "q" * 200_000


def test_the_home_of_nobody_is_an_error() -> None:
    with pytest.raises(DataError, match=r"~nobody-there/a\.jsonl begins with a user who has no home directory"):
        load_arpo_dataset("~nobody-there/a.jsonl")


def test_a_path_is_read_like_the_text_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "train.jsonl"
    write_jsonl(file, [{"question": "q", "answer": "1", "task": "math"}])
    for name in (file, tmp_path):
        assert load_arpo_dataset(name).to_list() == load_arpo_dataset(str(name)).to_list()
        assert load_dataset_questions(name, "train").rows == load_dataset_questions(str(name), "train").rows
    assert list(read_file(file)) == list(read_file(str(file)))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *_, **__: datasets.Dataset.from_list([{"name": name}]))
    with pytest.raises(DataError, match=r"someone/rows, row 0: .* fields \['name'\]"):
        load_arpo_dataset(Path("someone/rows"))


@pytest.mark.parametrize("name", [None, 3, [], b"rows.jsonl"])
def test_a_dataset_that_is_neither_text_nor_a_path_is_an_error(name: Any) -> None:
    for read in (load_arpo_dataset, lambda name: load_dataset_questions(name, "train")):
        with pytest.raises(DataError, match=rf"dataset is {re.escape(repr(name))}; expected a name as text or as a p"):
            read(name)
    with pytest.raises(DataError, match=r"path is .*; expected a name as text"):
        list(read_file(name))


def test_a_split_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="split is None; expected the name of a split, as text"):
        load_arpo_dataset(tmp_path, None)


def test_solutions_without_a_box_are_excluded_with_their_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    boxed = {"source": "olympiads", "problem": "Find x.", "solution": "So \\boxed{2}."}
    proof = {"source": "olympiads", "problem": "Prove it.", "solution": "Let x be even. Then x^2 is even, as claimed."}
    rows = write_jsonl(tmp_path / "rows.jsonl", [boxed, proof, boxed])
    with caplog.at_level("WARNING"):
        assert load_arpo_dataset(rows, task="math")["answer"][:] == [["2"], ["2"]]
    assert "1 of 3 rows excluded, since their solution has no \\boxed{…}, as in a proof: " in caplog.text
    assert f"{rows}, line 2" in caplog.text
    mostly = write_jsonl(tmp_path / "mostly.jsonl", [boxed, proof, proof])
    with pytest.raises(DataError, match=r"mostly.jsonl, line 2: 'solution' has no .* 2 of 3 rows are like it"):
        load_arpo_dataset(mostly, task="math")
    assert load_arpo_dataset(mostly, task="math", columns={"answer": "solution"})["answer"][1] == [proof["solution"]]


def test_all_values_of_a_csv_file_are_text(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    text = '\ufeffquestion,golden_answers,level\r\n"Who, then?",007,\r\n"A\nB?","[""a"", ""b""]",1e-5\r\n'
    file.write_text(text, encoding="utf-8", newline="")
    loaded = load_arpo_dataset(str(file), task="qa")
    assert [prompt[-1]["content"] for prompt in loaded["prompt"]] == ["Who, then?", "A\nB?"]
    assert loaded["answer"][:] == [["007"], ["a", "b"]]
    assert loaded["level"][:] == [None, "1e-5"]


def test_a_folder_of_save_to_disk_is_read(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_list([{"question": "q", "answer": "1"}])
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(str(tmp_path / "splits"))
    assert load_arpo_dataset(str(tmp_path / "one"), task="math")["answer"][:] == [["1"]]
    assert load_arpo_dataset(str(tmp_path / "splits"), "test", task="math")["answer"][:] == [["1"]]
    with pytest.raises(DataError, match=r"has no split 'dev'; expected one of \['train', 'test'\]"):
        load_arpo_dataset(str(tmp_path / "splits"), "dev")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="one is not a readable folder of save_to_disk"):
        load_arpo_dataset(str(tmp_path / "one"))


def test_a_folder_gives_the_files_of_its_split_in_order(tmp_path: Path) -> None:
    for name, answer in [("train-1", "1"), ("train-0", "0"), ("train_more", "2"), ("training", "9"), ("test", "8")]:
        write_jsonl(tmp_path / f"{name}.jsonl", [{"question": "q", "answer": answer, "task": "math"}])
    assert load_arpo_dataset(str(tmp_path))["answer"][:] == [["0"], ["1"], ["2"]]
    assert load_arpo_dataset(str(tmp_path), "test")["answer"][:] == [["8"]]
    with pytest.raises(DataError, match=r"no file of the split 'dev'; expected dev\*.*got test.jsonl; train-0.jsonl"):
        load_arpo_dataset(str(tmp_path), "dev")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("train.json", "train.jsonl"),
        ("train.csv", "train.jsonl"),
        ("train-0.json", "train-1.jsonl"),
        ("train.jsonl", "train_10k.jsonl"),
        ("train-00000-of-00001.jsonl", "train.jsonl"),
        ("train-00000-of-00001.jsonl", "train-00000-of-00002.jsonl"),
    ],
)
def test_a_folder_that_may_hold_a_split_twice_is_an_error_that_names_both_files(
    tmp_path: Path, first: str, second: str
) -> None:
    for name in (first, second):
        write_jsonl(tmp_path / name, [{"question": "q", "answer": "1", "task": "math"}])
    with pytest.raises(DataError, match=f"has {first} and {second} for the split 'train'.* Give the path of one file"):
        load_arpo_dataset(str(tmp_path))
    assert len(load_arpo_dataset(str(tmp_path / second))) == 1


def test_files_that_only_seem_to_belong_to_a_split_are_named(tmp_path: Path, caplog) -> None:
    for name in ("train", "train2", "training", "test"):
        (tmp_path / f"{name}.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    assert len(load_arpo_dataset(str(tmp_path), task="math")) == 1
    assert "the name of the split 'train': train2.jsonl; training.jsonl. If they belong to" in caplog.text
    assert "name its files train-0.jsonl, train-1.jsonl and so on." in caplog.text
    caplog.clear()
    load_arpo_dataset(str(tmp_path), "test", task="math")
    assert "not read" not in caplog.text


def test_numbered_parts_of_a_split_are_one_dataset(tmp_path: Path) -> None:
    for part in range(2):
        table = pyarrow.table({"question": ["q"], "answer": [str(part)], "task": ["math"]})
        pyarrow.parquet.write_table(table, tmp_path / f"train-0000{part}-of-00002.parquet")
        pyarrow.parquet.write_table(table, tmp_path / f"test-0000{part}-of-00002-0123456789abcdef.parquet")
    assert load_arpo_dataset(str(tmp_path))["answer"][:] == [["0"], ["1"]]
    assert load_arpo_dataset(str(tmp_path), "test")["answer"][:] == [["0"], ["1"]]


def save_parts(folder: Path, *names: str) -> str:
    for name in names:
        write_jsonl(folder / f"{name}.jsonl", [{"question": "q", "answer": "1", "task": "math"}])
    return str(folder)


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (["train-00000-of-00003", "train-00002-of-00003"], "1 other.* parts 0 to 2, but 1 are missing"),
        (["train-1-of-3", "train-3-of-3"], "1 other.* parts 1 to 3, but 2 are missing"),
        (["train_1-of-2"], "train_1-of-2.jsonl and 0 other.* parts 0 to 1, but 0 are missing"),
        (["train-0-of-2", "train-1-of-2", "train-2-of-2"], "has train-2-of-2.jsonl beside .* parts 0 to 1"),
        (["train-0-of-1-aa", "train-0-of-1-bb"], "has train-0-of-1-aa.jsonl and train-0-of-1-bb.jsonl.* same part"),
        (["train_easy-0-of-1", "train_hard-1-of-1", "train_all-5-of-1"], "has train_all-5-of-1.jsonl beside"),
        # 14 of 15 are missing; ten are named
        (["train-0-of-15"], "but 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 4 more are missing"),
        (["train-0-of-99999999999999"], "and 99999999999988 more are missing"),
    ],
)
def test_a_folder_without_a_part_of_a_split_or_with_one_too_many_is_an_error(
    tmp_path: Path, names: list[str], fault: str
) -> None:
    with pytest.raises(DataError, match=fault):
        load_arpo_dataset(save_parts(tmp_path, *names))


@pytest.mark.parametrize(
    "names",
    [
        ["train-1-of-2", "train-2-of-2"],
        ["train-0-of-1"],
        ["train-1-of-1"],
        ["train_easy-0-of-2", "train_easy-1-of-2", "train_hard-0-of-2", "train_hard-1-of-2"],
    ],
)
def test_parts_of_a_split_count_from_0_or_from_1_and_each_series_by_itself(tmp_path: Path, names: list[str]) -> None:
    assert len(load_arpo_dataset(save_parts(tmp_path, *names))) == len(names)


@pytest.mark.parametrize("load", [lambda name: load_arpo_dataset(name), lambda name: sft.load_rows(name, "train")])
def test_a_pipe_is_no_dataset(tmp_path: Path, load: Callable[[str], Any]) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    for pipe in (tmp_path / "rows.jsonl", "/dev/fd/987654"):  # the second is one of another process
        with pytest.raises(DataError, match=f"dataset {pipe} is a pipe, which cannot be read here; expected a file"):
            load(str(pipe))


@pytest.mark.parametrize("missing", ["missing.jsonl", "/no/where", "./folder", "a/b/c"])
def test_a_missing_path_is_not_taken_for_a_hub_name(missing: str) -> None:
    with pytest.raises(DataError, match=f"The file or folder {missing} does not exist"):
        load_arpo_dataset(missing)


def test_anything_else_is_loaded_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        assert (name, split) == ("someone/rows", "test")
        return datasets.Dataset.from_list([verl_row()])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_arpo_dataset("someone/rows", "test")["answer"][:] == [["3"]]


def test_an_unreachable_hub_dataset_is_an_error_with_the_attempted_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        DataError, match=r"'someone/rows' is not a local file or folder, .*ConnectionError: no network"
    ):
        load_arpo_dataset("someone/rows")


def test_good_rows_are_valid(tmp_path: Path) -> None:
    validate_rows(load_arpo_dataset(write_jsonl(tmp_path / "rows.jsonl", [verl_row()] * 3)))
    validate_rows(datasets.Dataset.from_list([{"prompt": "plain text"}]))
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    messages = [user("") | {"role": "system"}, user("a"), called, {"role": "tool", "name": "f", "content": ""}]
    validate_rows(datasets.Dataset.from_list([{"prompt": messages, "answer": None}]))


def test_a_role_is_compared_with_the_known_ones_once_for_all_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    compare, compared = difflib.get_close_matches, []
    monkeypatch.setattr(
        difflib, "get_close_matches", lambda role, *of, **how: compared.append(role) or compare(role, *of, **how)
    )
    messages = [user("a"), {"role": "observation-of-tool", "content": "b"}] * 20
    validate_rows(datasets.Dataset.from_list([{"prompt": messages}] * 20))
    assert len(compared) <= 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"question": ["a"], "answer": ["1"]}, "no column 'prompt'"),
        ({"prompt": [], "answer": []}, "The dataset is empty"),
        ({"prompt": ["a", None], "answer": ["1", "1"]}, "row 1: 'prompt' is None"),
        (
            {"prompt": ["a"], "tool_calls": ["b"], "turns": ["c"]},
            r"column\(s\) \['tool_calls', 'turns'\], but rewards",
        ),
        (
            {"prompt": ["a"], "image": ["b"], "completions": ["c"]},
            r"column\(s\) \['completions', 'image'\], but TRL",
        ),
        ({"prompt": ["a", "\n"]}, r"row 1: 'prompt' is '\\n'; expected some text in it"),
        ({"prompt": [[user(" ")]]}, "row 0: 'prompt' is .*; expected some text in it"),
        ({"prompt": [[user("a"), user(None)]]}, "row 0: message 1 of 'prompt' has the content None"),
        ({"prompt": [[user("a")], []], "answer": ["1", "1"]}, r"row 1: 'prompt' is \[\]"),
    ],
)
def test_an_unusable_dataset_is_an_error_with_row_and_field(rows: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        validate_rows(datasets.Dataset.from_dict(rows))


def test_a_column_that_a_transform_makes_is_told_from_one_that_is_missing() -> None:
    made = datasets.Dataset.from_dict({"q": ["a"]}).with_transform(lambda rows: {"prompt": rows["q"]})
    assert made[0] == {"prompt": "a"}
    with pytest.raises(DataError, match=r"it has \['q'\] and a transform, whose columns .*use dataset\.map"):
        validate_rows(made)


def test_a_system_prompt_for_tools_of_your_own_describes_them_and_their_tags() -> None:
    text = tags_system_prompt([search, python])
    assert "- <search>query</search>: Search for facts. query: What to look for." in text
    assert "- <python>code</python>: Run Python code. code: The code." in text
    assert "<result>…</result>" in text and r"\boxed{the answer}" in text
    assert system_prompt_text(text) == text


def test_a_system_prompt_lists_the_choices_of_an_argument() -> None:
    def capital(country: Literal["France", "Chile"]) -> str:
        """Looks up a capital.

        Args:
            country: The country
        """
        return country

    line = "- <capital>country</capital>: Looks up a capital. country: The country. One of: France, Chile.\n"
    assert line in tags_system_prompt([capital])


def test_a_system_prompt_for_a_tool_that_tags_cannot_offer_is_refused() -> None:
    def add(a: int, b: int) -> int:
        """Adds.

        Args:
            a: One.
            b: Another.
        """
        return a + b

    with pytest.raises(
        ToolSpecError, match=r"'add' has the parameters \['a', 'b'\]; .* or set tool_protocol to \"chat_template\""
    ):
        tags_system_prompt([add])


@pytest.mark.parametrize("name", sorted(SYSTEM_PROMPTS))
def test_a_system_prompt_teaches_its_tags_and_no_control_character(name: str) -> None:
    text = SYSTEM_PROMPTS[name]
    for tag in ("answer",) if name == "tools" else ("think", "search", "python", "result", "answer"):
        assert f"<{tag}>" in text and f"</{tag}>" in text
    assert r"\boxed{" in text
    assert all(char.isprintable() or char == "\n" for char in text)


def test_a_plain_question_gets_a_system_prompt_that_is_logged_and_can_be_replaced_or_left_out(tmp_path, caplog):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "What is 1 + 1?", "answer": "2", "task": "math"}\n', "utf-8")
    question = {"role": "user", "content": "What is 1 + 1?"}

    with caplog.at_level("INFO", logger="arpo_trl"):
        assert load_arpo_dataset(str(file))[0]["prompt"] == [
            {"role": "system", "content": SYSTEM_PROMPTS["reasoning"]},
            question,
        ]
    assert '1 row(s) have the system prompt "reasoning"' in caplog.text

    caplog.clear()
    with caplog.at_level("INFO", logger="arpo_trl"):
        assert load_arpo_dataset(str(file), system_prompt="")[0]["prompt"] == [question]
        own = load_arpo_dataset(str(file), system_prompt="Answer briefly.")[0]["prompt"]
    assert own == [{"role": "system", "content": "Answer briefly."}, question]
    assert "system prompt" not in caplog.text


@pytest.mark.parametrize(
    ("offered", "tags", "expected", "name"),
    [
        (["python", "search"], True, SYSTEM_PROMPTS["reasoning"], '"reasoning"'),
        (["python", "search"], False, SYSTEM_PROMPTS["tools"], '"tools"'),
        (["my_tools:search"], True, tags_system_prompt([search]), "of this run's tools"),
        (["python", "search", {"url": "http://mcp"}], True, tags_system_prompt([search]), "of this run's tools"),
        (
            [],
            True,
            SYSTEM_PROMPTS["tools"].replace(" Call the tools as often as you need.", ""),
            "of this run's tools",
        ),
    ],
)
def test_plain_questions_hear_of_a_runs_tools_and_of_no_others(tmp_path, caplog, offered, tags, expected, name):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "What is 1 + 1?", "answer": "2", "task": "math"}\n', "utf-8")
    with caplog.at_level("INFO", logger="arpo_trl"):
        prompt = default_system_prompt(offered, lambda: [search], tags=tags)
        rows = load_arpo_dataset(str(file), default_system_prompt=prompt)
    assert rows[0]["prompt"][0] == {"role": "system", "content": expected}
    assert f"1 row(s) have the system prompt {name}, which explains" in caplog.text


def test_an_empty_system_prompt_removes_that_of_messages(tmp_path):
    file = tmp_path / "questions.jsonl"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1 + 1?"}]
    file.write_text(json.dumps({"prompt": messages, "answer": "2", "task": "math"}), "utf-8")
    assert load_arpo_dataset(str(file), system_prompt="")[0]["prompt"] == messages[1:]


def test_an_object_with_one_list_of_rows_is_read_as_that_list(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "a", "task": "qa"}
    for content in ({"version": "1", "data": [row]}, row):  # the second one is JSON Lines with one line
        (tmp_path / "rows.json").write_text(json.dumps(content))
        assert load_arpo_dataset(str(tmp_path / "rows.json"))["answer"] == [["a"]]
    (tmp_path / "rows.json").write_text(json.dumps({"train": [row], "test": [row]}))
    with pytest.raises(DataError, match="contains a dict; expected a list of objects"):
        load_arpo_dataset(str(tmp_path / "rows.json"))


def test_a_snapshot_of_a_hub_dataset_is_read_from_its_folder_data(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("A dataset.")
    write_jsonl(tmp_path / "data" / "train-00000-of-00001.jsonl", [verl_row()])
    assert len(load_arpo_dataset(str(tmp_path))) == 1


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(DataError, match=r"is a pointer of Git LFS, not the data. Fetch the data: git lfs pull"):
        load_arpo_dataset(str(file))


def test_numbers_of_a_parquet_file_are_as_written(tmp_path: Path) -> None:
    columns = {
        "question": ["p", "q"],
        "answer": pyarrow.array([0.1, 3.0], pyarrow.float32()),
        "answer_aliases": [[Decimal("3.50")], None],
        "task": ["math", "math"],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    assert load_arpo_dataset(str(tmp_path / "rows.parquet"))["answer"] == [["0.1", "3.5"], ["3"]]


@pytest.mark.parametrize(
    "columns",
    [
        {"answer": pyarrow.array([0.1, 3.0], pyarrow.float32())},
        {"answer": pyarrow.array([0.1, 3.0], pyarrow.float16())},
        {"answer": pyarrow.array([[0.1], [3.0]], pyarrow.list_(pyarrow.float32()))},
        {
            "reward_model": pyarrow.array(
                [{"ground_truth": {"target": [0.1]}}, {"ground_truth": {"target": [3.0]}}],
                pyarrow.struct(
                    {"ground_truth": pyarrow.struct({"target": pyarrow.list_(pyarrow.float32())}), "x": pyarrow.int8()}
                ),
            )
        },
    ],
)
def test_short_numbers_are_as_written_wherever_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: dict[str, Any]
) -> None:
    table = pyarrow.table({"question": ["p", "q"], "task": ["math", "math"]} | columns)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    saved = datasets.Dataset(table)
    saved.save_to_disk(str(tmp_path / "saved"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: saved)
    for source in (str(tmp_path / "rows.parquet"), str(tmp_path / "saved"), "someone/rows"):
        assert load_arpo_dataset(source)["answer"] == [["0.1"], ["3"]]


def test_numbers_beside_short_ones_stay(tmp_path: Path) -> None:
    kind = pyarrow.struct(
        [("short", pyarrow.float32()), ("long", pyarrow.float64()), ("list", pyarrow.list_(pyarrow.float64()))]
    )
    row = {"short": 0.1, "long": 3.14159265358979, "list": [1e300, 16777217.0]}
    table = pyarrow.table({"question": ["?"], "answer": ["1"], "scores": pyarrow.array([row], kind)})
    saved = datasets.Dataset(table)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    (read,) = load_arpo_dataset(str(tmp_path / "rows.parquet"), own_reward=True)
    assert read["scores"] == row
    saved.set_format(None, columns=["question", "answer"])  # the rows then lack the others
    saved.save_to_disk(str(tmp_path / "saved"))
    assert load_arpo_dataset(str(tmp_path / "saved"))["answer"] == [["1"]]


@pytest.mark.parametrize(
    ("system", "setting"),
    [
        (["Think well."] * 3, "Think well."),
        ([SYSTEM_PROMPTS["tools"]], "tools"),
        ([None, None], ""),
        (["Think well.", "Be brief."], None),
        (["Think well.", None], None),
        ([None, "Think well."], None),
        (["Think."], None),  # the setting takes a single word for a misspelt name
        (["tools"], None),  # which the setting would replace by another text
        ([""], None),
        ([], None),
    ],
)
def test_the_system_prompt_that_all_prompts_share_is_a_setting(system: list[str | None], setting: str | None) -> None:
    def prompt(text: str | None) -> list[dict[str, str]]:
        return [*([] if text is None else [{"role": "system", "content": text}]), user("Who?")]

    assert shared_system_prompt(map(prompt, system)) == setting
    assert shared_system_prompt(["Who?"]) is None
    assert shared_system_prompt([[{"role": "developer", "content": "Think well."}, user("Who?")]]) is None


# Rows for a reward of one's own --------------------------------------------------------------------------------------


def load_own(tmp_path: Path, *rows: dict[str, Any], **settings: Any) -> datasets.Dataset:
    return load_arpo_dataset(write_jsonl(tmp_path / "rows.jsonl", list(rows)), own_reward=True, **settings)


def test_rows_for_a_reward_of_ones_own_need_no_answer_and_keep_their_fields(tmp_path: Path) -> None:
    rows = [
        {"question": "Name a fruit.", "gold": {"any": ["fig", "date"]}, "weight": 2},
        {"question": "Name a city.", "gold": {"any": ["Rome"], "not": "Oslo"}},
    ]
    dataset = load_own(tmp_path, *rows)
    assert dataset.column_names == ["prompt", "id", "question", "gold", "weight"]
    assert dataset[0] == {
        "prompt": [REASONING, user("Name a fruit.")],
        "id": "0",
        **rows[0],
        "gold": {"any": ["fig", "date"], "not": None},
    }
    assert dataset["weight"][:] == [2, None]


def test_an_answer_for_a_reward_of_ones_own_is_read_as_for_the_built_in_one(tmp_path: Path, caplog) -> None:
    mmlu = {"question": "Which city?", "choices": ["Rome", "Oslo"], "answer": 1, "task": "qa"}
    (row,) = load_own(tmp_path, mmlu)
    assert row["answer"] == ["B", "Oslo"] and row["prompt"][1] == user("Which city?\nA. Rome\nB. Oslo")
    assert row["choices"] == ["Rome", "Oslo"]
    (row,) = load_own(
        tmp_path, {"body": "Who?", "meta": {"gold": "Ann"}}, columns={"question": "body", "answer": "meta.gold"}
    )
    assert (row["answer"], row["task"], row["body"], row["meta"]) == (["Ann"], "qa", "Who?", {"gold": "Ann"})
    assert "have no answer" not in caplog.text


def test_rows_without_an_answer_are_reported_if_others_have_one(tmp_path: Path, caplog) -> None:
    blank, none = verl_row(gold=" "), {**verl_row(), "reward_model": None}
    assert load_own(tmp_path, verl_row(), blank, none)["answer"][:] == [["3"], None]
    file = tmp_path / "rows.jsonl"
    assert f"1 row(s) without an answer excluded: {file}, line 2" in caplog.text  # as without a reward of one's own
    assert f"1 of 2 rows have no answer, so the reward gets None: {file}, line 3" in caplog.text
    caplog.clear()
    dataset = load_own(tmp_path, blank, none)
    assert (len(dataset), "answer" in dataset.column_names, caplog.text) == (2, False, "")
    assert dataset["reward_model"][:] == [{"ground_truth": " ", "style": "rule"}, None]


def test_a_reward_of_ones_own_may_have_tasks_of_its_own(tmp_path: Path) -> None:
    rows = [
        {"question": "?", "task": "chess"},
        {"question": "?", "ability": "poetry"},
        {"question": "?", "task": "qa"},
    ]
    dataset = load_own(tmp_path, *rows)
    assert dataset["task"][:] == ["chess", None, "qa"]
    assert dataset["ability"][:] == [None, "poetry", None]
    silent = load_own(tmp_path, {"question": "?", "answer": "7"}, {"question": "?", "answer": "Ann"})
    assert "task" not in silent.column_names  # half of the answers are numbers, which determines no task


def test_a_reward_of_ones_own_reads_id_level_and_task_as_they_stand(tmp_path: Path) -> None:
    rows = [{"question": "?", "id": 0, "level": [1, 2], "task": 7}, {"question": "?", "id": 1, "level": [], "task": 8}]
    assert [{name: row[name] for name in rows[0]} for row in load_own(tmp_path, *rows)] == rows
    numbered = load_own(tmp_path, {"question": "?", "id": 5, "task": "Math"}, {"question": "?"})
    assert (numbered["id"][:], numbered["task"][:]) == (["5", "1"], ["math", None])  # converted, so text
    (mapped,) = load_own(
        tmp_path, {"question": "?", "level": 1, "meta": {"level": 2}}, columns={"level": "meta.level"}
    )
    assert mapped["level"] == "2"
    several = load_own(tmp_path, {"question": "?", "id": 1, "level": 1}, {"question": "?", "id": "b", "level": "hard"})
    assert (several["id"][:], several["level"][:]) == (["1", "b"], ["1", "hard"])


def test_each_field_for_a_reward_of_ones_own_is_read_as_a_whole_and_not_once_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    column = loading._column
    monkeypatch.setattr(loading, "_column", lambda name, values: read.append(name) or column(name, values))
    load_own(tmp_path, *({"question": "?", "id": i, "level": i, "task": "math"} for i in range(50)))
    assert max(map(read.count, read)) == 2  # to see whether it is a column, and as the column


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Who?", "answer": {"name": "Ann"}}, "line 1: 'answer' contains"),
        ({"question": "Who?", "answer": ["Ann", " "]}, "expected at least one answer, none of them blank"),
        ({"question": "Who?", "choices": ["Rome", "Oslo"], "answer": "Bern"}, "expected one of the choices"),
        ({"anwser": "Ann"}, "no prompt or question"),
    ],
)
def test_an_unusable_row_for_a_reward_of_ones_own_is_an_error(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_own(tmp_path, row)


def test_a_missing_field_that_columns_names_is_an_error_for_a_reward_of_ones_own_too(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 2: the row has no field 'gold', to which the column map maps answer"):
        load_own(tmp_path, {"question": "Who?", "gold": "Ann"}, {"question": "Who?"}, columns={"answer": "gold"})
    with pytest.raises(DataError, match=r"line 2: 'gold', to which the column map maps answer, is null"):
        load_own(tmp_path, *({"question": "Who?", "gold": gold} for gold in ("Ann", None)), columns={"answer": "gold"})


def test_a_field_of_several_types_is_no_column(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"rows.jsonl, line 3: the field 'gold' is \[1\], which cannot be in one column .* one type"
    ):
        load_own(tmp_path, *({"question": "?", "gold": gold} for gold in ("x", "y", [1], "z", 2)))


def test_columns_that_look_like_choices_are_none_without_an_answer(tmp_path: Path) -> None:
    (row,) = load_own(tmp_path, {"question": "Compare.", "A": "one text", "B": "another"})
    assert row["prompt"][1] == user("Compare.") and row["A"] == "one text"


def test_the_built_in_reward_still_needs_answers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 1: no answer: the row has the fields \['question'\]"):
        load_one(tmp_path, {"question": "Who?"})
    with pytest.raises(DataError, match=r"line 1: no answer"):
        load_dataset_questions(write_jsonl(tmp_path / "rows.jsonl", [{"question": "Who?"}]), "train")
