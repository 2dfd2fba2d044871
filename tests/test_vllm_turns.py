import math

import pytest

from arpo_trl.errors import EngineError
from arpo_trl.rollout.engines.base import Probe, SamplingParams, Turn, TurnRequest, TurnStop
from arpo_trl.rollout.engines.vllm.turns import Draft, Segment, sampling_params
from arpo_trl.rollout.protocols import ContentEncoder
from arpo_trl.rollout.text import StopFinder
from support import tokenizer

STOPS = ("</search>", "</python>")
EOS = int(tokenizer().eos_token_id)
PROMPT = [50, 51]


def encode(text: str) -> list[int]:
    """Ids without special tokens, so that tags are split."""
    return ContentEncoder(tokenizer())(text)


def finder(stops=STOPS) -> StopFinder:
    return StopFinder(tokenizer(), stops)


def draft(max_tokens=40, probe=4, seed=7, stops=STOPS) -> Draft:
    return Draft(
        TurnRequest(id=3, ids=PROMPT, max_tokens=max_tokens, probe_tokens=probe, seed=seed, key=(0, 1)),
        [EOS],
        finder(stops),
        1000,
        2,
    )


def segment(ids, *, probed=False):
    top = [[math.log(0.5), math.log(0.5)]] * len(ids) if probed else []
    return Segment(ids=list(ids), logprobs=[-0.5] * len(ids), top_logprobs=top)


def test_first_the_probe_with_top_logprobs_then_the_rest_without():
    made = draft()
    first = made.next_segment()
    assert (first.ids, first.max_tokens, first.top_logprobs) == (PROMPT, 4, 2)
    probe = made.add(segment([60, 61, 62, 63], probed=True))
    assert probe == Probe(id=3, entropies=[pytest.approx(math.log(2))] * 4)
    rest = made.next_segment()
    assert (rest.ids, rest.max_tokens, rest.top_logprobs) == ([*PROMPT, 60, 61, 62, 63], 36, 0)
    turn = made.add(segment([64, EOS]))
    assert isinstance(turn, Turn)
    assert (turn.ids, turn.stop) == ([60, 61, 62, 63, 64, EOS], TurnStop.EOS)
    assert turn.logprobs == [-0.5] * 6
    assert turn.entropies == probe.entropies


def test_each_segment_has_its_own_seed_that_vllm_accepts():
    made = draft(seed=2**64 - 1)
    seeds = [made.next_segment().seed]
    made.add(segment([60, 61, 62, 63], probed=True))
    seeds.append(made.next_segment().seed)
    assert len(set(seeds)) == 2
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_turn_that_ends_within_the_probe_sends_no_probe():
    made = draft()
    turn = made.add(segment([60, EOS], probed=True))
    assert isinstance(turn, Turn)
    assert (turn.ids, len(turn.entropies), turn.stop) == ([60, EOS], 2, TurnStop.EOS)


def test_a_turn_no_longer_than_the_probe_ends_by_length():
    made = draft(max_tokens=3)
    assert made.next_segment().max_tokens == 3
    turn = made.add(segment([60, 61, 62], probed=True))
    assert isinstance(turn, Turn)
    assert (turn.stop, len(turn.entropies)) == (TurnStop.LENGTH, 3)


def test_a_turn_with_too_few_tokens_is_requested_again():
    made = draft(max_tokens=10, probe=4)
    assert made.add(segment([60, 61], probed=True)) is None  # not yet k
    assert made.next_segment().max_tokens == 2
    assert isinstance(made.add(segment([62, 63], probed=True)), Probe)
    assert made.add(segment([64])) is None
    assert made.next_segment().max_tokens == 5
    turn = made.add(segment([65] * 5))
    assert isinstance(turn, Turn) and turn.stop is TurnStop.LENGTH


def test_without_probe_tokens_there_is_one_request():
    made = draft(probe=0)
    assert (made.next_segment().max_tokens, made.next_segment().top_logprobs) == (40, 0)
    turn = made.add(segment([EOS]))
    assert isinstance(turn, Turn) and turn.entropies == []


