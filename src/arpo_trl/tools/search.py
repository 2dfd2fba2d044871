"""The `search` tool: BM25 over passages of one's own, or results recorded earlier.

Both give the model the same text, `Page 1: …` and so on, one line per result, best first. Equal scores keep the order
of the passages, so a run that is repeated sees the same pages.
"""

from __future__ import annotations

import json
import logging
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import bm25s
import numpy as np
from bm25s.stopwords import STOPWORDS_EN

from arpo_trl.errors import DataError

NOTHING_FOUND = "No search results found."

_WORD = re.compile(r"\w+")
_POSSESSIVE = re.compile(r"['’]s\b")
# bm25s's list has no question words, and without them "who is …" would match every recorded "who is …".
# fmt: off
_QUESTION_WORDS = frozenset({
    "what", "which", "who", "whom", "whose", "when", "where", "why", "how",
    "do", "does", "did", "has", "have", "had", "were", "can", "could",
})
# fmt: on
_STOPWORDS = _QUESTION_WORDS.union(STOPWORDS_EN)
_QUERY_PREFIX = re.compile(r"^(?:search )?query\s*:\s*", re.IGNORECASE)
_CUT = " …"

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs every index it builds


class Searchable(Protocol):
    """What `search_tool` searches: `LocalIndex` or `RecordedSearch`."""

    def search(self, query: str, top_k: int) -> list[str]:
        """At most `top_k` texts that answer `query`, best first; empty when nothing does."""
        ...


def tokenize(text: str) -> list[str]:
    """The words of `text` that are searched for: lower case, without accents, without the commonest English words.

    Words of one letter or digit stay, unlike in `bm25s.tokenize`: chemical symbols and single figures carry meaning.
    """
    decomposed = unicodedata.normalize("NFKD", _POSSESSIVE.sub("", text.casefold()))
    words = _WORD.findall("".join(character for character in decomposed if not unicodedata.combining(character)))
    return [word for word in words if word not in _STOPWORDS]


class _Ranking:
    """BM25 over tokenized texts."""

    def __init__(self, index: bm25s.BM25) -> None:
        self._index = index

    @classmethod
    def of(cls, texts: Sequence[str]) -> _Ranking:
        # numpy: compiling numba's version at the first query takes longer than thousands of queries over a small
        # corpus.
        index = bm25s.BM25(backend="numpy")
        index.index([tokenize(text) for text in texts], show_progress=False)
        return cls(index)

    def best(self, query: str, k: int) -> list[int]:
        """Positions of the at most `k` texts that share a word with `query`, best first, ties in order of position."""
        known = [word for word in tokenize(query) if word in self._index.vocab_dict]
        if not known:
            return []
        scores = self._index.get_scores(known)
        hits = np.flatnonzero(scores > 0)
        if len(hits) > k:  # keep every text that ties with the k-th: which of them stays is decided by position below
            hits = hits[scores[hits] >= np.partition(scores[hits], -k)[-k]]
        return [int(hit) for hit in hits[np.argsort(-scores[hits], kind="stable")][:k]]

    def save(self, folder: Path, passages: list[dict[str, str]]) -> None:
        self._index.save(folder, corpus=passages, show_progress=False)


class LocalIndex:
    """A BM25 index over passages.

    Args:
        passages: Texts, or mappings with `text` and perhaps `title`; a title is searched and shown before its text.

    Raises `DataError` when there is none, or one is of another shape.
    """

    def __init__(self, passages: Sequence[str | Mapping[str, str]]) -> None:
        self._passages: Sequence[Mapping[str, str]] = [
            _passage(passage, f"passage {number}") for number, passage in enumerate(passages)
        ]
        if not self._passages:
            raise DataError("a search index needs at least one passage, got none")
        shown = [_shown(passage) for passage in self._passages]
        if not any(map(tokenize, shown)):
            raise DataError(f"none of the {len(shown)} passages of the search index has a word to search for")
        self._ranking = _Ranking.of(shown)

    @classmethod
    def from_jsonl(cls, path: str | Path) -> LocalIndex:
        """The index of a file with one passage per line, each a JSON string or object as above."""
        passages = []
        for number, line in enumerate(_read(path).split("\n"), start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                passages.append(_passage(json.loads(line), where))
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not JSON ({error}); expected one passage per line") from error
        if not passages:
            raise DataError(f"{path} has no passages; expected one per line")
        return cls(passages)

    @classmethod
    def load(cls, folder: str | Path) -> LocalIndex:
        """The index that `save` wrote, memory-mapped: passages are read from the disk when they are found."""
        try:
            index = bm25s.BM25.load(folder, mmap=True, load_corpus=True, show_progress=False)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"{folder} is not a saved search index ({error}). Write it with LocalIndex.save."
            ) from error
        if index.corpus is None:
            raise DataError(f"{folder} holds an index without its passages. Write it with LocalIndex.save.")
        loaded = cls.__new__(cls)
        loaded._passages = index.corpus
        loaded._ranking = _Ranking(index)
        return loaded

    def save(self, folder: str | Path) -> None:
        """Write index and passages to `folder`, which is made if it is missing."""
        self._ranking.save(Path(folder), [dict(self._passages[number]) for number in range(len(self))])

    def __len__(self) -> int:
        return len(self._passages)

    def search(self, query: str, top_k: int) -> list[str]:
        """The at most `top_k` passages that share a word with `query`, best first."""
        return [_shown(self._passages[hit]) for hit in self._ranking.best(query, top_k)]


