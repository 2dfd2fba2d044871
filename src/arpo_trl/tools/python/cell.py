"""Runs Python code like the cells of a notebook. Prints the output, the last value, and the end of a traceback.

Models write code with Markdown around it, indentation in front of it or commands of notebooks in it. Code that Python
accepts runs unchanged. Other code is repaired as far as its meaning is clear (`_REPAIRS`).

Two programs that cannot import arpo_trl use this file: `worker` inside the sandbox, and a remote executor, which
receives the text of this file before the code. So it imports only the standard library.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import errno
import html
import io
import linecache
import os
import random
import re
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable
from typing import Any, TypeGuard

SUCCEEDED = 0
RAISED = 1
SHOWN_NAME = "<python>"
TRACEBACK_LINES = 12
NOT_PERMITTED: str | None = None
"""The explanation of a rejected system call; None: unknown."""

_LOOK_S = 0.001  # between looks at the threads
_FLAGS = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
_COROUTINE = 0x80  # inspect.CO_COROUTINE
_LANGUAGES = ("python", "python3", "py", "py3", "ipython", "{python}")
_INVISIBLE = dict.fromkeys(map(ord, "\0\u200b\u200c\u200d\u2060\ufeff"))
_SPACES = dict.fromkeys(map(ord, "\u00a0\u2002\u2003\u2007\u2009\u202f\u3000"), " ")
_FENCE = re.compile(
    r"^(?P<margin>[ \t]*)(?P<mark>`{3,}|~{3,})[ \t]*(?P<info>[^\n`]*)\n(?P<code>.*?)"
    r"(?:^(?P=margin)(?P=mark)[ \t]*$|(?P=mark)\s*\Z|\Z)",
    re.DOTALL | re.MULTILINE,
)
_FENCE_LINE = re.compile(r"^[ \t]*(?:`{3,}|~{3,})[ \t]*$", re.MULTILINE)
_INLINE = re.compile(r"\s*(`{1,3})(?:(?:python3?|py)[ \t])?([^\n`]+)\1\s*")
_PROMPT = re.compile(r"[ \t]*(?:>>>|\.\.\.)(?: (.*))?")
_MAGIC = re.compile(
    r"^(?P<margin>[ \t]*)(?:%%?(?:time|timeit|capture)\b(?:[ \t]+-\w+(?:[ \t]+\d+)?)*[ \t]*(?P<code>.*)"
    r"|(?:[!%]{1,2}[ \t]*)?(?:python3?[ \t]+-m[ \t]+)?(?:pip3?|conda|apt|apt-get)[ \t]+\S.*"
    r"|%(?:matplotlib|config|load_ext|reload_ext|autoreload)\b.*)$",
    re.MULTILINE,
)
"""Commands of notebooks that measure time, install packages or set up the display. Nothing can be installed here."""


def run_cells(cells: list[str]) -> int:
    """Run `cells` in order. Return `SUCCEEDED` or `RAISED` for the last one.

    The earlier cells run only to set variables: their output is hidden, and after an exception the next cell still
    runs.
    """
    random.seed(0)  # for reproducible runs
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed(0)
    # exit, quit and help are usually set by the site module, which is not loaded, display by notebooks.
    vars(builtins).update(exit=sys.exit, quit=sys.exit, help=_help, display=_display, input=_input)
    sys.argv = [SHOWN_NAME]  # else it has the arguments of this process
    sys.orig_argv = [SHOWN_NAME]
    threading.excepthook = _print_thread_exception
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    *earlier, last = cells
    if earlier:
        shown = {hidden: os.dup(hidden) for hidden in (1, 2)}
        null = os.open(os.devnull, os.O_WRONLY)
        for hidden in shown:
            os.dup2(null, hidden)
        os.close(null)
        for number, cell in enumerate(earlier, 1):
            _run(cell, main, f"{SHOWN_NAME[:-1]} {number}>")
        _flush()
        for hidden, copy in shown.items():
            os.dup2(copy, hidden)
            os.close(copy)
    status = _run(last, main, SHOWN_NAME)
    _flush()
    return status


def _flush() -> None:
    with contextlib.suppress(Exception):  # code may have closed or replaced it
        sys.stdout.flush()


def _display(*values: object, **_: object) -> None:
    for value in values:
        print(repr(value))


def _help(*subjects: object) -> None:
    import pydoc

    pydoc.help(*subjects or ("help",))


def _input(prompt: object = "", /) -> str:
    raise EOFError("there is no input here; write the values into the code")


# Repairs


def _is_python(source: str) -> bool:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _plain(source: str) -> str:
    """Return the code in what a model wrote; see `_REPAIRS`."""
    source = source.replace("\r\n", "\n").replace("\r", "\n")  # as Python reads them
    first, _, rest = source.lstrip().partition("\n")
    if first.strip().lower() in _LANGUAGES and rest.strip():  # the fence is gone, its language is not
        source = rest
    for repair in _REPAIRS:
        if _is_python(source):
            return source
        source = repair(source)
    for guess in (_lines_after_the_first_dedented, _unescaped, html.unescape):
        if not _is_python(source) and _is_python(guessed := guess(source)):
            return guessed
    return source


def _visible(source: str) -> str:
    """Return the code without invisible characters, and with plain spaces."""
    return source.translate(_INVISIBLE).translate(_SPACES)


def _without_markdown(source: str) -> str:
    """Return the code in Markdown fences: in those marked as Python; if there are none, in those without a language;
    otherwise in all."""
    if (inline := _INLINE.fullmatch(source)) is not None:
        return inline[2]
    blocks = [(fence["info"].split(), fence["code"]) for fence in _FENCE.finditer(source)]
    if not any(code.strip() for _, code in blocks):
        return _FENCE_LINE.sub("", source) if _FENCE.sub("", source).strip() else ""
    python = [code for info, code in blocks if info and info[0].lower() in _LANGUAGES]
    return "\n".join(python or [code for info, code in blocks if not info] or [code for _, code in blocks])


def _without_prompts(source: str) -> str:
    """Return the input of a session with `>>>`, without its output."""
    if not source.lstrip().startswith(">>>"):
        return source
    lines = [_PROMPT.fullmatch(line) for line in source.split("\n")]
    return "\n".join(line[1] or "" for line in lines if line is not None)


def _without_magics(source: str) -> str:
    return _MAGIC.sub(lambda magic: magic["margin"] + (magic["code"] or "pass"), source)


def _dedented(source: str) -> str:
    """Return the code without indentation that all lines share."""
    lines = source.split("\n")
    code = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    margin = code[0][: len(code[0]) - len(code[0].lstrip(" \t"))] if code else ""
    if not margin or not all(line.startswith(margin) for line in code):
        return source
    return "\n".join(line.removeprefix(margin) for line in lines)


def _lines_after_the_first_dedented(source: str) -> str:
    """Restore code whose first line lost its indentation, for example through `strip`: dedent the other lines."""
    first, _, rest = source.lstrip().partition("\n")
    return f"{first}\n{_dedented(rest)}"


def _unescaped(source: str) -> str:
    r"""Return code in one line that has `\n` between its lines."""
    return source if "\n" in source.strip() else source.replace("\\n", "\n").replace("\\t", "\t").replace('\\"', '"')


_REPAIRS = (_visible, _without_markdown, _without_prompts, _without_magics, _dedented)
"""Applied in turn to code that Python does not accept."""


# Running


def _run(source: str, main: types.ModuleType, name: str) -> int:
    source = _plain(source)
    # Split like Python, unlike `splitlines`. The final newline is needed for the marks under a line.
    linecache.cache[name] = (len(source), None, io.StringIO(f"{source}\n").readlines(), name)
    # Also after an exception or `exit`, threads go on as they do in Python.
    return max(_status_of(_execute, source, main, name), _status_of(_await_threads))


def _status_of(function: Callable[..., None], *arguments: Any) -> int:
    """Call a function that runs the cells' code, and print what ends it."""
    try:
        function(*arguments)
    except SystemExit as error:
        if error.code in (None, 0):
            return SUCCEEDED
        print(f"SystemExit: {error.code}")
        return RAISED
    except BaseException as error:
        _print_traceback(error)
        return RAISED
    return SUCCEEDED


