"""Runs the notebooks and keeps what they print: `python docs/_build/run_notebooks.py` in the root of the repository."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
_TERMINAL = re.compile(r"\x1b\[[0-9;]*m|\r")
_LOG_LINE = re.compile(r"^\[\d{4}-\d\d-\d\d .*\n", re.MULTILINE)
CHECKED = """
shell = get_ipython()
run = shell.system

def checked(command):
    run(command)
    if shell.user_ns["_exit_code"]:
        raise RuntimeError(f"{command} ended with status {shell.user_ns['_exit_code']}")

shell.system = checked
"""
"""A cell after which a command that fails (`!command`) is an error. Only the last command of a pipe is checked."""
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def executed(path: Path, folder: Path, timeout_s: int = 240) -> Any:
    """The notebook with its outputs, run in `folder`. No cell may take longer than `timeout_s` seconds.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell raised an error, or a command in it failed.
    """
    commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=timeout_s, resources={"metadata": {"path": str(folder)}})
    notebook.cells.insert(0, nbformat.v4.new_code_cell(CHECKED))
    client.execute(env={**os.environ, "PATH": commands, "OMP_NUM_THREADS": "1"})
    del notebook.cells[0]
    return notebook


def keep_text(notebook: Any) -> None:
    """Leaves of the outputs only the printed text: no warnings, log lines, colours, counts and pictures."""
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        kept = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in kept:
            if "text" in output:
                output.text = _LOG_LINE.sub("", _TERMINAL.sub("", output.text))
            if "data" in output:
                output.data = {"text/plain": output.data["text/plain"]}
                output.metadata.clear()
            if "execution_count" in output:
                output.execution_count = None
        cell.outputs = [output for output in kept if output.get("text") != ""]


if __name__ == "__main__":
    for path in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(path, Path(folder))
        keep_text(notebook)
        path.write_text(nbformat.writes(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")
        print(path.name)