class RecordedSearch:
    """Results recorded earlier, for training without a search service: a JSON object {query: result text}.

    Queries are compared without case, surplus white space or a leading `search query:` (which some recordings carry
    because a model wrote it). A query that was not recorded gets the result of the recorded one nearest by BM25, if
    they share a word; recorded queries that had found nothing stand for themselves alone.

    Raises `DataError` when the file is missing, empty or of another shape.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            recorded = json.loads(_read(path))
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is not JSON ({error}); expected an object {{query: result text}}") from error
        if not isinstance(recorded, dict) or not recorded:
            got = "an empty object" if recorded == {} else type(recorded).__name__
            raise DataError(f"{path} holds {got}; expected an object {{query: result text}}")
        for query, result in recorded.items():
            if not isinstance(result, str):
                raise DataError(f"{path}, query {query!r}: the result is {type(result).__name__}, expected text")
        self._results: dict[str, str] = {}
        for query, result in recorded.items():
            self._results.setdefault(_normalised(query), result)
        self._queries = [query for query, result in self._results.items() if _has_results(result) and tokenize(query)]
        self._ranking = _Ranking.of(self._queries) if self._queries else None

    def __len__(self) -> int:
        return len(self._results)

    def search(self, query: str, top_k: int) -> list[str]:
        """The at most `top_k` pages recorded for `query`, or else for the nearest recorded query."""
        result = self._results.get(_normalised(query))
        if result is None:
            nearest = self._ranking.best(_normalised(query), 1) if self._ranking else []
            result = self._results[self._queries[nearest[0]]] if nearest else ""
        return _pages(result)[:top_k] if _has_results(result) else []


def search_tool(source: Searchable, *, top_k: int = 5, max_chars: int = 1000) -> Callable[[str], str]:
    """A function `search(query: str) -> str` to offer to a model.

    Args:
        source: `LocalIndex` or `RecordedSearch`.
        top_k: Results shown at most.
        max_chars: Longest text of one result; a longer one is cut.
    """

    def search(query: str) -> str:
        """Search for a query and return the texts found, the best first.

        Args:
            query: What to look for, in a few words.
        """
        pages = [" ".join(text.split()) for text in source.search(query, top_k)]
        if not pages:
            return NOTHING_FOUND
        cut = [page if len(page) <= max_chars else page[: max_chars - len(_CUT)] + _CUT for page in pages]
        return "\n".join(f"Page {number}: {page}" for number, page in enumerate(cut, start=1))

    return search


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _passage(value: Any, where: str) -> dict[str, str]:
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, Mapping) and isinstance(value.get("text"), str) and isinstance(value.get("title", ""), str):
        return {key: value[key] for key in ("title", "text") if key in value}
    got = f"keys {sorted(map(str, value))}" if isinstance(value, Mapping) else type(value).__name__
    raise DataError(f"{where}: expected a string, or an object with the strings `text` and perhaps `title`, got {got}")


def _shown(passage: Mapping[str, str]) -> str:
    return f"{passage['title']}: {passage['text']}" if passage.get("title") else passage["text"]


def _normalised(query: str) -> str:
    return _QUERY_PREFIX.sub("", " ".join(query.casefold().split()))


def _has_results(result: str) -> bool:
    return bool(result.strip()) and result.strip() != NOTHING_FOUND


def _pages(result: str) -> list[str]:
    """The pages of a recorded result; text that is not in pages is one."""
    parts = re.split(r"^Page \d+: ?", result, flags=re.MULTILINE)
    return [part.strip() for part in parts if part.strip()]
