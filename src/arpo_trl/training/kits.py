"""Selects the tools that the paths of a row may call: all tools of the trainer, or those of the row's environment, as
in TRL."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any

from datasets import Dataset

from arpo_trl.rollout.batch import GroupRequest, Kit
from arpo_trl.rollout.protocols import ToolProtocol
from arpo_trl.tools.environments.kind import COLUMN
from arpo_trl.tools.environments.state import Environments
from arpo_trl.tools.spec import ToolSet

Tools = Sequence[Callable[..., Any]]


class Kits:
    """The tools and the protocol of each row.

    Args:
        protocol: The protocol of a row without its own kit.
        environments: The trainer's environments. With several classes, each class has a kit.
        kits: The kit by class name; empty with one class, or without environments.
    """

    def __init__(self, protocol: ToolProtocol, environments: Environments | None, kits: Mapping[Any, Kit]):
        self._protocol = protocol
        self._environments = environments
        self._by_name = kits

    def of(self, row: Mapping[str, Any]) -> Kit | None:
        """Return the kit of a row. None: the row may call all tools."""
        if not self._by_name:
            return None
        assert self._environments is not None
        return self._by_name[self._environments.kinds.name_of(row)]

    def protocol(self, row: Mapping[str, Any]) -> ToolProtocol:
        """Return the protocol of a row."""
        kit = self.of(row)
        return self._protocol if kit is None else kit.protocol

    def requests(
        self, prompts: Sequence[Any], rows: Sequence[Mapping[str, Any]], first_group: int
    ) -> list[GroupRequest]:
        """Return one request per group, from the group's prompt and row."""
        return [
            GroupRequest(id=group, prompt_ids=self.protocol(row).encode_prompt(prompt), kit=self.of(row))
            for group, (prompt, row) in enumerate(zip(prompts, rows, strict=True), first_group)
        ]

    def protocols(self, dataset: Dataset) -> Iterable[ToolProtocol]:
        """Return the protocol of each row of a dataset."""
        if not self._by_name:
            return repeat(self._protocol)
        return (self.protocol({COLUMN: name}) for name in dataset[COLUMN])


def tool_sets(tools: Tools, environments: Environments | None) -> dict[Any, ToolSet]:
    """Return, for each of several environment classes by name, the class's tools and `tools`. Empty with one class or
    none.

    Raises:
        ToolSpecError: A function cannot be a tool, or two tools of a row have the same name.
    """
    if environments is None or not environments.kinds.several:
        return {}
    return {
        name: ToolSet([*tools, *kind.methods.values()], environments)
        for name, kind in environments.kinds.by_name.items()
    }


def all_tools(tools: Tools, environments: Environments | None) -> list[Callable[..., Any]]:
    """Return `tools` and the environments' tools, one for each name."""
    if environments is None:
        return list(tools)
    first: dict[str, Callable[..., Any]] = {}
    for method in environments.tools:
        first.setdefault(method.__name__, method)
    return [*tools, *first.values()]
