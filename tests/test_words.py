"""Tokens of factual answers: punctuation is deleted, except in numbers and formulas."""

import json
from pathlib import Path

import pytest

from arpo_trl.evaluation.scoring import score
from arpo_trl.rewards import HierarchicalReward, LLMJudge, exact_match, paper_f1, token_f1
from arpo_trl.rewards.answers import math_equal
from arpo_trl.rewards.words import normalized_tokens
from loopback import Loopback, Reply

CASES = [json.loads(line) for line in (Path(__file__).parent / "cases" / "words.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", sorted({case["kind"] for case in CASES}))
def test_exact_match_is_right_for_every_case_of_a_kind(kind: str) -> None:
    pairs = [case for case in CASES if case["kind"] == kind]
    assert [case for case in pairs if exact_match(case["prediction"], [case["gold"]]) != case["equal"]] == []


@pytest.mark.parametrize(("prediction", "gold"), [("2n+1", "2n-1"), ("-9", "9"), ("3.5", "35"), (">5", "<5")])
def test_a_different_sign_point_or_relation_scores_nothing(prediction: str, gold: str) -> None:
    assert token_f1(prediction, [gold]) == 0.0
    assert paper_f1(prediction, [gold]) == 1.0  # as the released code has it


def test_invisible_characters_and_forms_of_unicode_change_no_score() -> None:
    assert exact_match("Poe", ["Poe\u200b"]) == token_f1("\ufeffPoe", ["Poe"]) == 1.0
    assert math_equal("Poe\u0301", "Po\xe9") and math_equal("Po\xe9", "Poe\u0301")


def test_vitamin_a_is_not_vitamin() -> None:
    assert normalized_tokens("Vitamin A") == ["vitamin", "a"]
    assert token_f1("Vitamin", ["Vitamin A"]) == pytest.approx(2 / 3)  # 2·1/(1+2)


def test_a_date_has_one_spelling_of_its_separators() -> None:
    assert normalized_tokens("2024/05/01") == normalized_tokens("2024-05-01") == ["2024-05-01"]


def test_a_formula_is_one_word_however_it_is_spaced() -> None:
    assert normalized_tokens("x = 2n + 1") == ["x=2n+1"]
    assert normalized_tokens("from 12 May 1633 - 16 May 1701") == "from 12 may 1633 16 may 1701".split()  # a dash


def incorrect(asked: object) -> Reply:
    return Reply({"choices": [{"message": {"content": "Incorrect"}}]})


@pytest.mark.parametrize(
    ("prediction", "gold", "task", "asked"),
    [
        ("2n-1", "2n+1", "qa", 1),
        ("-9", "9", "qa", 1),
        ("The 9.", "9", "qa", 0),
        ("[1,2]", "(1,2)", "math", 1),  # the same words, another interval
        ("1/2", "0.5", "math", 0),
    ],
)
def test_the_judge_is_called_if_the_rule_does_not_decide(prediction: str, gold: str, task: str, asked: int) -> None:
    row = {"prompt": [{"role": "user", "content": "?"}], "answer": [gold], "task": task}
    with Loopback(incorrect) as server:
        judge = LLMJudge(server.url, "wise")
        assert score(prediction, row, judge)["judge"] == float(not asked)
        reward = HierarchicalReward("judge", judge=judge).scores(
            turns=[[f"<answer>\\boxed{{{prediction}}}</answer>"]],
            tool_calls=[[]],
            stop_reason=["eos"],
            answer=[gold],
            task=[task],
            prompts=[row["prompt"]],
        )
        assert reward[0].accuracy == float(not asked)
        assert len(server.asked) == asked  # a verdict is remembered


@pytest.mark.parametrize("text", ["1-1-" + "1" * 200_000 + ".1", "(" + "1," * 100_000 + "x)", "[1" * 60_000])
def test_a_flood_of_digits_is_read_in_one_pass(text: str) -> None:
    assert token_f1(text, ["a"]) == 0.0
