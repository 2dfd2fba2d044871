"""Decoding of sampled ids, and the window of text that can contain a stop string."""

from arpo_trl.rollout.text import decode_exactly, stop_window
from support import tokenizer


def test_special_tokens_and_spaces_stay_in_the_text():
    eos = tokenizer().eos_token
    ids = [*tokenizer().encode("do n't , <answer>", add_special_tokens=False), tokenizer().eos_token_id]
    assert decode_exactly(tokenizer(), tuple(ids)) == f"do n't , <answer>{eos}"


def test_the_window_has_a_token_for_each_byte_and_two_for_a_character_cut_in_half():
    assert stop_window(()) == 2
    assert stop_window(("</a>", "</search>")) == 9 + 2
    assert stop_window(("因",)) == 3 + 2  # three bytes
