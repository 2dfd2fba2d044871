import pytest

from arpo_trl.common.spans import Spans


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_span_inside_another_counts_for_itself_only(clock):
    spans = Spans(clock)
    with spans("update"):
        clock.now += 1
        with spans("generate"):
            clock.now += 2
            with spans("reward"):
                clock.now += 4
        clock.now += 8
    # 15 s: 1 + 8 outside `generate`, which took 6, of which 4 were the reward's
    assert [spans.take(name) for name in ("update", "generate", "reward")] == [9, 2, 4]


def test_spans_of_one_name_add_up_until_they_are_taken(clock):
    spans = Spans(clock)
    for seconds in (1, 2):
        with spans("reward"):
            clock.now += seconds
    assert spans.take("reward") == 3
    assert spans.take("reward") == spans.take("logprobs") == 0


def test_a_span_that_fails_is_not_counted_but_was_inside_the_one_around_it(clock):
    spans = Spans(clock)
    with spans("update"):
        clock.now += 1
        with pytest.raises(ValueError, match="interrupted"), spans("reward"):
            clock.now += 2
            raise ValueError("interrupted")
    assert (spans.take("update"), spans.take("reward")) == (1, 0)
