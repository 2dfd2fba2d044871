import base64
import json
import re
from functools import partial
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from arpo_trl.data.prompts import SYSTEM_PROMPTS
from arpo_trl.errors import ConfigError, DataError
from arpo_trl.evaluation.benchmarks import (
    BENCHMARKS,
    Scorer,
    custom_benchmark,
    find_benchmarks,
    load_dataset_questions,
    load_questions,
    local_benchmarks,
    suite,
)

PAPER = {
    "aime24": 30, "aime25": 30, "math500": 500, "gsm8k": 1319, "math": 5000, "hotpotqa": 200, "2wiki": 200,
    "musique": 200, "bamboogle": 125, "webwalker": 200, "gaia": 103, "hle": 500, "xbench": 100,
}  # fmt: skip
CUSTOM = {"name": "mine", "file": "mine.jsonl", "question": "q", "answer": "a", "scorer": "qa_f1"}


def write(path, *rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return str(path)


def answers(name: str, data, **settings) -> list[list[str]]:
    return [row["answer"] for row in load_questions(BENCHMARKS[name], str(data), **settings).rows]


# The registry --------------------------------------------------------------------------------------------------------


def test_the_registry_has_the_papers_thirteen_in_three_suites_and_simpleqa():
    assert {b.name: b.size for b in suite("all")} == PAPER
    assert [len(suite(name)) for name in ("reasoning", "knowledge", "deepsearch")] == [5, 4, 4]
    assert set(BENCHMARKS) - set(PAPER) == {"simpleqa"}


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=lambda b: b.name)
def test_every_benchmark_has_a_source_a_scorer_and_terms(benchmark):
    assert benchmark.hub_id and "/" in benchmark.hub_id and benchmark.split
    assert isinstance(benchmark.scorer, Scorer)
    assert benchmark.system_prompt in SYSTEM_PROMPTS
    assert benchmark.note


def test_benchmarks_are_found_by_name_alias_and_in_any_case_once_each():
    assert [b.name for b in find_benchmarks(["GSM8K", "2WikiMultihopQA", "gsm8k"])] == ["gsm8k", "2wiki"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gsmk8", "There is no benchmark 'gsmk8'; did you mean gsm8k"),
        ("hotpot", "There is no benchmark 'hotpot'; did you mean hotpotqa"),
        ("mmlu-pro-xyz", "There is no benchmark 'mmlu-pro-xyz'; there are aime24, aime25"),
    ],
)
def test_an_unknown_benchmark_gets_an_error_with_similar_names(name, message):
    with pytest.raises(ConfigError, match=message):
        find_benchmarks([name])


def test_an_unknown_suite_gets_an_error_with_all_suites():
    with pytest.raises(ConfigError, match=r"suite is 'maths'; expected one of \['reasoning', "):
        suite("maths")


# The layouts of the published files ----------------------------------------------------------------------------------


def test_aime_has_numbers_problems_and_solutions(tmp_path):
    write(tmp_path / "aime24.jsonl", {"id": 60, "problem": "What is $1+1$?", "solution": "It is 2.", "answer": "2"})
    (row,) = load_questions(BENCHMARKS["aime24"], str(tmp_path)).rows
    assert (row["answer"], row["task"], row["id"]) == (["2"], "math", "60")
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert row["prompt"][0]["content"] == SYSTEM_PROMPTS["reasoning"]
    assert row["prompt"][1]["content"] == "What is $1+1$?"


def test_the_gold_of_gsm8k_is_the_text_after_the_hashes(tmp_path):
    write(tmp_path / "gsm8k.jsonl", {"question": "How many?", "answer": "9 * 200 = <<9*200=1800>>1800\n#### 1,800"})
    assert answers("gsm8k", tmp_path) == [["1800"]]