def test_a_stop_string_that_straddles_probe_and_rest_is_found_and_costs_a_few_tokens():
    ids = encode("iron</search>")
    boundary = next(n for n in range(len(ids)) if tokenizer().decode(ids[:n]).endswith("</sea"))
    made = draft(probe=boundary)
    assert isinstance(made.add(segment(ids[:boundary], probed=True)), Probe)
    assert made.next_segment().max_tokens == len("rch>")
    tail = ids[boundary:]
    turn = made.add(segment(tail + encode(" more")[: 4 - len(tail)]))  # vLLM could not know
    assert isinstance(turn, Turn)
    assert (turn.ids, turn.stop) == (ids, TurnStop.STOP_STRING)
    assert len(turn.logprobs) == len(ids)


def test_a_turn_continues_after_an_incomplete_stop_string():
    ids = encode("a </sea")
    made = draft(probe=len(ids))
    made.add(segment(ids, probed=True))
    assert made.next_segment().max_tokens == len("rch>")
    assert made.add(segment(encode("zzzz"))) is None
    assert made.next_segment().max_tokens == 40 - len(ids) - len(encode("zzzz"))


@pytest.mark.parametrize(
    "ids",
    [
        [tokenizer().convert_tokens_to_ids("</search>")],  # one special token
        encode("</search>"),  # split over tokens
        encode("x</sea") + encode("rch>\n\n and more"),  # its end merged with what follows
    ],
    ids=["special", "split", "merged"],
)
def test_a_turn_is_cut_after_the_token_that_completes_a_stop_string(ids):
    made = draft(probe=0, max_tokens=100)
    turn = made.add(segment(ids + encode(" late")))  # tokens that came along in one step
    assert isinstance(turn, Turn) and turn.stop is TurnStop.STOP_STRING
    assert turn.ids == (ids + encode(" late"))[: len(turn.ids)]
    assert "</search>" in tokenizer().decode(turn.ids)
    assert "</search>" not in tokenizer().decode(turn.ids[:-1])


def test_an_eos_before_a_stop_string_ends_the_turn():
    made = draft(probe=0)
    turn = made.add(segment([60, EOS, *encode("</search>")]))
    assert isinstance(turn, Turn)
    assert (turn.ids, turn.stop) == ([60, EOS], TurnStop.EOS)


@pytest.mark.parametrize(
    ("text", "missing"),
    [("plain", 0), ("a <", 8), ("a </", 7), ("a </search", 1), ("a </sea", 4), ("</search", 1), ("", 0)],
)
def test_how_much_of_a_stop_string_is_missing(text, missing):
    assert finder().missing(encode(text)) == missing


def test_half_a_character_does_not_hide_that_a_stop_string_has_begun():
    stop = "</wétter>"
    ids = encode("x </wé")[:-1]  # é is two bytes, two tokens here
    assert tokenizer().decode(ids).endswith("\ufffd")
    assert finder((stop,)).missing(ids) == len("étter>")


def test_without_stop_strings_there_is_no_search():
    assert finder(()).end(encode("</search>"), 0) is None
    assert finder(()).missing(encode("</sea")) == 0


def test_a_turn_continues_after_a_wrong_end_from_vllm():
    made = draft(probe=0)
    assert made.add(segment([60])) is None  # it had 39 more
    assert made.next_segment().ids == [*PROMPT, 60]
    assert made.next_segment().max_tokens == 39


@pytest.mark.parametrize("bad", [Segment(ids=[], logprobs=[]), Segment(ids=[60, 61], logprobs=[-0.5])])
def test_an_answer_without_tokens_or_logprobs_is_an_error(bad):
    with pytest.raises(EngineError, match="a logprob for each"):
        draft().add(bad)


def test_a_request_without_room_is_refused():
    with pytest.raises(EngineError, match="expected at least 1 of each"):
        draft(max_tokens=0)


def test_every_setting_is_sent_since_servers_fill_gaps_from_the_models_own_configuration():
    params = sampling_params(
        SamplingParams(
            eos_ids=(EOS,),
            stop_strings=STOPS,
            temperature=0.7,
            top_p=0.9,
            top_k=50,
            min_p=None,
            repetition_penalty=1.1,
        )
    )
    assert (params["temperature"], params["top_p"], params["top_k"], params["min_p"]) == (0.7, 0.9, 50, 0.0)
    assert params["repetition_penalty"] == 1.1
    assert params["stop"] == list(STOPS)
    assert params["stop_token_ids"] == [EOS] and params["ignore_eos"]
