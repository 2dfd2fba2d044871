"""The states of a rollout's paths: which are open, and which paths wait for theirs."""

from __future__ import annotations

from collections.abc import Collection

from arpo_trl.rollout.paths import Path
from arpo_trl.rollout.tree import Address
from arpo_trl.tools.state import PathStates
from arpo_trl.tools.toolbox import ToolBox


class OpenStates:
    """The states of one rollout. As a context manager it closes at the end, also after an error, those still open."""

    def __init__(self, toolbox: ToolBox):
        self.opening: dict[int, Path] = {}
        """Paths whose first turn waits until their states are open, by ticket."""
        self.waiting: list[Path] = []
        """Paths whose states may not open yet, in order of arrival."""
        self._toolbox = toolbox
        self._unclosed: dict[PathStates, None] = {}
        """The states that are not yet closed, as an ordered set."""

    def __enter__(self) -> OpenStates:
        return self

    def __exit__(self, *_: object) -> None:
        for states in list(self._unclosed):
            self.close(states)

    def add(self, states: PathStates) -> PathStates:
        """Keep `states` until they are closed or finished, and return them."""
        self._unclosed[states] = None
        return states

    def close(self, states: PathStates) -> None:
        del self._unclosed[states]
        states.close()

    def finish(self, states: PathStates, address: Address) -> None:
        """Close the states of the path that has ended at `address`."""
        del self._unclosed[states]
        states.finish(address)
        self.admit()

    def forget(self, group: int) -> None:
        """Close all states of a group. None of its paths waits any longer."""
        self.opening = {ticket: path for ticket, path in self.opening.items() if path.group.id != group}
        self.waiting = [path for path in self.waiting if path.group.id != group]
        for states in [states for states in self._unclosed if states.group == group]:
            self.close(states)
        self.admit()

    def open(self, path: Path) -> None:
        """Open the states of `path` when they may open."""
        self.waiting.append(path)
        self.admit()

    def admit(self) -> None:
        """Open the states of the paths that have waited longest, as many as may open."""
        while self.waiting and self.waiting[0].states.admit():
            path = self.waiting.pop(0)
            self.opening[self._toolbox.open(path.states)] = path

    @property
    def will_admit(self) -> bool:
        """Whether the path that has waited longest will start soon, also if no other path ends."""
        return bool(self.waiting) and self.waiting[0].states.will_be_admitted

    def is_stuck(self, live: Collection[int]) -> bool:
        """Whether the states of the groups `live` hang, or keep the slots for which the longest waiting path waits."""
        return bool(self.waiting) and self.waiting[0].states.is_stuck(live)
