"""Runs Python code like the cells of a notebook. Prints the output, the last value, and the end of a traceback.

Two programs that cannot import arpo_trl use this file: `worker` inside the sandbox, and a remote executor, which
receives the text of this file before the code. So it imports only the standard library.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import io
import linecache
import os
import random
import re
import sys
import threading
import traceback
import types

SUCCEEDED = 0
RAISED = 1
SHOWN_NAME = "<python>"
TRACEBACK_LINES = 12
_FENCE = re.compile(r"\s*```[\w+-]*[ \t]*\n(.*?)\n?[ \t]*```\s*", re.DOTALL)


def run_cells(cells: list[str]) -> int:
    """Run `cells` in order. Return `SUCCEEDED` or `RAISED` for the last one.

    The earlier cells run only to set variables: their output is hidden, and after an exception the next cell still
        runs.
    """
    random.seed(0)  # for reproducible runs
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed(0)
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # usually set by the site module, which is not loaded
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    *earlier, last = cells
    if earlier:
        shown = os.dup(1)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)
        for number, cell in enumerate(earlier, 1):
            _run(cell, main, f"{SHOWN_NAME[:-1]} {number}>")
        _flush()
        os.dup2(shown, 1)
        os.close(shown)
    status = _run(last, main, SHOWN_NAME)
    _flush()
    return status


def _flush() -> None:
    with contextlib.suppress(Exception):  # code may have closed or replaced it
        sys.stdout.flush()


def _plain(source: str) -> str:
    """Return the code without a surrounding Markdown fence, and without the common indentation of all lines."""
    fenced = _FENCE.fullmatch(source)
    if fenced is not None and "```" not in fenced[1]:
        source = fenced[1]
    lines = source.split("\n")
    code = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    margin = code[0][: len(code[0]) - len(code[0].lstrip(" \t"))] if code else ""
    if not margin or not all(line.startswith(margin) for line in code):
        return source
    return "\n".join(line.removeprefix(margin) for line in lines)


def _run(source: str, main: types.ModuleType, name: str) -> int:
    source = _plain(source)
    # Split like Python, unlike `splitlines`. The final newline is needed for the marks under a line.
    linecache.cache[name] = (len(source), None, io.StringIO(f"{source}\n").readlines(), name)
    try:
        body = ast.parse(source, name).body
        last = [body.pop()] if body and isinstance(body[-1], ast.Expr) else []
        exec(compile(ast.Module(body, []), name, "exec", dont_inherit=True), main.__dict__)
        exec(compile(ast.Interactive(last), name, "single", dont_inherit=True), main.__dict__)
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
    except SystemExit as error:
        if error.code in (None, 0):
            return SUCCEEDED
        print(f"SystemExit: {error.code}")
        return RAISED
    except BaseException as error:
        _print_traceback(error)
        return RAISED
    return SUCCEEDED


def _print_traceback(error: BaseException) -> None:
    """Print the last lines of the traceback, with only the frames of the cells' code."""
    trace = traceback.TracebackException.from_exception(error)
    own = [frame for frame in trace.stack if frame.filename.startswith(SHOWN_NAME[:-1])]
    trace.stack = traceback.StackSummary.from_list(own)
    lines = "".join(trace.format(chain=False)).splitlines()
    if len(lines) > TRACEBACK_LINES:
        lines = ["Traceback (last lines):", *lines[-TRACEBACK_LINES:]]
    if sys.stdout is not None:
        print("\n".join(lines))