def _await_threads() -> None:
    """Wait until the threads that are not daemons have ended, or have no more work from their pool.

    A pool's idle threads live as long as the interpreter, and the next cell may use them.
    """
    looks = 0
    while looks < 2:  # at the first, a thread may just have taken its work from the queue
        threads = [thread for thread in threading.enumerate() if not thread.daemon]
        if len(threads) < 2:  # only this one
            return
        looks = 0 if any(map(_works, threads)) else looks + 1
        time.sleep(_LOOK_S)


def _works(thread: threading.Thread) -> bool:
    if thread is threading.current_thread():
        return False
    pools: Any = sys.modules.get("concurrent.futures.thread")
    if pools is not None and (queue := pools._threads_queues.get(thread)) is not None:
        frame = sys._current_frames().get(thread.ident or 0)
        return not queue.empty() or (frame is not None and frame.f_code is not pools._worker.__code__)
    processes: Any = sys.modules.get("concurrent.futures.process")
    if processes is not None and thread in processes._threads_wakeups:
        return bool(getattr(thread, "pending_work_items", ()))
    return True


def _execute(source: str, main: types.ModuleType, name: str) -> None:
    """Run the code and show the value of its last line, if that is an expression without a semicolon behind it."""
    body: list[ast.stmt] = ast.parse(source, name).body
    last: list[ast.stmt] = []
    if body and isinstance(body[-1], ast.Expr):
        end = source.encode().split(b"\n")[(body[-1].end_lineno or 1) - 1][body[-1].end_col_offset :]
        is_exit = isinstance(body[-1].value, ast.Name) and body[-1].value.id in ("exit", "quit")
        if is_exit:
            body.pop()
        elif not end.lstrip().startswith(b";"):
            last = [body.pop()]
    codes = [
        compile(ast.Module(body, []), name, "exec", _FLAGS, dont_inherit=True),
        compile(ast.Interactive(last), name, "single", _FLAGS, dont_inherit=True),
    ]
    if any(code.co_flags & _COROUTINE for code in codes):
        import asyncio

        asyncio.run(_awaited(codes, main))
    else:
        for code in codes:
            exec(code, main.__dict__)


