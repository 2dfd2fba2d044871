"""Jobs, each in a process of its own, with its output in a log. They end with the program that starts them."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context, parent_process
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch

from arpo_trl.runs.interrupts import stop_at_once

from . import frozen, tabular, training
from .files import slug

Jobs = Mapping[str, Callable[[], None]]
"""Jobs by name, which is also the name of their logs."""


def fork_server() -> ForkServerContext:
    """Starts processes that have already imported the parts, which takes longer than some jobs."""
    context = get_context("forkserver")
    context.set_forkserver_preload([part.__name__ for part in (tabular, frozen, training)])
    return context


def run_all(jobs: Jobs, at_a_time: int, logs: Path, errors: list[str], *, threads: int = 1) -> bool:
    """Run each job with `threads` threads, and return whether all succeed. Adds a message to `errors` for each that
    fails."""
    context = fork_server()
    logs.mkdir(parents=True, exist_ok=True)

    def run(name: str) -> bool:
        start, log = time.perf_counter(), logs / f"{slug(name)}.log"
        process = context.Process(target=_run, args=(jobs[name], log, threads))
        process.start()
        process.join()
        if process.exitcode:
            errors.append(f"{name} failed; see {log}")
        state = "failed" if process.exitcode else "done"
        print(f"{time.strftime('%H:%M:%S')} {name}: {state}, {time.perf_counter() - start:.0f} s", flush=True)
        return not process.exitcode

    with ThreadPoolExecutor(at_a_time) as pool:
        return all([*pool.map(run, jobs)])  # a list: one failure does not cancel the other jobs


def end_with_study() -> None:
    """End this process and the programs that it starts when the study ends. Otherwise the jobs of a killed study would
    run beside those of the resumed one."""
    study = parent_process()
    assert study is not None

    def wait() -> None:
        study.join()
        stop_at_once(1)

    threading.Thread(target=wait, name="study", daemon=True).start()


def _run(job: Callable[[], None], log: Path, threads: int) -> None:
    end_with_study()
    with log.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())  # so that programs that the job starts write to the log too
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of these programs
    torch.set_num_threads(threads)
    job()