def test_the_gold_of_math_is_the_last_box_of_the_solution_and_its_level_is_kept(tmp_path):
    row = {"problem": "?", "solution": r"First \boxed{1}, then \boxed{\frac{1}{2}}.", "level": "Level 3", "type": "x"}
    write(tmp_path / "math.jsonl", row)
    (row,) = load_questions(BENCHMARKS["math"], str(tmp_path)).rows
    assert (row["answer"], row["level"]) == ([r"\frac{1}{2}"], "Level 3")


def test_the_gold_of_math_is_never_the_prose_of_a_solution(tmp_path):
    prose = {"problem": "3+4?", "solution": "Add the numbers: the sum is 7.", "level": "Level 1"}
    write(tmp_path / "math.jsonl", {**prose, "answer": "7"})
    assert answers("math", tmp_path) == [["7"]]
    file = write(tmp_path / "math.jsonl", prose)
    with pytest.raises(DataError, match=rf"{file}, line 1: 'solution' has no \\boxed"):
        load_questions(BENCHMARKS["math"], file)


def test_hotpotqa_has_lists_of_answers_under_either_name(tmp_path):
    write(
        tmp_path / "hotpotqa.jsonl",
        {"question": "?", "answer": ["yes"]},
        {"question": "?", "golden_answers": ["a", "b"]},
    )
    assert answers("hotpotqa", tmp_path) == [["yes"], ["a", "b"]]


def test_webwalker_uses_the_deep_search_prompt(tmp_path):
    write(tmp_path / "webwalkerqa.jsonl", {"question": "谁？", "answer": "肖亮"})
    (row,) = load_questions(BENCHMARKS["webwalker"], str(tmp_path)).rows
    assert row["prompt"][0]["content"] == SYSTEM_PROMPTS["deepsearch"]
    assert (row["answer"], row["task"]) == (["肖亮"], "qa")


def test_an_empty_system_prompt_is_none(tmp_path):
    file = write(tmp_path / "webwalker.jsonl", {"question": "Who?", "answer": "Ann", "q": "Who?", "a": "Ann"})
    mine = custom_benchmark({**CUSTOM, "file": file, "system_prompt": ""})
    for questions in (load_questions(BENCHMARKS["webwalker"], file, system_prompt=""), load_questions(mine)):
        assert questions.rows[0]["prompt"] == [{"role": "user", "content": "Who?"}]


def test_only_rows_without_a_file_of_gaia_are_used_and_the_others_are_counted_in_the_log(tmp_path, caplog):
    rows = [
        {"task_id": str(i), "Question": "?", "Level": 2, "Final answer": "x", "file_name": f}
        for i, f in enumerate(["", "a.png", "b.pdf"])
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "gaia.parquet")
    (row,) = load_questions(BENCHMARKS["gaia"], str(tmp_path)).rows
    assert (row["id"], row["level"], row["answer"]) == ("0", "2", ["x"])
    file = tmp_path / "gaia.parquet"
    assert caplog.messages == [
        f"GAIA: 2 row(s) of {file} excluded, since they need more than text: their field 'file_name' is not empty."
    ]


def test_an_answer_that_gaia_does_not_publish_is_no_gold(tmp_path):
    file = write(
        tmp_path / "gaia.jsonl", {"Question": "?", "Final answer": "?"}, {"Question": "!", "Final answer": "x"}
    )
    with pytest.raises(DataError, match=r"line 1: the answer is blank or not published; .* --skip-bad"):
        load_questions(BENCHMARKS["gaia"], file)
    assert [row["answer"] for row in load_questions(BENCHMARKS["gaia"], file, skip_bad=True).rows] == [["x"]]


def test_nothing_is_logged_if_no_row_needs_more_than_text(tmp_path, caplog):
    file = write(tmp_path / "hle.jsonl", {"question": "?", "answer": "1", "image": ""})
    assert len(load_questions(BENCHMARKS["hle"], file).rows) == 1
    assert caplog.messages == []


def masked(text: str, canary: str) -> str:
    key = canary.encode()
    return base64.b64encode(bytes(b ^ key[i % len(key)] for i, b in enumerate(text.encode()))).decode()


