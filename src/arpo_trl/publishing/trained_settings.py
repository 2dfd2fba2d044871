"""The settings of a run for the evaluation of its model, so that evaluation uses the settings of training.

    found = EvaluationSettings.of(read_yaml(run / "training_config.yaml"))
    found.values           # {"tools": ["search"], "search_top_k": 2, "max_completion_length": 208, …}
    found.left_out         # ["search_url"]

A run's folder may come from someone else. So an evaluation does not use its settings that contain addresses, commands
or output files, that cost money, or that weaken the sandbox. It also does not use tools imported from outside the
current folder.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arpo_trl.common.imports import is_import_path
from arpo_trl.common.run_files import TRAINING_CONFIG
from arpo_trl.common.settings import ToolLimits, default_of
from arpo_trl.common.user_files import expect, read_yaml, user_path
from arpo_trl.tools.builtin import BUILT_IN, ToolArguments
from arpo_trl.visible import visible

SAME_NAME = ("max_completion_length", "system_prompt", "chat_template_kwargs")
"""Settings of training, apart from the tools', that an evaluation has under the same name."""
TAKEN = frozenset(
    """tools search_index search_recorded search_top_k search_max_chars search_provider search_zone search_fields
    search_timeout_s python_timeout_s python_isolation python_stateful visit_timeout_s visit_max_chars
    mcp_timeout_s""".split()
)
LEFT_OUT = frozenset(
    """python_executor_url allow_unsafe search_url search_cache search_cache_mode search_rate search_max_calls
    visit_allowed_hosts visit_summary_url visit_summary_model mcp_servers""".split()
)
"""The fields of `ToolArguments` that an evaluation uses, and the fields that it does not use."""

UNLIMITED = ("max_tool_calls", "tool_call_limits")
"""Limits of an evaluation that the word "none" removes. Without a flag they have a limit."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """A run's settings for `arpo-trl eval`, by name, and the names of its settings that are not used."""

    values: dict[str, Any]
    left_out: list[str]

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> EvaluationSettings:
        """From the content of a `training_config.yaml`, in which a missing setting has its default."""
        from arpo_trl.config import ARPOConfig

        defaults = {field.name: field.default for field in dataclasses.fields(ARPOConfig)}
        values = {name: settings[name] for name in sorted(TAKEN) if name in settings}
        for name in (*(field.name for field in dataclasses.fields(ToolLimits)), *SAME_NAME):
            values[name] = settings.get(name, defaults.get(name))
        values = {name: value for name, value in values.items() if value is not None}
        calls = settings.get("max_tool_calling_iterations", defaults["max_tool_calling_iterations"])
        values["max_tool_calls"] = calls
        # Training limits no single tool, and evaluation by default these two.
        values["tool_call_limits"] = [] if calls is None else [f"{tool}={calls}" for tool in ("python", "search")]
        left_out = sorted(LEFT_OUT & settings.keys())
        if settings.get("tools") == []:
            values |= {"max_tool_calls": 0, "tool_call_limits": []}
        if not all(tool in BUILT_IN or _is_in_this_folder(tool) for tool in values.get("tools", [])):
            del values["tools"]
            left_out.append("tools")
        return cls(values=values, left_out=left_out)

    @classmethod
    def of_run(cls, folder: str | Path) -> EvaluationSettings | None:
        """The settings of the run in `folder`; None if it contains no `training_config.yaml`.

        Raises:
            DataError: The file does not have the format that a run writes.
        """
        file = user_path(folder, "model or adapter") / TRAINING_CONFIG
        if not file.is_file():
            return None
        settings = read_yaml(file) or {}
        expect(settings, {"tools?": [str], "max_tool_calling_iterations?": int | None}, str(file))
        return cls.of(settings)

    def summary(self, used: Mapping[str, Any]) -> str:
        """A line for the user: the values that the evaluation's settings `used` contain too, and the settings not
        used."""
        taken = {name: value for name, value in self.values.items() if used.get(name) == value}
        line = f"settings of its training: {EvaluationSettings(values=taken, left_out=[]).flags()}"
        if missing := [name for name in self.left_out if used.get(name) == _DEFAULTS[name]]:
            line += f" (not used: {', '.join(missing)}; set them yourself if you trust the run)"
        return " ".join(visible(line).split())

    def flags(self) -> str:
        """The values that are not defaults, as flags of `arpo-trl eval`, quoted for a shell."""
        words: list[str] = []
        for name, value in self.values.items():
            if name in UNLIMITED and value in (None, []):
                value = "none"
            elif value is None or value == [] or value == _DEFAULTS.get(name):
                continue
            given = json.dumps(value) if isinstance(value, dict) else value
            words += [f"--{name.replace('_', '-')}", *(map(str, given) if isinstance(given, list) else [str(given)])]
        return shlex.join(words)


_DEFAULTS = {
    field.name: default_of(field) for kind in (ToolLimits, ToolArguments) for field in dataclasses.fields(kind)
}


def _is_in_this_folder(path: str) -> bool:
    """Whether `path` is an import path whose module Python imports from the current folder."""
    if not is_import_path(path):  # such as a method, or a function in a function
        return False
    package = path.partition(":")[0].partition(".")[0]
    here = Path.cwd()
    if not ((here / f"{package}.py").is_file() or (here / package / "__init__.py").is_file()):
        return False
    spec = importlib.util.find_spec(package)
    return spec is None or Path(str(spec.origin)).is_relative_to(here)
