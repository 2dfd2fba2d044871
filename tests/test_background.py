"""Tests of event loops in threads."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
from datasets import Dataset

from arpo_trl.common.per_process import one_per_process
from arpo_trl.net.background import LoopThread
from support import sampling_trainer, tiny_model, until


def test_a_loop_stops_with_its_object():
    threads, descriptors = _threads(), _descriptors()
    loop = LoopThread("arpo-short-lived")
    waiting = loop.start(asyncio.sleep(60))
    del loop
    with pytest.raises(CancelledError):
        waiting.result(60)
    _wait_for(threads, descriptors)


async def _exit() -> None:
    sys.exit(2)


async def _interrupt() -> None:
    raise KeyboardInterrupt


async def _stop_the_loop() -> None:
    asyncio.get_running_loop().stop()
    await asyncio.sleep(0)


async def _in_a_task(work):
    return await asyncio.wait_for(work(), 60)


async def _gathered(work):
    return await asyncio.gather(work(), asyncio.sleep(0))


async def _in_a_group(work):
    async with asyncio.TaskGroup() as group:
        group.create_task(work())


async def _in_a_callback(work):
    asyncio.get_running_loop().call_soon(sys.exit, 2)
    await work()


@pytest.mark.parametrize("around", [_in_a_task, _gathered, _in_a_group, _in_a_callback])
@pytest.mark.parametrize(("work", "error"), [(_exit, SystemExit), (_interrupt, KeyboardInterrupt)])
def test_a_coroutine_that_ends_the_program_fails_alone_and_the_loop_continues(around, work, error):
    loop = LoopThread("arpo-exits")
    other = loop.start(asyncio.sleep(0.01, "other"))
    with pytest.raises(error):
        loop.start(around(work)).result(60)
    assert other.result(60) == "other"
    assert loop.start(asyncio.sleep(0, "later")).result(60) == "later"
    loop.stop()
    assert not loop._thread.is_alive()


def test_a_coroutine_cannot_stop_the_loop():
    loop = LoopThread("arpo-stops")
    loop.start(_stop_the_loop()).result(60)
    assert loop.start(asyncio.sleep(0, "later")).result(60) == "later"
    loop.stop()
    assert not loop._thread.is_alive()


@pytest.mark.parametrize("work", [_exit, _stop_the_loop])
def test_a_coroutine_that_ends_the_program_when_it_is_cancelled_leaves_no_open_loop(work):
    async def leave() -> None:
        try:
            started.set()
            await asyncio.sleep(60)
        finally:
            await work()

    started = threading.Event()
    loop = LoopThread("arpo-leaves")
    loop.start(leave())
    started.wait(60)
    loop.stop()
    loop._thread.join(60)
    assert loop._loop.is_closed()


def test_threads_whose_first_calls_meet_get_the_same_loop():
    """Were each given the loop that it made, all but the kept one would be released, and stop, during the wait."""
    meeting = threading.Barrier(4)

    @one_per_process
    def loop() -> LoopThread:
        meeting.wait(60)
        return LoopThread("arpo-met")

    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(lambda: loop().start(asyncio.sleep(0.01, "done")).result(60)) for _ in range(4)]
        assert [answer.result(60) for answer in answers] == ["done"] * 4
    loop().stop()


def test_a_forked_process_gets_an_object_of_its_own(monkeypatch):
    made = one_per_process(lambda name: [name])
    mine = made("a")
    assert made("a") is mine and made("b") == ["b"]
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert made("a") is not mine


@pytest.mark.slow
def test_trainers_that_are_gone_leave_no_threads_and_no_descriptors(tmp_path):
    """A process that trains many times would run out of descriptors."""
    rows = Dataset.from_list([{"prompt": "question", "answer": "answer"}] * 2)

    def train(name: str) -> None:
        sampling_trainer(tiny_model(), tmp_path / name, rows, max_steps=1).train()
        gc.collect()

    gc.collect()
    threads = _threads()
    train("first")  # in which libraries open what they keep
    _wait_for(threads, sys.maxsize)
    started = _descriptors()
    train("second")
    train("third")
    _wait_for(threads, started)


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("arpo-")}


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _wait_for(threads: set[threading.Thread], descriptors: int) -> None:
    """Waits until there are only these threads, of which those of earlier tests may end, and so many descriptors."""
    until(lambda: _threads() <= threads and _descriptors() <= descriptors)