def test_xbench_is_unmasked(tmp_path):
    row = {"id": "7", "prompt": masked("首都是哪里？", "bird"), "answer": masked("北京", "bird"), "canary": "bird"}
    write(tmp_path / "xbench.jsonl", row, {**row, "answer": "not base64!"})
    with pytest.raises(DataError, match="line 2: prompt or answer cannot be unmasked"):
        answers("xbench", tmp_path)
    (row,) = load_questions(BENCHMARKS["xbench"], str(tmp_path), skip_bad=True).rows
    assert (row["prompt"][1]["content"], row["answer"]) == ("首都是哪里？", ["北京"])


def test_a_file_may_be_named_directly_and_a_folder_lists_its_benchmarks(tmp_path):
    file = write(tmp_path / "some.jsonl", {"question": "?", "answer": "1"})
    assert answers("gsm8k", file) == [["1"]]
    assert local_benchmarks(tmp_path) == local_benchmarks(file) == []
    write(tmp_path / "xbench-deepsearch.json", "[]")
    write(tmp_path / "aime24.jsonl", "")
    assert local_benchmarks(tmp_path) == [BENCHMARKS["aime24"], BENCHMARKS["xbench"]]


@pytest.mark.parametrize("other", ["2wiki.parquet", "2wikimultihopqa.jsonl"])
def test_two_files_of_one_benchmark_are_an_error_that_names_both(tmp_path, other):
    for name in ("2wiki.jsonl", other):
        write(tmp_path / name, {"question": "?", "answer": "1"})
    for read in (lambda: load_questions(BENCHMARKS["2wiki"], str(tmp_path)), lambda: local_benchmarks(tmp_path)):
        with pytest.raises(DataError, match=f"has 2wiki.jsonl and {other} for 2WikiMultihopQA; expected one file"):
            read()


def test_a_path_of_questions_is_read_like_the_text_of_it(tmp_path):
    file = tmp_path / "gsm8k.jsonl"
    write(file, {"question": "?", "answer": "1", "q": "?", "a": "1"})
    mine = custom_benchmark({**CUSTOM, "file": file})
    for questions in (load_questions(BENCHMARKS["gsm8k"], file), load_questions(BENCHMARKS["gsm8k"], tmp_path)):
        assert questions.rows == load_questions(BENCHMARKS["gsm8k"], str(file)).rows
    assert load_questions(mine).rows == load_questions(custom_benchmark({**CUSTOM, "file": str(file)})).rows
    assert local_benchmarks(str(tmp_path)) == local_benchmarks(tmp_path) == [BENCHMARKS["gsm8k"]]


@pytest.mark.parametrize("name", [3, [], b"gsm8k.jsonl"])
def test_questions_whose_name_is_neither_text_nor_a_path_are_an_error(name):
    for read in (partial(load_questions, BENCHMARKS["gsm8k"]), local_benchmarks):
        with pytest.raises(DataError, match=rf"data is {re.escape(repr(name))}; expected a name as text or as a"):
            read(name)


def test_any_dataset_is_a_benchmark_whose_rows_say_their_task(tmp_path):
    file = write(
        tmp_path / "heldout.jsonl",
        {"prompt": "1+1?", "answer": "2", "task": "math"},
        {"prompt": "Who?", "answer": "I", "task": "qa"},
    )
    questions = load_dataset_questions(file, "train", limit=2)
    assert questions.benchmark.name == "heldout"
    assert [row["task"] for row in questions.rows] == ["math", "qa"]


