import json
from pathlib import Path

import pytest

from arpo_trl.errors import ConfigError, DataError
from arpo_trl.evaluation.benchmarks import BENCHMARKS, Scorer
from arpo_trl.evaluation.comparison import compare, differing_settings, draw
from arpo_trl.evaluation.results import provenance, suites_of, summarise
from arpo_trl.evaluation.self_check import Malformed, TextOnly, changed, check, rewritten
from arpo_trl.rewards.answers import spaced_f1, token_f1
from evaluating import GSM8K, called, questions, record, write_lines


def summary(*records, samples=1, count=None):
    count = count or len({one["number"] for one in records})
    return summarise(GSM8K, records, questions=count, samples=samples, seed=0)


# Summaries -----------------------------------------------------------------------------------------------------------


def test_the_score_is_the_mean_over_questions_with_its_interval():
    found = summary(*(record(i, float(i < 6)) for i in range(10)))
    assert (found["metric"], found["score"], found["questions"], found["samples"]) == ("math", 0.6, 10, 10)
    low, high = found["interval"]
    assert 0.2 <= low < 0.6 < high <= 0.9
    assert found["metrics"]["em"]["mean"] == 0.6
    assert (found["failed"], found["missing"], found["unjudged"]) == (0, 0, 0)


def test_what_failed_or_is_missing_counts_in_no_score():
    found = summary(record(0, 1.0), record(1, 0.0), record(2, None), count=5)
    assert found["score"] == 0.5
    assert (found["samples"], found["failed"], found["missing"]) == (2, 1, 2)
    assert found["failures"] == {"EngineError: died": 1}


def test_a_benchmark_of_which_everything_failed_has_no_score():
    found = summary(record(0, None))
    assert (found["metric"], found["score"], found["interval"], found["metrics"]) == (None, None, None, {})


