"""vLLM servers as forks: a start takes 5 s of CPU time instead of 30."""

import functools
from pathlib import Path

import serving
from forked import Fork


class ForkedServer(serving.Server):
    def _start_process(self) -> Fork:
        return Fork(self._command[1:], cwd=Path.cwd(), env=self._environment, log=self._log)


running = functools.partial(serving.running, kind=ForkedServer)
