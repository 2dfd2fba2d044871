"""The cost of a local search over many passages, and of a cache hit under concurrent processes.

    python benchmarks/search.py build /tmp/search    # index 1,000,000 generated passages: seconds and memory
    python benchmarks/search.py query /tmp/search    # load it memory-mapped and search: seconds, memory, p50 and p95
    python benchmarks/search.py cache                # hits in one cache file by 8 concurrent processes: p50 and p95

Passages are 50 words drawn with probability ∝ 1 / (rank + 30) from 200,000. The offset leaves out the most common
words of a language, as `tokenize` does. A query is 4 words of one passage. With numba installed, `query` also measures
bm25s's numba retrieval.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from arpo_trl.tools.search.cache import Key, SearchCache
from arpo_trl.tools.search.index import LocalIndex, tokenize
from arpo_trl.tools.search.providers import Hit, make_provider
from arpo_trl.tools.search.web import WebSearch

VOCABULARY, WORDS, QUERY_WORDS, BLOCK = 200_000, 50, 4, 10_000
QUERIES, HITS = 500, 2_000


def passages(count: int) -> Iterator[str]:
    generator = np.random.default_rng(0)
    weights = np.cumsum(1 / (np.arange(VOCABULARY) + 30))
    for start in range(0, count, BLOCK):
        drawn = generator.random((min(BLOCK, count - start), WORDS)) * weights[-1]
        for row in np.searchsorted(weights, drawn):
            yield " ".join(f"w{word}" for word in row)


def build(arguments: argparse.Namespace) -> None:
    start = time.perf_counter()
    for _ in passages(arguments.passages):
        pass
    generating_s = time.perf_counter() - start
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    index = LocalIndex(passages(arguments.passages))
    build_s = time.perf_counter() - start - generating_s
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    index.save(arguments.folder)
    size = sum(file.stat().st_size for file in arguments.folder.iterdir())
    print(f"{len(index):,} passages: built in {build_s:.1f} s, saved in {time.perf_counter() - start:.1f} s")
    print(f"memory at most {(peak - before) / 1e9:.2f} GB above the start, {size / 1e9:.2f} GB on disk")


def query(arguments: argparse.Namespace) -> None:
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    index = LocalIndex.load(arguments.folder)
    loaded_s = time.perf_counter() - start
    loaded = psutil.Process().memory_info().rss
    generator = np.random.default_rng(1)
    texts = [index._passages[int(number)] for number in generator.integers(0, len(index), QUERIES)]
    queries = [" ".join(generator.choice(text.split(), QUERY_WORDS, replace=False)) for text in texts]
    seconds = timed(lambda words: index.search(words, 10), queries)
    after = psutil.Process().memory_info().rss
    print(f"{len(index):,} passages: loaded in {loaded_s:.2f} s, {(loaded - before) / 1e6:.0f} MB")
    print(f"query, top 10: {shown(seconds)}; {(after - before) / 1e6:.0f} MB after {QUERIES} queries")
    with contextlib.suppress(ImportError):
        import bm25s
        import numba  # noqa: F401

        compiled = bm25s.BM25.load(arguments.folder, mmap=True, show_progress=False, backend="numba")
        start = time.perf_counter()
        compiled.retrieve([tokenize(queries[0])], k=10, show_progress=False)
        first_s = time.perf_counter() - start
        seconds = timed(lambda words: compiled.retrieve([tokenize(words)], k=10, show_progress=False), queries)
        print(f"the same with bm25s's numba retrieval: {shown(seconds)}; the first query {first_s:.1f} s")


def timed(search: Callable[[str], Any], queries: list[str]) -> list[float]:
    for words in queries[:20]:
        search(words)
    seconds = []
    for words in queries:
        start = time.perf_counter()
        search(words)
        seconds.append(time.perf_counter() - start)
    return seconds


def shown(seconds: list[float]) -> str:
    p50, p95 = np.percentile(seconds, [50, 95]) * 1000
    return f"p50 {p50:.2f} ms, p95 {p95:.2f} ms"


def cache(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.sqlite"
        store = SearchCache(path)
        provider = make_provider("searxng", url="http://127.0.0.1:9")
        for number in range(10_000):
            hits = [Hit(title="A title", url="https://example.org/", text="x" * 500)] * 10
            store.put(Key.of(provider.source, f"query {number}", provider.parameters(10)), hits)
        for processes in (1, arguments.processes):
            context = multiprocessing.get_context("spawn")
            with context.Manager() as manager, context.Pool(processes) as pool:
                together = manager.Barrier(processes)
                parts = pool.starmap(hit_all, [(str(path), together)] * processes, chunksize=1)
            seconds = [second for part in parts for second in part]
            print(f"cache hit, {processes} processes on {os.cpu_count()} cores: {shown(seconds)}")


def hit_all(path: str, together: Any) -> list[float]:
    search = WebSearch(make_provider("searxng", url="http://127.0.0.1:9"), SearchCache(path))
    numbers = np.random.default_rng(os.getpid()).integers(0, 10_000, HITS)
    together.wait()
    return timed(lambda words: search.search(words, 10), [f"query {number}" for number in numbers])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    for name, part in (("build", build), ("query", query), ("cache", cache)):
        command = commands.add_parser(name)
        command.set_defaults(part=part)
        if name == "cache":
            command.add_argument("--processes", type=int, default=8)
        else:
            command.add_argument("folder", type=Path)
    commands.choices["build"].add_argument("--passages", type=int, default=1_000_000)
    arguments = parser.parse_args()
    arguments.part(arguments)


if __name__ == "__main__":
    main()
