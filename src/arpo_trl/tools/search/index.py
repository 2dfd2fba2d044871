"""The `search` tool: BM25 over passages of one's own, results recorded earlier, or a service (`web_search`).

All give the model the same text, `Page 1: …` and so on, one line per result, best first. Equal scores keep the order
of the passages, so a run that is repeated sees the same pages.
"""

from __future__ import annotations

import json
import logging
import mmap
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import bm25s
import numpy as np

from arpo_trl.common.user_files import json_lines, read_json
from arpo_trl.errors import DataError
from arpo_trl.tools.search.words import tokenize

NOTHING_FOUND = "No search results found."
MAX_QUERY_CHARS = 2000
"""Of a query the rest is not looked at: it is a model's, and may be made to take long."""

_QUERY_PREFIX = re.compile(r"^(?:search )?query\s*:\s*", re.IGNORECASE)
_CUT = " …"

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs every index it builds


class Searchable(Protocol):
    """What `search_tool` searches: `LocalIndex`, `RecordedSearch` or `WebSearch`."""

    def search(self, query: str, top_k: int) -> list[str]:
        """At most `top_k` texts that answer `query`, best first; empty when nothing does."""
        ...


class _Ranking:
    """BM25 over tokenized texts."""

    def __init__(self, index: bm25s.BM25) -> None:
        self._index = index

    @classmethod
    def of(cls, texts: Iterable[str]) -> _Ranking:
        """The ranking of `texts`, of which at least one has a word."""
        vocabulary: dict[str, int] = {}
        # Numbers, not words: each occurrence of a word would be a string of its own.
        numbered = [[vocabulary.setdefault(word, len(vocabulary)) for word in tokenize(text)] for text in texts]
        # numpy: over a million passages numba's version saves half a millisecond a query, takes seconds to compile,
        # and leaves open which of equal scores comes first.
        index = bm25s.BM25(backend="numpy")
        index.index((numbered, vocabulary), show_progress=False)
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

    def save(self, folder: Path) -> None:
        self._index.save(folder, show_progress=False)

    @classmethod
    def load(cls, folder: Path) -> _Ranking:
        return cls(bm25s.BM25.load(folder, mmap=True, show_progress=False))


class _StoredTexts(Sequence[str]):
    """Texts in a folder, memory-mapped: all of them end to end in one file, and where each ends in another."""

    TEXTS, ENDS = "passages.txt", "passage_ends.npy"

    def __init__(self, folder: Path) -> None:
        self._ends = np.load(folder / self.ENDS, mmap_mode="r")
        with (folder / self.TEXTS).open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(self._ends) == 0 or self._ends[-1] != len(self._bytes):
            raise ValueError(f"{self.TEXTS} and {self.ENDS} do not belong together")

    @classmethod
    def write(cls, folder: Path, texts: Iterable[str]) -> None:
        ends, end = [], 0
        with (folder / cls.TEXTS).open("wb") as file:
            for text in texts:
                end += file.write(text.encode("utf-8", "replace"))
                ends.append(end)
        np.save(folder / cls.ENDS, np.array(ends, dtype=np.int64))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        start = self._ends[index - 1] if index else 0
        return self._bytes[start : self._ends[index]].decode("utf-8")  # a slice: a shared file position would race


