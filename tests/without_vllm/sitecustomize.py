"""Python imports this at the start if its folder is on PYTHONPATH: vLLM then seems not to be installed.

TRL imports vLLM wherever it is installed, which takes a third of a process's start.
"""

import importlib.util

_find_spec = importlib.util.find_spec


def find_spec(name, package=None):
    return None if name.partition(".")[0] == "vllm" else _find_spec(name, package)


importlib.util.find_spec = find_spec
