"""The `search` tool: BM25 over local passages, recorded results, or a search service (`WebSearch`).

The model always reads the same format: `Page 1: …` and so on, one line per result, best first. Passages with equal
scores keep their order, so a repeated run sees the same pages.
"""

from __future__ import annotations

import itertools
import json
import logging
import mmap
import re
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from arpo_trl.common import waiting
from arpo_trl.common.files import files_with_mark, read_with_mark
from arpo_trl.common.imports import hidden_package
from arpo_trl.common.user_files import json_lines, read_json, user_path
from arpo_trl.errors import ConfigError, DataError
from arpo_trl.tools.search.words import tokenize
from arpo_trl.visible import encodable, get_logger

with hidden_package("jax"):  # bm25s would start it, and it would take three quarters of the GPU's memory
    import bm25s

logger = get_logger(__name__)

NOTHING_FOUND = "No search results found."
MAX_QUERY_CHARS = 2000
"""The rest of a longer query is ignored, because the search for a very long query would take too long."""

_QUERY_PREFIX = re.compile(r"^(?:search )?query\s*:\s*", re.IGNORECASE)
_CUT = " …"
_WATCHED_SEARCHES = 50
"""A warning says if nine of ten of so many searches found nothing."""

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs every index build


class Searchable(Protocol):
    """A source for `search_tool`: `LocalIndex`, `RecordedSearch`, `WebSearch` or another class with this method."""

    def search(self, query: str, top_k: int) -> list[str]:
        """Return at most `top_k` texts that match `query`, best first."""
        ...


class _Ranking:
    """BM25 over tokenized texts."""

    def __init__(self, index: bm25s.BM25) -> None:
        self._index = index

    @classmethod
    def of(cls, texts: Iterable[str]) -> _Ranking:
        """Return the ranking of `texts`. At least one of them must contain a search word. Shows bars if it is slow."""
        vocabulary: dict[str, int] = {}
        start = time.monotonic()
        # Numbers instead of words: each occurrence of a word would be a separate string.
        numbered = [
            [vocabulary.setdefault(word, len(vocabulary)) for word in tokenize(text)]
            for text in waiting.bar(texts, "Splitting texts into words", "texts")
        ]
        # numpy: with a million passages, numba saves half a millisecond per query, but takes seconds to compile and
        # leaves the order of equal scores undefined.
        index = bm25s.BM25(backend="numpy")
        is_slow = time.monotonic() - start > waiting.BAR_AFTER_S
        index.index((numbered, vocabulary), show_progress=is_slow and waiting.is_first_rank())
        return cls(index)

    def best(self, query: str, k: int) -> list[int]:
        """Return the positions of the `k` best texts that share a word with `query`; ties by position."""
        known = [word for word in tokenize(query) if word in self._index.vocab_dict]
        if not known:
            return []
        scores = self._index.get_scores(known)
        hits = np.flatnonzero(scores > 0)
        if len(hits) > k:  # keep all texts that tie with the k-th; the stable sort below drops the last ones
            hits = hits[scores[hits] >= np.partition(scores[hits], -k)[-k]]
        return [int(hit) for hit in hits[np.argsort(-scores[hits], kind="stable")][:k]]

    def save(self, folder: Path) -> None:
        self._index.save(folder, show_progress=False)

    @classmethod
    def load(cls, folder: Path) -> _Ranking:
        return cls(bm25s.BM25.load(folder, mmap=True, show_progress=False))


class _StoredTexts(Sequence[str]):
    """Memory-mapped texts in a folder: one file contains all texts end to end, another contains the end position of
    each text."""

    TEXTS, ENDS = "passages.txt", "passage_ends.npy"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ends = np.load(folder / self.ENDS, mmap_mode="r")
        with (folder / self.TEXTS).open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(self._ends) == 0 or self._ends[-1] != len(self._bytes):
            raise ValueError(f"{self.TEXTS} and {self.ENDS} do not match")

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
        # Slicing is thread-safe. With file reads, threads would share the position.
        return self._bytes[start : self._ends[index]].decode("utf-8")


