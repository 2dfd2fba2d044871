"""Mathematical answers are parsed completely or not at all, and equal if they mean the same."""

import json
from collections import defaultdict
from pathlib import Path

import pytest

from arpo_trl.rewards import math_equal
from arpo_trl.rewards.math_worker import MathWorker
from arpo_trl.rewards.mathematics.equality import equal, is_text
from arpo_trl.rewards.mathematics.reading import readings
from arpo_trl.rewards.mathematics.text import clean
from arpo_trl.rewards.mathematics.values import Quantity, Text

CASES = Path(__file__).parent / "cases"


def cases(name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (CASES / name).read_text().splitlines()]


def by_kind(name: str) -> list[tuple[str, list[dict[str, object]]]]:
    kinds = defaultdict(list)
    for case in cases(name):
        kinds[str(case["kind"])].append(case)
    return sorted(kinds.items())


def test_the_published_pairs_are_all_judged_right_by_the_worker() -> None:
    pairs = cases("math_equal.jsonl")
    wrong = [case for case in pairs if math_equal(str(case["prediction"]), str(case["gold"])) != case["equal"]]
    assert len(pairs) == 349 and wrong == []


@pytest.mark.parametrize(("kind", "pairs"), by_kind("math_variants.jsonl"), ids=lambda value: str(value)[:20])
def test_every_pair_of_a_kind_is_judged_right(kind: str, pairs: list[dict[str, object]]) -> None:
    assert [case for case in pairs if equal(str(case["prediction"]), str(case["gold"])) != case["equal"]] == []


@pytest.mark.parametrize(
    "text",
    [
        *(
            "4\\sqrt(2))",
            "1, 2, \\ldots, n",
            "0}^{n-1}F_k",
            "x_1 +",
            "(1,2",
            "1 2",
            "1.2.3",
            "f(",
            "\\foo{2}",
            "5 not 6",
        ),
        *("\\exists x, x > 0", "\\text{all } n", "9**9**9", "10000000!", "1e999999", "1/0", "2^{10^9}", "A2_3 ="),
    ],
)
def test_what_is_not_read_whole_is_text(text: str) -> None:
    assert is_text(text)


def test_decimals_and_units_are_kept_with_the_number() -> None:
    (value,) = readings("0.50 cm^2")
    # 0.50 is a half, written with two significant digits
    assert isinstance(value, Quantity)
    assert (str(value.value), value.unit, value.digits) == ("1/2", "cm^2", 2)


def test_decoration_is_removed_and_content_is_kept() -> None:
    assert clean("**$\\dfrac{1}{2}$**") == "\\frac{1}{2}"
    assert clean("The answer is \\(\\boxed{D}\\).") == "D"
    assert clean("The answer is not 7") == "not 7" and is_text("not 7")
    assert clean("\u200b\uff15\uff0f\uff16") == "5/6"


HOSTILE = [
    *(
        "9**9**9**9",
        "9^{9^{9^9}}",
        "1e999999999",
        "(" * 200 + "1" + ")" * 200,
        "{" * 200,
        "[" * 200,
        "|" * 201,
        "-" * 500,
    ),
    *("!" * 200, "3" + "!" * 100, "100000!", r"\binom{10000}{5000}", "(x+y+z)^{999}", "1" * 510, "0." + "3" * 500),
    *(
        "2^{-1e300}",
        "(10^{5000}+1)^{1/2}",
        "gamma(10^9)",
        r"\prod_{k=1}^{1000} k!",
        "answer " * 70,
        "the answer is " * 35,
    ),
    *(
        r"\pm " * 100 + "1",
        r"1\pm2" * 50,
        "$" * 300,
        "*" * 400,
        "`" * 400,
        r"\text{" * 80,
        r"\sin" * 120 + " x",
        "½" * 100,
    ),
    *(
        "e^{e^{e^{e^{10}}}}",
        r"\begin{cases}" * 30,
        "1:2" * 100,
        "x<" * 200 + "1",
        "\ud800",
        "\x00",
        r"\{x|" * 50,
        "~" * 300,
    ),
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:12].encode("unicode_escape").decode())
def test_hostile_text_equals_nothing_and_costs_little(text: str) -> None:
    worker = shared_worker()
    process = worker._running()
    assert not worker.equal(text, "6")
    assert worker._running() is process  # it was refused, not ended at its limit


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        (
            r"\frac12\sec x\tan x+\frac12\ln|\sec x+\tan x|+C",
            r"\frac{\sin x}{2\cos^2 x}+\frac14\ln\left|\frac{1+\sin x}{1-\sin x}\right|+C",
        ),
        (r"x^{\sin x}(\cos x\ln x+\frac{\sin x}{x})", r"x^{\sin x}\cos x\ln x+x^{\sin x-1}\sin x"),
        (r"x^x(1+\ln x)", r"x^x+x^x\ln x"),
    ],
)
def test_formulas_of_calculus_are_compared_within_the_limit_of_the_worker(prediction: str, gold: str) -> None:
    assert shared_worker().equal(prediction, gold)
    assert not shared_worker().equal(prediction, gold + "+1")


def shared_worker(made: list[MathWorker] = []) -> MathWorker:  # noqa: B006
    if not made:
        made.append(MathWorker())
    return made[0]


def test_a_word_is_not_a_product_but_a_product_may_look_like_a_word() -> None:
    assert isinstance(readings("abc")[0], Text)
    assert equal("a*b*c", "abc") and not equal("acb", "abc")
