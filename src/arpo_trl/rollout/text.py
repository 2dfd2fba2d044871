"""Decoding of sampled ids, control tokens, and the search for stop strings."""

from __future__ import annotations

import itertools
import re
from bisect import bisect_left
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_WHITE_SPACE = " \t\r\n▁"
"""As texts and vocabularies write it."""


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the ids and texts of the tokens that text of unknown origin must not become."""
    return {
        number: token.content
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special or token.content.strip(_WHITE_SPACE)  # Gemma's white space consists of added tokens
    }


def decode_exactly(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Decode `ids` with special tokens, without cleaning up spaces, to search the text for stop strings and tags."""
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def decode_for_encoding(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Decode `ids` to a text from which no control token can be read that they do not contain.

    Where plain tokens spell a control token, as in a tool's result, a space follows its first character.
    """
    text, control = decode_exactly(tokenizer, ids), control_tokens(tokenizer)
    spelled = re.compile("|".join(map(re.escape, sorted(control.values(), key=len, reverse=True))) or "(?!)")
    if len(spelled.findall(text)) == sum(token in control for token in ids):
        return text
    is_token: list[bool] = []  # for each control token that the text spells
    for is_control, run in itertools.groupby(ids, control.__contains__):
        tokens = list(run)
        count = len(tokens) if is_control else len(spelled.findall(decode_exactly(tokenizer, tokens)))
        is_token += [is_control] * count
    known = iter(is_token)
    return spelled.sub(lambda match: match[0] if next(known, False) else f"{match[0][0]} {match[0][1:]}", text)


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