async def _awaited(codes: list[types.CodeType], main: types.ModuleType) -> None:
    """Run code with `await` outside functions, as notebooks do."""
    for code in codes:
        result = eval(code, main.__dict__)
        if code.co_flags & _COROUTINE:
            await result


def _print_thread_exception(args: Any) -> None:
    if args.exc_value is not None and args.exc_type is not SystemExit:
        print(f"Exception in thread {args.thread.name if args.thread else '?'}:")
        _print_traceback(args.exc_value)


def _is_refusal(error: BaseException) -> TypeGuard[OSError]:
    """Whether the sandbox rejected a system call that does not concern a file."""
    return isinstance(error, PermissionError) and error.errno == errno.EPERM and error.filename is None


def _print_traceback(error: BaseException) -> None:
    """Print the last lines of the traceback, with only the frames of the cells' code."""
    if isinstance(error, SyntaxError) and error.text is None and error.filename and error.lineno:
        error.text = linecache.getline(error.filename, error.lineno)
    elif _is_refusal(error) and NOT_PERMITTED and NOT_PERMITTED not in str(error):
        error.strerror = f"{error.strerror}: {NOT_PERMITTED}"
    trace = traceback.TracebackException.from_exception(error)
    own = [frame for frame in trace.stack if frame.filename.startswith(SHOWN_NAME[:-1])]
    trace.stack = traceback.StackSummary.from_list(own)
    lines = "".join(trace.format(chain=False)).splitlines()
    if len(lines) > TRACEBACK_LINES:
        lines = ["Traceback (last lines):", *lines[-TRACEBACK_LINES:]]
    if sys.stdout is not None:
        print("\n".join(lines))
