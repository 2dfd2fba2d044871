"""The excerpt of a page for a goal consists of the windows that match the goal best."""

import pytest

from arpo_trl.tools.visit.excerpts import _best, excerpt


def test_a_short_text_is_shown_whole():
    assert excerpt(" a b ", "anything", 10) == "a b"


def test_windows_keep_their_order_and_gaps_are_marked():
    text = "\n".join(["alpha " * 90, "filler " * 80, "beta " * 100, "filler " * 80])
    shown = excerpt(text, "beta alpha", 1200)
    assert shown.index("alpha") < shown.index("\n[…]\n") < shown.index("beta")
    assert "filler" not in shown
    assert len(shown) <= 1200


def test_a_text_without_spaces_is_cut_into_windows():
    text = "熔" * 3000 + "铁的熔点是一千五百度" + "点" * 3000
    shown = excerpt(text, "铁", 800)
    assert "铁的熔点" in shown
    assert len(shown) <= 800


@pytest.mark.parametrize("max_chars", [200, 300, 604, 605])
def test_the_goal_counts_for_a_short_excerpt_too(max_chars):
    lines = [f"Line {i} is about the weather in some town, and goes on for as long as it takes." for i in range(60)]
    lines[50] += " Gallium melts at 29.76 °C."
    shown = excerpt("\n".join(lines), "when does gallium melt", max_chars)
    assert "Gallium melts" in shown
    assert len(shown) <= max_chars


def test_windows_are_ranked_by_bm25():
    """Of 3 windows of 2, 4 and 3 words, mean 3, one has "iron" once, one twice: df 2, idf ln(1 + 1.5 / 2.5).

    Length factors: 1 - 0.75 + 0.75 * 2 / 3 = 0.75 and 0.25 + 0.75 * 4 / 3 = 1.25.
    Scores: idf * 1 / (1 + 1.5 * 0.75) = idf * 0.471; idf * 2 / (2 + 1.5 * 1.25) = idf * 0.516. The second is better.
    """
    assert _best(["iron ore", "iron iron bar red", "tin lead zinc"], "Iron?") == [1, 0]
    assert _best(["iron ore", "iron ore"], "iron") == [0, 1]
    assert _best(["iron", "tin"], "gold") == _best(["iron"], "the") == _best(["...", "?"], "iron") == []


@pytest.mark.parametrize("text", ["x" * 100_000, " " * 50_000 + "x" + " " * 50_000, "x " * 50_000, "\n" * 100_000])
def test_texts_of_one_kind_are_cut_too(text):
    assert len(excerpt(text, "x", 500)) <= 500