def test_fingerprints_tell_questions_apart(tmp_path):
    prints = []
    for i, golds in enumerate((["1", "2"], ["1", "2"], ["1", "3"], ["1"])):
        file = write(tmp_path / f"{i}.jsonl", *({"question": "?", "answer": gold} for gold in golds))
        prints.append(load_questions(BENCHMARKS["gsm8k"], file).fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


# The Hub -------------------------------------------------------------------------------------------------------------


def test_the_hub_request_has_repository_configuration_and_split_and_the_papers_size(monkeypatch):
    asked = []

    def load_dataset(name, config, *, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"question": f"q{i}", "golden_answers": ["a"]} for i in range(300)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_questions(BENCHMARKS["hotpotqa"]).rows) == 200
    assert len(load_questions(BENCHMARKS["hotpotqa"], limit=3).rows) == 3
    assert asked[0] == ("RUC-NLPIR/FlashRAG_datasets", "hotpotqa", "dev")


def test_a_gated_benchmark_without_a_token_is_an_error_with_instructions():
    with pytest.raises(
        DataError,
        match=r"GAIA could not be loaded.*accept its terms at https://huggingface.co/datasets/"
        r"gaia-benchmark/GAIA and log in with `hf auth login`, or set HF_TOKEN.*as gaia.jsonl",
    ):
        load_questions(BENCHMARKS["gaia"])


def test_a_missing_benchmark_is_an_error_that_suggests_a_local_file():
    with pytest.raises(DataError, match=r"GSM8K could not be loaded from the Hub. Or get its file elsewhere"):
        load_questions(BENCHMARKS["gsm8k"])


# Bad rows ------------------------------------------------------------------------------------------------------------


def test_a_broken_line_stops_with_its_number_or_is_left_out(tmp_path, caplog):
    good = {"question": "?", "answer": "1"}
    file = write(
        tmp_path / "gsm8k.jsonl",
        good,
        '{"question": "torn',
        good,
        "[1]",
        {"question": "no gold"},
        {"question": "?", "answer": " "},
    )
    with pytest.raises(DataError, match=r"gsm8k.jsonl, line 2: not valid JSON"):
        load_questions(BENCHMARKS["gsm8k"], file)
    questions = load_questions(BENCHMARKS["gsm8k"], file, skip_bad=True)
    assert len(questions.rows) == 2
    assert [problem.partition("gsm8k.jsonl, ")[2][:40] for problem in questions.bad] == [
        "line 2: not valid JSON (Unterminated str",
        "line 4: got a list; expected an object w",
        "line 5: no answer: the row has the field",
        "line 6: 'answer' is ' '; expected at lea",
    ]
    assert caplog.text.count("Excluded: ") == 4


def test_a_row_without_gold_stops_with_a_remedy(tmp_path):
    file = write(tmp_path / "gsm8k.jsonl", {"question": "?", "answer": None})
    with pytest.raises(DataError, match=r"line 1: no answer: 'answer' is null; .* To exclude such rows: --skip-bad"):
        load_questions(BENCHMARKS["gsm8k"], file)
    with pytest.raises(DataError, match="contains no usable questions"):
        load_questions(BENCHMARKS["gsm8k"], file, skip_bad=True)


def test_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(DataError, match=r"has no gsm8k.jsonl, .json or .parquet"):
        load_questions(BENCHMARKS["gsm8k"], str(tmp_path))
    with pytest.raises(DataError, match=r"There is no file .*nowhere.jsonl for GSM8K"):
        load_questions(BENCHMARKS["gsm8k"], str(tmp_path / "nowhere.jsonl"))


def test_the_comparison_counts_benchmarks():
    page = (Path(__file__).parents[1] / "docs/compare.md").read_text("utf-8")
    (count,) = re.findall(r"\[(\d+) benchmarks\]\(", page)
    assert int(count) == len(BENCHMARKS)


# Benchmarks of users -------------------------------------------------------------------------------------------------


