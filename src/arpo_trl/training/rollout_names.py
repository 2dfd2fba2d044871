"""Names of rollouts. A name seeds its rollout and names its log file."""

from __future__ import annotations

from collections.abc import Mapping


class RolloutNames:
    """Names each rollout by its optimizer step. From the second rollout of a step, the name also has a number.

    A resumed run has the step and the counts from its checkpoint, so it produces the same names.

        names.next("step", 12)      # "step-000012"
        names.next("step", 12)      # "step-000012.1"
        names.next("eval", 12)      # "eval-000012"
    """

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, int]] = {}
        """Kind → the step of its last rollout, and that rollout's number in the step."""

    def next(self, kind: str, step: int) -> str:
        """The name of the next rollout: "step" in training, "eval" in evaluation."""
        last, count = self._last.get(kind, (-1, 0))
        count = count + 1 if last == step else 0
        self._last[kind] = (step, count)
        return f"{kind}-{step:06d}" + (f".{count}" if count else "")

    def state_dict(self) -> dict[str, tuple[int, int]]:
        """The last step and count of each kind, for `load_state_dict`."""
        return dict(self._last)

    def load_state_dict(self, state: Mapping[str, tuple[int, int]]) -> None:
        """The inverse of `state_dict`."""
        self._last = dict(state)