class LocalIndex:
    """A BM25 index over passages.

    Args:
        passages: Texts, or mappings. A mapping has `text` and optionally `title`, which is searched and shown before
            the text, or `contents`, whose first line is the title.

    Raises:
        DataError: There is no passage, no passage has a search word, or a passage has another format.
    """

    FORMAT = 3
    """The version of `save`'s folder format and of `tokenize`. Folders of other versions cannot be loaded."""

    _HEADER = "search_index.json"

    def __init__(self, passages: Iterable[str | Mapping[str, str]]) -> None:
        self._passages: Sequence[str] = [
            _shown(passage, f"passage {number}")
            for number, passage in enumerate(waiting.bar(passages, "Reading passages", "passages"))
        ]
        if not self._passages:
            raise DataError("A search index needs at least one passage, got none. Add passages.")
        if not any(map(tokenize, self._passages)):
            raise DataError(
                f"None of the {len(self)} passages of the search index contains a search word. Check them."
            )
        self._ranking = _Ranking.of(self._passages)

    @classmethod
    def open(cls, source: str | Path) -> LocalIndex:
        """Return the index of a `.jsonl` file, a folder of such files, a folder written by `save`, or a Hub dataset.

        Of a Hub dataset it reads the split train. Building an index takes two minutes per million passages, so `save`
        large indexes.
        """
        path = user_path(source, "search_index")
        if path.suffix == ".jsonl":
            return cls._of_files([path])
        if path.is_dir() and any(path.glob("*.jsonl")):
            return cls._of_files(sorted(path.glob("*.jsonl")))
        if path.is_file():
            raise DataError(f"{path} is no .jsonl file; expected one passage per line, as JSON, in a .jsonl file.")
        if path.exists() or path.is_absolute() or len(path.parts) != 2:
            return cls.load(path)
        from arpo_trl.net.hub_dataset import load_from_hub

        return cls(load_from_hub(str(source), "train"))

    @classmethod
    def _of_files(cls, files: Sequence[Path]) -> LocalIndex:
        lines = (passage for file in files for passage in _passages(file))
        if (first := next(lines, None)) is None:
            raise DataError(f"{' and '.join(map(str, files))} has no passages; expected one per line.")
        return cls(itertools.chain([first], lines))

    @classmethod
    def load(cls, folder: str | Path) -> LocalIndex:
        """Return the memory-mapped index in `folder`, which `save` wrote. Passages are read from disk on demand."""
        folder = user_path(folder, "folder")
        return read_with_mark(folder, cls._HEADER, lambda: cls._load(folder))

    @classmethod
    def _load(cls, folder: Path) -> LocalIndex:
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
        except Exception as error:  # bm25s and numpy raise many kinds of errors for broken files
            raise DataError(f"{folder} is an incomplete search index ({error}). {again}") from error
        return loaded

    def save(self, folder: str | Path) -> int | None:
        """Write the index and its passages to `folder`, which is created if it is missing.

        An index in `folder` is replaced when the new one is written completely. Processes that have loaded it go on
        with it. Several processes may save to the same folder: they take turns. Returns its number of passages; None
        if there was none.

        Raises:
            ConfigError: The index was loaded from `folder`, whose files it still reads; or `folder` has .jsonl files,
                which `open` prefers; or it is a file.
        """
        folder = user_path(folder, "folder")
        if isinstance(self._passages, _StoredTexts) and folder.resolve() == self._passages.folder.resolve():
            raise ConfigError(f"{folder} contains the index that is to be saved there. Choose another folder.")
        if folder.is_file():
            raise ConfigError(f"{folder} is a file. Choose a folder for the index.")
        if any(folder.glob("*.jsonl")):
            raise ConfigError(
                f"{folder} has .jsonl files, which would be read in place of the index. Choose another folder."
            )
        folder.mkdir(parents=True, exist_ok=True)
        replaced = _number_of_passages(folder) if (folder / self._HEADER).is_file() else None
        with files_with_mark(folder, self._HEADER) as partial:
            self._ranking.save(partial)
            _StoredTexts.write(partial, self._passages)
            (partial / self._HEADER).write_text(json.dumps({"format": self.FORMAT}), "utf-8")
        return replaced

    def __len__(self) -> int:
        return len(self._passages)

    def search(self, query: str, top_k: int) -> list[str]:
        """Return the `top_k` best passages that share a word with `query`, best first."""
        return [self._passages[hit] for hit in self._ranking.best(query, top_k)]


def _number_of_passages(folder: Path) -> int | None:
    """The number of passages of the saved index in `folder`; None if it is broken."""
    try:
        return len(_StoredTexts(folder))
    except (OSError, ValueError):
        return None


class NearestQuery:
    """Recorded results by query. A query that was not recorded gets the result of the nearest recorded query.

    The comparison ignores case, extra white space and a leading `search query:`, which models wrote in some
    recordings. The nearest query is the best one by BM25, and must share a word with the query. Recorded queries
    without results are never the nearest.
    """

    def __init__(self, results: Iterable[tuple[str, list[str]]]) -> None:
        self._results: dict[str, list[str]] = {}
        for query, pages in results:
            self._results.setdefault(normalised(as_received(query)), pages)
        self._queries = [query for query, pages in self._results.items() if pages and tokenize(query)]
        self._ranking = _Ranking.of(self._queries) if self._queries else None

    def search(self, query: str, top_k: int) -> list[str]:
        """Return at most `top_k` pages recorded for `query`, or if there are none, for the nearest recorded query."""
        query = normalised(as_received(query))
        if query in self._results:
            return self._results[query][:top_k]
        nearest = self._ranking.best(query, 1) if self._ranking else []
        return self._results[self._queries[nearest[0]]][:top_k] if nearest else []


