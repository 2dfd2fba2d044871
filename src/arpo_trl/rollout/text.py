"""The text of sampled ids, and how many of them may hold a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


def decode_exactly(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of `ids` with special tokens in it and no space removed: what stop strings and tags are searched in."""
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def stop_window(stop_strings: Sequence[str]) -> int:
    """How many of the newest tokens surely hold a stop string that the newest one completes.

    A token covers at least one byte; two more for a character that the window's first token begins in.
    """
    return 2 + max((len(stop.encode()) for stop in stop_strings), default=0)
