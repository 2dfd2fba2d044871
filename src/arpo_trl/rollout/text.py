"""Decoding of sampled ids, and the search for stop strings in them."""

from __future__ import annotations

from bisect import bisect_left
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


class StopFinder:
    """Finds complete and incomplete stop strings in a sequence of ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str]):
        self._tokenizer = tokenizer
        self._stops = tuple(stop_strings)
        self._window = stop_window(self._stops)

    def end(self, ids: list[int], start: int) -> int | None:
        """The smallest n > `start` such that the text of `ids[:n]` contains a stop string that the text of
        `ids[:start]` does not contain."""
        first = max(0, start - self._window)

        def holds(n: int) -> bool:
            text = decode_exactly(self._tokenizer, ids[first:n])
            return any(stop in text for stop in self._stops)

        if not self._stops or not holds(len(ids)):
            return None
        return bisect_left(range(start + 1, len(ids)), True, key=holds) + start + 1

    def missing(self, ids: list[int]) -> int:
        """The number of characters that complete the partial stop string at the end of `ids`; 0 if there is none."""
        # The text without an incomplete character at the end.
        text = decode_exactly(self._tokenizer, ids[-self._window :]).rstrip("\ufffd")
        return max(
            (
                len(stop) - max((n for n in range(1, len(stop)) if text.endswith(stop[:n])), default=len(stop))
                for stop in self._stops
            ),
            default=0,
        )
