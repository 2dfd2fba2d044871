"""Long waits show a line or a progress bar, short ones nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arpo_trl.common import waiting
from arpo_trl.common.waiting import Silence, say_loading
from arpo_trl.quickstart.__main__ import TASKS
from arpo_trl.tools.search.index import LocalIndex

ROOT = Path(__file__).parents[1]


def test_a_silence_is_worth_a_warning_after_5_minutes_and_whenever_it_has_doubled() -> None:
    silence = Silence()
    # waits of 100 s: warnings at 300, 600 and 1200 s
    assert [i for i in range(1, 15) if silence.goes_on(100.0)] == [3, 6, 12]
    silence.broken()
    assert [i for i in range(1, 7) if silence.goes_on(100.0)] == [3, 6]


def test_a_program_says_on_its_first_rank_that_it_loads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say_loading("train.py")
    assert capsys.readouterr() == ("", "train.py: loading PyTorch and TRL …\n")
    monkeypatch.setenv("RANK", "1")
    say_loading("train.py")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("rank", [0, 1])
def test_an_index_that_is_slow_to_build_shows_bars_on_the_first_rank(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "passages.jsonl"
    path.write_text("".join(json.dumps(f"iron {i}") + "\n" for i in range(3)), "utf-8")
    monkeypatch.setattr(waiting, "BAR_AFTER_S", 60.0)
    LocalIndex.open(path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(waiting, "BAR_AFTER_S", 0.0)
    monkeypatch.setenv("RANK", str(rank))
    assert LocalIndex.open(path).search("iron", 1) == ["iron 0"]
    said = capsys.readouterr().err
    for name in ("Reading passages", "Splitting texts into words", "BM25S"):
        assert (name in said) is (rank == 0)


def test_the_pages_state_the_durations_that_the_quickstart_prints() -> None:
    assert TASKS["search"].duration == "four minutes on two CPU cores"
    assert TASKS["shop"].duration.startswith("eight minutes")
    for page in ("README.md", "docs/start.md", "docs/commands.md"):
        text = " ".join((ROOT / page).read_text("utf-8").split())
        assert "about four minutes on two CPU cores" in text and "about eight minutes" in text, page
    results = " ".join((ROOT / "docs/results.md").read_text("utf-8").split())
    assert "a quickstart takes four minutes" in results
    assert "took 295 + 189 s, about eight minutes" in results
    assert "about four minutes, TASK=shop about eight" in (ROOT / "Makefile").read_text("utf-8")
