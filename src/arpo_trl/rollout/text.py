"""Decoding of sampled ids, and the number of ids to search for a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


def decode_exactly(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Decode `ids` with special tokens, without cleaning up spaces, to search the text for stop strings and tags."""
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def stop_window(stop_strings: Sequence[str]) -> int:
    """The number of last tokens whose text contains any stop string that the last token completes.

    A token covers at least one byte. Two more tokens are added because the window's first token may split a character.
    """
    return 2 + max((len(stop.encode()) for stop in stop_strings), default=0)