class LocalIndex:
    """A BM25 index over passages.

    Args:
        passages: Texts, or mappings with `text` and perhaps `title`, which is searched and shown before the text, or
            with `contents`, whose first line is the title.

    Raises `DataError` when there is none, or one is of another shape.
    """

    FORMAT = 1
    """Of the folder that `save` writes and of the words that `tokenize` makes; another one cannot be loaded."""

    _HEADER = "search_index.json"

    def __init__(self, passages: Iterable[str | Mapping[str, str]]) -> None:
        self._passages: Sequence[str] = [
            _shown(passage, f"passage {number}") for number, passage in enumerate(passages)
        ]
        if not self._passages:
            raise DataError("a search index needs at least one passage, got none")
        if not any(map(tokenize, self._passages)):
            raise DataError(f"none of the {len(self)} passages of the search index has a word to search for")
        self._ranking = _Ranking.of(self._passages)

    @classmethod
    def open(cls, source: str | Path) -> LocalIndex:
        """The index of a `.jsonl` file, of a folder of them, of one that `save` wrote, or of a dataset on the Hub.

        Of a Hub dataset the split train is read. Building takes two minutes per million passages: `save` large ones.
        """
        path = Path(source)
        if path.suffix == ".jsonl":
            return cls.from_jsonl(path)
        if path.is_dir() and any(path.glob("*.jsonl")):
            return cls._of_files(sorted(path.glob("*.jsonl")))
        if path.exists() or path.is_absolute() or len(path.parts) != 2:
            return cls.load(path)
        from arpo_trl.net.hub_dataset import load_from_hub

        return cls(load_from_hub(str(source), "train"))

    @classmethod
    def from_jsonl(cls, path: str | Path) -> LocalIndex:
        """The index of a file with one passage per line, each a JSON string or object as above."""
        return cls._of_files([Path(path)])

    @classmethod
    def _of_files(cls, files: Sequence[Path]) -> LocalIndex:
        passages = [passage for file in files for passage in _passages(file)]
        if not passages:
            raise DataError(f"{' and '.join(map(str, files))} has no passages; expected one per line")
        return cls(passages)

    @classmethod
    def load(cls, folder: str | Path) -> LocalIndex:
        """The index that `save` wrote, memory-mapped: passages are read from the disk when they are found."""
        folder = Path(folder)
        again = "Build it again: LocalIndex.open(PASSAGES).save(FOLDER), or arpo-trl index PASSAGES FOLDER."
        try:
            header = read_json(folder / cls._HEADER)
        except DataError as error:
            raise DataError(f"{folder} is not a saved search index ({error}). {again}") from error
        if header != {"format": cls.FORMAT}:
            raise DataError(f"{folder} is a search index of another version: {header}, not {cls.FORMAT}. {again}")
        loaded = cls.__new__(cls)
        try:
            loaded._passages = _StoredTexts(folder)
            loaded._ranking = _Ranking.load(folder)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, RecursionError) as error:
            raise DataError(f"{folder} is an incomplete search index ({error}). {again}") from error
        return loaded

    def save(self, folder: str | Path) -> None:
        """Write index and passages to `folder`, which is made if it is missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._ranking.save(folder)
        _StoredTexts.write(folder, self._passages)
        # Last: an index without it was not written to the end.
        (folder / self._HEADER).write_text(json.dumps({"format": self.FORMAT}), "utf-8")

    def __len__(self) -> int:
        return len(self._passages)

    def search(self, query: str, top_k: int) -> list[str]:
        """The at most `top_k` passages that share a word with `query`, best first."""
        return [self._passages[hit] for hit in self._ranking.best(query, top_k)]


class NearestQuery:
    """Recorded results by query, of which another query gets the nearest one's.

    Queries are compared without case, surplus white space or a leading `search query:` (which some recordings carry
    because a model wrote it). A query that was not recorded gets the result of the recorded one nearest by BM25, if
    they share a word; recorded queries that had found nothing stand for themselves alone.
    """

    def __init__(self, results: Iterable[tuple[str, list[str]]]) -> None:
        self._results: dict[str, list[str]] = {}
        for query, pages in results:
            self._results.setdefault(normalised(query), pages)
        self._queries = [query for query, pages in self._results.items() if pages and tokenize(query)]
        self._ranking = _Ranking.of(self._queries) if self._queries else None

    def __len__(self) -> int:
        return len(self._results)

    def pages(self, query: str) -> list[str]:
        """The pages recorded for `query`, or else for the nearest recorded query."""
        query = normalised(query)
        if query in self._results:
            return self._results[query]
        nearest = self._ranking.best(query, 1) if self._ranking else []
        return self._results[self._queries[nearest[0]]] if nearest else []


class RecordedSearch:
    """Results recorded earlier, for training without a search service: a JSON object {query: result text}.

    Looked up as in `NearestQuery`. Raises `DataError` when the file is missing, empty or of another shape.
    """

    def __init__(self, path: str | Path) -> None:
        self._recorded = NearestQuery((query, pages_of(text)) for query, text in read_recorded(path).items())

    def __len__(self) -> int:
        return len(self._recorded)

    def search(self, query: str, top_k: int) -> list[str]:
        """The at most `top_k` pages recorded for `query`, or else for the nearest recorded query."""
        return self._recorded.pages(query)[:top_k]


def read_recorded(path: str | Path) -> dict[str, str]:
    """The recorded results of a JSON file {query: result text}; `DataError` when it is missing or of another shape."""
    recorded = read_json(Path(path))
    if not isinstance(recorded, dict) or not recorded:
        got = "an empty object" if recorded == {} else type(recorded).__name__
        raise DataError(f"{path} holds {got}; expected an object {{query: result text}}")
    for query, result in recorded.items():
        if not isinstance(result, str):
            raise DataError(f"{path}, query {query!r}: the result is {type(result).__name__}, expected text")
    return recorded


def pages_of(result: str) -> list[str]:
    """The pages of a recorded result text; text that is not in pages is one."""
    if result.strip() == NOTHING_FOUND:
        return []
    parts = re.split(r"^Page \d+: ?", result, flags=re.MULTILINE)
    return [part.strip() for part in parts if part.strip()]


def as_text(pages: Sequence[str]) -> str:
    """What a model, or a recording, is given of `pages`: `Page 1: …`, one a line."""
    lines = (f"Page {number}: {' '.join(page.split())}" for number, page in enumerate(pages, start=1))
    return "\n".join(lines) or NOTHING_FOUND


def search_tool(source: Searchable, *, top_k: int = 5, max_chars: int = 1000) -> Callable[[str], str]:
    """A function `search(query: str) -> str` to offer to a model.

    Args:
        source: What is searched: `LocalIndex`, `RecordedSearch`, `WebSearch` or your own.
        top_k: Results shown at most.
        max_chars: Longest text of one result; a longer one is cut.
    """

    def search(query: str) -> str:
        """Search for a query and return the texts found, the best first.

        Args:
            query: What to look for, in a few words.
        """
        pages = [" ".join(text.split()) for text in source.search(query[:MAX_QUERY_CHARS], top_k)]
        return as_text([page if len(page) <= max_chars else page[: max_chars - len(_CUT)] + _CUT for page in pages])

    search.deterministic = True  # type: ignore[attr-defined]
    return search


def _passages(path: Path) -> Iterator[str]:
    for number, passage in json_lines(path):
        yield _shown(passage, f"{path}, line {number}")


def _shown(passage: Any, where: str) -> str:
    """The text of a passage with its title before it."""
    match passage:
        case str():
            return passage
        case {"text": str(text), **rest} if isinstance(rest.get("title") or "", str):
            return f"{rest['title']}: {text}" if rest.get("title") else text
        case {"contents": str(contents)}:
            title, _, text = contents.partition("\n")
            return f"{title.strip().strip(chr(34))}: {text}" if text else contents
    got = f"keys {sorted(map(str, passage))}" if isinstance(passage, Mapping) else type(passage).__name__
    raise DataError(
        f"{where}: expected a string, or an object with the string `text` and perhaps `title`, or with `contents`, "
        f"got {got}"
    )


def normalised(query: str) -> str:
    """`query` as recordings and caches know it: without case, surplus white space or a leading `search query:`."""
    return _QUERY_PREFIX.sub("", " ".join(query.casefold().split()))