def test_several_samples_give_pass_at_k_and_the_majoritys_score():
    # Question 0: right, right, wrong. Question 1: wrong with 2, 2, and right once.
    rows = [
        record(0, 1.0, 0),
        record(0, 1.0, 1),
        record(0, 0.0, 2),
        record(1, 0.0, 0),
        record(1, 0.0, 1),
        record(1, 1.0, 2),
    ]
    found = summary(*rows, samples=3)
    assert found["score"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert found["pass_at_k"] == {"1": pytest.approx(1 / 2), "2": pytest.approx((1 + 2 / 3) / 2), "3": 1.0}
    assert found["majority"]["mean"] == 0.5


def test_pass_at_k_is_over_questions_that_have_all_samples():
    found = summary(record(0, 1.0, 0), record(0, 0.0, 1), record(1, 1.0, 0), record(1, None, 1), samples=2)
    assert found["pass_at_k"] == {"1": 0.5, "2": 1.0}
    assert found["questions_with_all_samples"] == 1
    assert found["score"] == 0.75  # (1/2 + 1) / 2


def test_levels_have_scores_of_their_own():
    rows = [record(0, 1.0, level="1"), record(1, 0.0, level="1"), record(2, 0.0, level="2")]
    levels = summary(*rows)["levels"]
    assert {level: (v["questions"], v["mean"]) for level, v in levels.items()} == {"1": (2, 0.5), "2": (1, 0.0)}


def test_calls_are_counted_by_tool_and_scores_by_calls():
    end = {"role": "assistant", "text": "", "tokens": 1}
    notice = {"role": "tool", "text": "No tool calls are left.", "calls": [], "tokens": 5}
    rows = [
        record(0, 1.0, trajectory=[called("search"), called("python", failure="error"), end]),
        record(1, 0.0, trajectory=[called("search", seconds=1.5), notice, end]),
        record(2, 1.0),
        record(3, 0.0, trajectory=[called("search")] * 12),
    ]
    found = summary(*rows)
    assert found["by_calls"] == [
        {"calls": "0", "samples": 1, "score": 1.0},
        {"calls": "1", "samples": 1, "score": 0.0},
        {"calls": "2", "samples": 1, "score": 1.0},
        {"calls": "10+", "samples": 1, "score": 0.0},
    ]
    assert found["tools"]["python"] == {
        "calls": 1, "per_sample": 0.25, "failures": {"error": 1},
        "seconds": {"total": 0.5, "mean": 0.5, "p50": 0.5, "p95": 0.5},
    }  # fmt: skip
    assert (found["tools"]["search"]["calls"], found["tools"]["search"]["failures"]) == (14, {})


def test_a_judges_score_is_the_benchmarks_only_where_there_is_a_judge():
    webwalker = BENCHMARKS["webwalker"]
    rules = {"f1": 0.5, "f1_paper": 0.25, "em": 0.0}
    rows = [record(i, 1.0, benchmark="webwalker", task="qa", scores=rules) for i in range(2)]
    found = summarise(webwalker, rows, questions=2, samples=1, seed=0)
    assert (found["metric"], found["score"], "judge" in found["metrics"]) == ("f1", 0.5, False)
    judged = [{**rows[0], "scores": {**rules, "judge": 1.0}}, {**rows[1], "scores": {**rules, "judge": None}}]
    found = summarise(webwalker, judged, questions=2, samples=1, seed=0)
    assert (found["metric"], found["score"], found["interval"]) == ("judge", None, None)
    assert (found["unjudged"], found["judge_range"]) == (1, [0.5, 1.0])


def test_without_a_verdict_no_mean_of_the_judge_is_complete():
    # Question 0: right, and without a verdict. Question 1: wrong, right. The mean is in (1/2 + 1/2)/2 … (1 + 1/2)/2.
    verdicts = [(0, 0, 1.0), (0, 1, None), (1, 0, 0.0), (1, 1, 1.0)]
    rows = [
        record(
            number, 0.0, sample, level=str(number), scores={"f1": 0.5, "f1_paper": 0.5, "em": 0.0, "judge": verdict}
        )
        for number, sample, verdict in verdicts
    ]
    rows[2]["trajectory"] = [called("search")]
    found = summarise(BENCHMARKS["webwalker"], rows, questions=2, samples=2, seed=0)
    assert found["judge_range"] == [0.5, 0.75]
    assert (found["metrics"]["judge"]["mean"], found["metrics"]["f1"]["mean"]) == (None, 0.5)
    assert (found["pass_at_k"], found["majority"]) == ({}, None)
    assert {level: value["mean"] for level, value in found["levels"].items()} == {"0": None, "1": 0.5}
    assert {row["calls"]: row["score"] for row in found["by_calls"]} == {"0": None, "1": 0.0}
    assert suites_of({"a": found, "b": {"suite": found["suite"], "score": 1.0}}) == {}
    rows[1]["scores"]["judge"] = 1.0
    found = summarise(BENCHMARKS["webwalker"], rows, questions=2, samples=2, seed=0)
    assert (found["score"], found["unjudged"], found["judge_range"]) == (0.75, 0, None)


def test_rows_of_both_tasks_are_scored_each_by_its_own():
    rows = [record(0, 1.0), record(1, 1.0, task="qa", scores={"f1": 0.5, "f1_paper": 0.5, "em": 0.0})]
    found = summary(*rows)
    assert (found["metric"], found["score"]) == ("accuracy", 0.75)


def test_suites_are_means_over_their_benchmarks():
    scores = {
        "a": ("reasoning", 0.2),
        "b": ("reasoning", 0.4),
        "c": ("deepsearch", 0.1),
        "d": (None, 1.0),
        "e": ("knowledge", None),
    }
    found = suites_of(
        {name: {"suite": suite, "score": score, "metric": None} for name, (suite, score) in scores.items()}
    )
    assert found == {"reasoning": pytest.approx(0.3), "deepsearch": 0.1}


def test_the_origin_of_results_is_recorded():
    found = provenance()
    assert {"python", "arpo-trl", "torch", "transformers", "sympy"} <= found["versions"].keys()
    assert found["git_commit"] is None or len(found["git_commit"].removesuffix("-dirty")) == 40


def test_the_papers_f1_keeps_punctuation_and_articles_and_squads_does_not():
    assert token_f1("The Saturdays.", ["saturdays"]) == 1.0
    assert spaced_f1("The Saturdays.", ["saturdays"]) == 0.0
    assert spaced_f1("the Saturdays", ["Saturdays"]) == pytest.approx(2 / 3)


# The check of scorers ------------------------------------------------------------------------------------------------


def test_golds_score_one_and_other_questions_golds_do_not():
    checks, malformed, texts = check(questions("1", "2", r"\frac{1}{2}", "4"), seed=0)
    assert {c.scorer: (c.items, c.gold, c.wrong) for c in checks} == {"math": (4, 1.0, 0.0), "em": (4, 1.0, 0.0)}
    assert {c.scorer: (c.rewritten, c.changed) for c in checks} == {"math": (1.0, 0.0), "em": (None, None)}
    assert malformed == [] and texts == []


@pytest.mark.parametrize(
    ("gold", "other", "wrong"),
    [
        ("7", "7.0", "8"),
        ("-0.5", r"-\dfrac{1}{2}", "-1.5"),
        (r"\frac{3}{4}", "3 / 4", r"\frac{3}{5}"),
        (r"(1,\frac{\pi}{2}]", None, r"(1,\frac{\pi}{3}]"),
        ("(1,2)", r"\left( 1,2 \right)", "(1,3)"),
        (r"\sqrt{2}+x", r"\sqrt{2} + x", r"\sqrt{3}+x"),
        ("east", None, None),
    ],
)
def test_a_gold_is_rewritten_and_changed(gold, other, wrong):
    if other is not None:
        assert rewritten(gold) == other
    assert changed(gold) == wrong


def test_a_gold_that_only_equal_text_matches_is_listed():
    checks, malformed, texts = check(questions("1", "36\\}", "east", r"\{x|x > 1\}"), seed=0)
    assert texts == [
        TextOnly(benchmark="sums", number=1, gold="36\\}"),
        TextOnly(benchmark="sums", number=2, gold="east"),
    ]
    assert malformed == []  # equal text does match
    assert (checks[0].rewritten, checks[0].changed) == (1.0, 0.0)


def test_a_wrong_answer_that_happens_to_be_right_shows():
    checks, _, _ = check(questions("yes", "yes", "yes", "no", scorer=Scorer.QA_F1), seed=0)
    # a cycle through four: of the three yes two get another's yes
    assert {c.scorer: c.wrong for c in checks} == {"f1": 0.5, "f1_paper": 0.5, "em": 0.5}


def test_golds_that_cannot_be_answers_are_listed():
    asked = questions("1", "{", "3")
    asked.rows[2]["answer"] = ["3", "}{"]
    checks, malformed, _ = check(asked, seed=0)
    assert malformed == [
        Malformed(benchmark="sums", number=1, gold="{", scorers=("math", "em")),
        Malformed(benchmark="sums", number=2, gold="}{", scorers=("math", "em")),
    ]
    assert checks[0].gold == pytest.approx(1 / 3)


def test_a_single_question_can_be_checked():
    checks, _, _ = check(questions("1"), seed=0)
    assert checks[0].wrong == 1.0  # there is no other gold


# Comparing -----------------------------------------------------------------------------------------------------------


def run_of(folder: Path, values: list[float | None], metric: str | None = "math", **other) -> Path:
    folder.mkdir()
    write_lines(folder / "samples.jsonl", [record(i, value, **other) for i, value in enumerate(values)])
    (folder / "results.json").write_text(json.dumps({"benchmarks": {"gsm8k": {"metric": metric}}}))
    return folder


def test_runs_are_compared_on_the_questions_they_share(tmp_path):
    a = run_of(tmp_path / "a", [1, 0, 0, 0, 0, 0, None])
    b = run_of(tmp_path / "b", [0, 1, 1, 1, 1, 0, 1])
    (one,) = compare(a, b)
    assert (one.benchmark, one.metric, one.questions, one.unpaired) == ("gsm8k", "math", 6, 1)
    assert (one.a, one.b) == (pytest.approx(1 / 6), pytest.approx(4 / 6))
    assert one.difference.mean == pytest.approx(0.5)
    assert (one.mcnemar.only_a, one.mcnemar.only_b, one.mcnemar.p) == (1, 4, pytest.approx(2 * 6 / 32))


def test_a_row_that_one_file_lacks_leaves_the_other_questions_in_common(tmp_path):
    texts = ["q0", "q1", "again", "q3", "again"]

    def run(name: str, rows: list[int]) -> Path:
        folder = run_of(tmp_path / name, [])
        lines = [record(number, float(row == 2), question=texts[row]) for number, row in enumerate(rows)]
        write_lines(folder / "samples.jsonl", lines)
        return folder

    for name, rows in (("first", [1, 2, 3, 4]), ("middle", [0, 2, 3, 4])):
        (one,) = compare(run(f"{name}-a", [0, 1, 2, 3, 4]), run(name, rows))
        # the two questions "again" score 1 and 0 in both runs, so swapping them would count in McNemar's test
        assert (one.questions, one.unpaired, one.difference.mean, one.mcnemar.only_a) == (4, 1, 0, 0)


def test_common_questions_with_other_golds_or_prompts_are_counted(tmp_path):
    def run(name: str, *changed: dict) -> Path:
        folder = run_of(tmp_path / name, [])
        write_lines(folder / "samples.jsonl", [record(i, 1.0, **other) for i, other in enumerate(changed)])
        return folder

    a = run("a", {"prompt_hash": "x"}, {"prompt_hash": "x"}, {"golds": ["1", "2"]}, {"golds": ["1"]})
    b = run(
        "b", {"prompt_hash": "y"}, {"prompt_hash": "x"}, {"golds": ["2", "1"], "prompt_hash": "x"}, {"golds": ["9"]}
    )
    (one,) = compare(a, b)
    assert (one.questions, one.other_golds, one.other_prompts) == (4, 1, 1)


def test_a_run_without_a_finished_sample_is_not_compared(tmp_path):
    a = run_of(tmp_path / "a", [1, 0])
    failed = run_of(tmp_path / "failed", [None, None], metric=None)
    with pytest.raises(ConfigError, match=r"failed has no finished sample of gsm8k; .*--output .*failed --resume"):
        compare(a, failed)


def test_a_run_does_not_differ_from_itself(tmp_path):
    a = run_of(tmp_path / "a", [1, 0, 1])
    (one,) = compare(a, a)
    assert (one.difference.mean, one.difference.p, one.mcnemar.p) == (0, 1, 1)


def test_a_run_without_some_verdicts_of_its_judge_is_not_compared(tmp_path):
    judged = run_of(tmp_path / "judged", [1, 0], metric="judge", scores={"judge": 1.0})
    partly = run_of(tmp_path / "partly", [1, 0], metric="judge", scores={"judge": None})
    with pytest.raises(ConfigError, match=r"2 sample\(s\) of gsm8k in .* have no verdict .*partly --resume"):
        compare(judged, partly)
    by_rule = run_of(tmp_path / "rule", [1, 0], scores={"math": 1.0, "judge": None})
    assert compare(by_rule, by_rule)[0].a == 1


def test_settings_in_which_compared_runs_differ_are_listed(tmp_path):
    settings = {"model": "sft", "temperature": 0.6, "context": 4096, "system_prompt": None, "limit": 10}
    of_a = {
        "settings": settings,
        "tools": {"tools": ["search"], "search_top_k": 3},
        "versions": {"sympy": "1.13", "torch": "2.8"},
        "git_commit": "abc",
        "system_prompts": {"gsm8k": None, "math": "Solve it."},
    }
    of_b = {
        "settings": {**settings, "model": "rl", "temperature": 0.0, "system_prompt": "tools", "limit": 20},
        "tools": {"tools": ["search"], "search_top_k": 10},
        "versions": {"sympy": "1.14", "torch": "2.8"},
        "git_commit": "def",
        "system_prompts": {"gsm8k": "Solve it.", "math": "Solve it.", "aime24": "Think."},
    }
    a, b = run_of(tmp_path / "a", [1]), run_of(tmp_path / "b", [1])
    assert differing_settings(a, b) == []
    for folder, described in ((a, of_a), (b, of_b)):
        (folder / "results.json").write_text(json.dumps({"benchmarks": {"gsm8k": {"metric": "math"}}, **described}))
    assert differing_settings(a, a) == []
    assert differing_settings(a, b) == [
        "temperature: 0.6 in A, 0.0 in B",
        "search_top_k: 3 in A, 10 in B",
        "sympy: '1.13' in A, '1.14' in B",
        "git_commit: 'abc' in A, 'def' in B",
        "system prompt of gsm8k: None in A, 'Solve it.' in B (whole in results.json)",
    ]


def test_the_difference_is_drawn(tmp_path):
    a, b = run_of(tmp_path / "a", [1, 0, 1]), run_of(tmp_path / "b", [0, 0, 1])
    draw(compare(a, b), ("a_$x", "b"), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_cannot_be_compared_say_why(tmp_path):
    a = run_of(tmp_path / "a", [1, 0])
    judged = run_of(tmp_path / "judged", [1, 0], metric="judge")
    others = run_of(tmp_path / "others", [1, 0], question="another")
    elsewhere = run_of(tmp_path / "elsewhere", [1])
    (elsewhere / "results.json").write_text(json.dumps({"benchmarks": {"math": {"metric": "math"}}}))
    (tmp_path / "empty").mkdir()
    for b, error, message in (
        (judged, ConfigError, "gsm8k is scored by math in .* and by judge in"),
        (others, ConfigError, "no question of gsm8k in common"),
        (elsewhere, ConfigError, r"no benchmark in common: \['gsm8k'\] in .*, \['math'\] in"),
        (tmp_path / "empty", DataError, r"contains no results.json of a finished evaluation: .* cannot be read"),
    ):
        with pytest.raises(error, match=message):
            compare(a, b)