def test_a_benchmark_of_ones_own_needs_no_code(tmp_path):
    file = write(tmp_path / "mine.jsonl", {"q": "Who?", "a": "I", "hard": "very"})
    mine = custom_benchmark({**CUSTOM, "file": file, "level": "hard"})
    assert find_benchmarks(["mine"], [mine]) == [mine]
    capital = custom_benchmark({**CUSTOM, "file": file, "name": "MyBench"})
    assert find_benchmarks(["MyBench", "mybench"], [mine, capital]) == [capital]
    (row,) = load_questions(mine, "ignored").rows
    assert (row["prompt"][1]["content"], row["answer"], row["task"], row["level"]) == ("Who?", ["I"], "qa", "very")


def test_a_benchmark_of_ones_own_without_a_system_prompt_has_that_of_the_run(tmp_path):
    file = write(tmp_path / "mine.jsonl", {"q": "Who?", "a": "I"})

    def system(description, **settings):
        mine = custom_benchmark({**CUSTOM, "file": file, **description})
        return load_questions(mine, **settings).rows[0]["prompt"][0]["content"]

    assert system({}, default_system_prompt="tools") == SYSTEM_PROMPTS["tools"]
    assert system({"system_prompt": "deepsearch"}, default_system_prompt="tools") == SYSTEM_PROMPTS["deepsearch"]
    assert system({}, default_system_prompt="tools", system_prompt="Be brief.") == "Be brief."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scorer": "f1"}, r"'mine' has scorer 'f1'; expected one of \['math', 'qa_f1', 'judge'\]"),
        ({"anwser": "a"}, "'mine' has a key 'anwser'; did you mean 'answer'"),
        ({"zzz": "a"}, "'mine' has a key 'zzz'; expected name, file"),
        ({"question": 3}, "'mine' has question 3; expected text"),
        ({"file": " "}, "'mine' has file ' '; expected text"),
        ({"name": "gsm8k"}, "'gsm8k' has the name of a built-in benchmark"),
        ({"name": "2WikiMultihopQA"}, "'2WikiMultihopQA' has the name of a built-in benchmark"),
        ({"system_prompt": "reasonning"}, "system_prompt is 'reasonning'"),
    ],
)
def test_every_key_of_a_benchmark_of_ones_own_is_checked(change, message):
    with pytest.raises(ConfigError, match=message):
        custom_benchmark({**CUSTOM, **change})


def test_a_benchmark_of_ones_own_must_be_whole():
    with pytest.raises(ConfigError, match="'mine' lacks answer, scorer"):
        custom_benchmark({key: CUSTOM[key] for key in ("name", "file", "question")})
    with pytest.raises(ConfigError, match="custom contains 'mine'; expected a benchmark with name"):
        custom_benchmark("mine")


@pytest.mark.parametrize(
    "other",
    [
        {"reference_answer": "other"},
        {"reward_model": {"ground_truth": "other"}},
        {"final_answer": "other"},
        {"aliases": ["other"]},
        {"prompt": [{"role": "user", "content": "other"}]},
        {"problem": "other"},
        {"body": "other"},
    ],
)
def test_only_the_fields_that_a_benchmark_of_ones_own_names_count(tmp_path, other):
    file = write(tmp_path / "mine.jsonl", {"q": "Who?", "a": "I"} | other)
    (row,) = load_questions(custom_benchmark({**CUSTOM, "file": file})).rows
    assert (row["prompt"][-1]["content"], row["answer"]) == ("Who?", ["I"])


def test_a_blank_question_of_a_file_of_ones_own_is_an_error(tmp_path):
    file = write(tmp_path / "mine.jsonl", {"q": " ", "problem": "Who?", "a": "I"})
    with pytest.raises(DataError, match="line 1: no 'q'"):
        load_questions(custom_benchmark({**CUSTOM, "file": file}))


def test_fields_that_a_file_of_ones_own_lacks_are_named(tmp_path):
    file = write(tmp_path / "mine.jsonl", {"question": "Who?", "a": "I"})
    with pytest.raises(
        DataError,
        match=r"line 1: no 'q': the row has the fields \['a', 'question'\]; expected the benchmark's question",
    ):
        load_questions(custom_benchmark({**CUSTOM, "file": file}))
