"""Runs scripts on several processes on the CPU, as a user starts them: with `accelerate launch` and a shipped
configuration, including its bf16.

    done = launch("zero3", "train.py", "--config", …)        # waits for all ranks; a failure or a hang fails the test
    with launched("ddp", "train.py", …) as running:          # to act on a rank while the script runs
        running.ranks()[1].kill()
        done = running.wait()

No process remains in any case. A script writes its test's data to a file. It must run on the CPU (`use_cpu=True`,
`--use_cpu true`).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from arpo_trl.common.build_locks import is_held, locks
from forked import RANKS, Fork

ROOT = Path(__file__).parent.parent
EXACT = ("--mixed_precision", "no")
"""Flags of `accelerate launch` for a run with `bf16=False`, which the shipped files' bf16 would win over."""
EXTENSIONS = str(Path(sys.prefix, "extensions_of_tests"))
"""The folder for extensions that DeepSpeed builds. A user's training must not use these: they are not optimized."""
DEADLINE_S = 580.0
"""Below pytest's own timeout, which would show no rank's output."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The result of a launch: the launcher's exit status, and the output of all ranks on both streams."""

    code: int
    output: str


class Running:
    """A running launch."""

    def __init__(self, process: Fork, log: Path, number: int):
        self._process, self._log, self._number = process, log, number

    def ranks(self) -> list[psutil.Process]:
        """The ranks' processes in order; fewer while they start, or when some have ended."""
        try:
            children = {child.pid: child for child in psutil.Process(self._process.pid).children()}
        except psutil.NoSuchProcess:
            return []
        with suppress(FileNotFoundError):
            started = [line.split() for line in self._log.with_suffix(".ranks").read_text().splitlines()]
            return [children[int(pid)] for rank, pid in sorted(started) if int(pid) in children]
        return []

    def output(self) -> str:
        """The output so far."""
        return self._log.read_text("utf-8", errors="replace")

    def wait(self, deadline_s: float = DEADLINE_S) -> Ended:
        """How it ended.

        Raises:
            AssertionError: It did not end in time; the message has the ends of what it wrote and where it hangs.
        """
        try:
            return Ended(self._process.wait(deadline_s), self.output())
        except subprocess.TimeoutExpired:
            stacks = self._stacks()
            raise AssertionError(
                f"{self._number} ranks did not end within {deadline_s:.0f} s.\n{stacks}\n{self.output()[-4000:]}"
            ) from None

    def _stacks(self) -> str:
        """Where the ranks' main threads are, which `faulthandler` has them write at SIGABRT."""
        before, ranks = len(self.output()), self.ranks()
        for rank in ranks:
            rank.send_signal(signal.SIGABRT)
        psutil.wait_procs(ranks, timeout=5)
        written = self.output()[before:]
        return "\n".join(re.findall(r"Current thread.*?(?=\n\n|\Z)", written, re.DOTALL))


@contextmanager
def launched(
    config: str,
    script: str | Path,
    *flags: str,
    ranks: int = 2,
    launcher: Sequence[str] = (),
    environment: dict[str, str] | None = None,
) -> Iterator[Running]:
    """`script` on `ranks` processes under `accelerate_configs/<config>.yaml`, killed when the context closes.

    `flags` are the script's, `launcher` those of `accelerate launch`.
    """
    words = [
        *("-m", "accelerate.commands.launch"),
        *("--config_file", f"accelerate_configs/{config}.yaml", "--num_processes", str(ranks)),
        *("--main_process_port", "0", *launcher),
        *(["tests/fsdp_on_cpu.py"] if config == "fsdp2" else []),
        *(str(script), *flags),
    ]
    # What another test left behind in this process is not what a user has.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    paths = [str(ROOT / part) for part in ("src", "tests", "benchmarks")]
    if (before := os.environ.get("PYTHONPATH")) is not None:
        paths.append(before)
    compiler = {"CXX": str(ROOT / "tests/quick_g++"), "TORCH_EXTENSIONS_DIR": EXTENSIONS}
    variables = {**inherited, "PYTHONPATH": os.pathsep.join(paths), "PYTHONFAULTHANDLER": "1", **compiler}
    variables |= environment or {}
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        log = Path(folder) / "log"
        process = Fork(words, cwd=ROOT, env={**variables, RANKS: str(log.with_suffix(".ranks"))}, log=log)
        try:
            yield Running(process, log, ranks)
        finally:
            with suppress(psutil.NoSuchProcess):  # torch gives each rank a session of its own
                for child in psutil.Process(process.pid).children(recursive=True):
                    _kill(child)
            process.kill()
            process.wait()
            if process.returncode:
                _remove_build_locks()


def launch(
    config: str,
    script: str | Path,
    *flags: str,
    ranks: int = 2,
    launcher: Sequence[str] = (),
    deadline_s: float = DEADLINE_S,
    environment: dict[str, str] | None = None,
) -> Ended:
    """Runs `launched` to its end. If a rank fails, the test fails with the ranks' output."""
    with launched(config, script, *flags, ranks=ranks, launcher=launcher, environment=environment) as running:
        done = running.wait(deadline_s)
    assert done.code == 0, done.output[-6000:]
    return done


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()


def _remove_build_locks() -> None:
    """Locks that killed ranks held: DeepSpeed takes one whenever it loads, and the next start would wait for it."""
    for lock in locks():
        if not is_held(lock):
            lock.unlink(missing_ok=True)