class RecordedSearch(NearestQuery):
    """Recorded results, for training without a search service. The file is a JSON object {query: result text}.

    Raises:
        DataError: The file is missing, empty or has another format.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__((query, pages_of(text)) for query, text in read_recorded(path).items())


def read_recorded(path: str | Path, longest: int = MAX_QUERY_CHARS) -> dict[str, str]:
    """Return the recorded results of a JSON file {query: result text}, for each query as `as_received` returns it.

    Of queries that are equal after `normalised`, the first one counts. Logs a warning if their results differ.

    Raises:
        DataError: The file is missing, empty or has another format.
    """
    recorded = read_json(user_path(path, "search_recorded"))
    if not isinstance(recorded, dict) or not recorded:
        got = "an empty object" if recorded == {} else type(recorded).__name__
        raise DataError(f"{path} contains {got}; expected an object {{query: result text}}.")
    for query, result in recorded.items():
        if not isinstance(result, str):
            raise DataError(f"{path}, query {query!r}: the result is {type(result).__name__}; expected a string.")
    first: dict[str, str] = {}
    conflicts: list[tuple[str, str]] = []
    for query, result in recorded.items():
        known = first.setdefault(normalised(as_received(query, longest)), query)
        if pages_of(recorded[known]) != pages_of(result):
            conflicts.append((known, query))
    if conflicts:
        known, query = conflicts[0]
        logger.warning(
            f"{path} has queries that differ from an earlier one only in case, white space, a leading `search query:` "
            f"or after {longest} characters, but have another result ({len(conflicts)}), such as {query[:100]!r} and "
            f"{known[:100]!r}. The first result counts. To use another one, remove the first."
        )
    return {as_received(query, longest): recorded[query] for query in first.values()}


def pages_of(result: str) -> list[str]:
    """Return the pages of a recorded result text. Text without page marks is one page."""
    if result.strip() == NOTHING_FOUND:
        return []
    parts = re.split(r"^Page \d+: ?", result, flags=re.MULTILINE)
    return [part.strip() for part in parts if part.strip()]


def as_text(pages: Sequence[str]) -> str:
    """Return `pages` in the format of results and recordings: `Page 1: …`, one page per line."""
    lines = (f"Page {number}: {' '.join(page.split())}" for number, page in enumerate(pages, start=1))
    return "\n".join(lines) or NOTHING_FOUND


def search_tool(source: Searchable, *, top_k: int = 10, max_chars: int = 1000) -> Callable[[str], str]:
    """Return a function `search(query: str) -> str` that a model can call.

    Args:
        source: A `LocalIndex`, `RecordedSearch`, `WebSearch` or another object with their method `search`.
        top_k: The maximum number of results.
        max_chars: The maximum characters of one result; a longer one is cut.

    Raises:
        ConfigError: `source` has no method `search`.
    """
    if not callable(getattr(source, "search", None)):
        raise ConfigError(
            f"The source of search_tool is a {type(source).__name__} without a method `search`; expected a "
            "LocalIndex, a RecordedSearch, a WebSearch or an object with `search(query, top_k)`."
        )

    found = deque[bool](maxlen=_WATCHED_SEARCHES)
    warned = False

    def search(query: str) -> str:
        """Search for a query and return the texts found, the best first.

        Args:
            query: What to look for, in a few words.
        """
        nonlocal warned
        pages = [" ".join(text.split()) for text in source.search(as_received(query), top_k)]
        found.append(bool(pages))
        if not warned and found.count(False) >= _WATCHED_SEARCHES * 0.9:
            warned = True
            logger.warning(
                f"{found.count(False)} of the last {_WATCHED_SEARCHES} searches found nothing, and the model got "
                f"{NOTHING_FOUND!r}, such as for {query[:100]!r}. Such rollouts discourage searches. Read the queries "
                "(arpo-trl tree), and check that the index, the recording or the service is that of the questions."
            )
        return as_text([page if len(page) <= max_chars else page[: max_chars - len(_CUT)] + _CUT for page in pages])

    search.deterministic = True  # type: ignore[attr-defined]
    return search


def _passages(path: Path) -> Iterator[str]:
    for number, passage in json_lines(path):
        yield _shown(passage, f"{path}, line {number}")


def _shown(passage: Any, where: str) -> str:
    """Return the text of a passage, preceded by its title."""
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
        f"{where}: expected a string, or an object with the string `text` and optionally `title`, or with `contents`, "
        f"got {got}"
    )


def as_received(query: str, longest: int = MAX_QUERY_CHARS) -> str:
    """Return the form of `query` in which a source gets it: encodable, without extra spaces, not too long."""
    return " ".join(encodable(query).split())[:longest]


def normalised(query: str) -> str:
    """Return `query` in the form used to compare queries: lower case, one Unicode form (NFKC) of each character,
    without extra spaces or `search query:`."""
    return _QUERY_PREFIX.sub("", " ".join(unicodedata.normalize("NFKC", query).casefold().split()))
