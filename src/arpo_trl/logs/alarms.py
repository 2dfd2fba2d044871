"""Warnings about shares that mean a run goes wrong silently, and what to do about each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from arpo_trl.logs.metrics import Tally
from arpo_trl.rollout.rules import BranchRule


@dataclass(frozen=True, slots=True)
class Alarm:
    """A share that means something is silently wrong, and what to do about it.

    It is looked at whenever `count` things have been counted since the last look, and rings from `limit` on (`below`:
    from it down): once a run, or with `again` every `REPEAT_EVERY` looks at which it still rings.
    """

    metric: str
    limit: float
    advice: str
    below: bool = False
    count: int = 1
    again: bool = True


REPEAT_EVERY = 50
FIRE_RATE_COUNT = 200
ALARMS = (
    Alarm(
        "alarm/unparsed",
        0.5,
        "{share} of the rollouts hold neither a valid tool call nor an answer: the model does not speak the protocol. "
        "Start from a cold-started model (sft.py), and look at what it writes (arpo-trl tree).",
    ),
    Alarm(
        "alarm/truncated",
        0.5,
        "{share} of the rollouts were cut by the length limit and could not answer. Raise max_completion_length, or "
        "start from a model that ends its turns (sft.py).",
    ),
    Alarm(
        "alarm/zero_variance_groups",
        0.9,
        "{share} of the groups earned one reward everywhere, so they teach nothing. All wrong in format: see "
        "arpo/format and the two shares alarm/unparsed and alarm/truncated. All right: the rows are too easy.",
    ),
    Alarm(
        "tools/search/degraded",
        0.1,
        "{share} of the searches got a notice instead of results: the service fails, is asked too fast, or "
        "search_max_calls is spent. See the warnings above; such rollouts teach the model not to search.",
    ),
)
FIRE_RATE_ALARMS = (
    Alarm(
        "tree/fire_rate",
        0.9,
        "{share} of the tool results fire the branch rule, so the budget decides where branches go, not the entropy. "
        "Raise branch_threshold, or use branch_rule ranked.",
        count=FIRE_RATE_COUNT,
        again=False,
    ),
    Alarm(
        "tree/fire_rate",
        0.1,
        "Only {share} of the tool results fire the branch rule; most of the branch budget is topped up at the root. "
        "Lower branch_threshold, or use branch_rule ranked.",
        below=True,
        count=FIRE_RATE_COUNT,
        again=False,
    ),
)


class Alarms:
    """Listens to a run's tallies and says what rings; the fire rate only under rules that an entropy triggers."""

    def __init__(self, rule: BranchRule):
        self._alarms = ALARMS + (FIRE_RATE_ALARMS if rule.entropy_triggers else ())
        self._heard = {alarm: [0.0, 0.0] for alarm in self._alarms}
        self._rung = dict.fromkeys(self._alarms, 0)

    def state_dict(self) -> list[list[float]]:
        """What it has heard and how often it rang, alarm by alarm, for `load_state_dict`."""
        return [[*self._heard[alarm], self._rung[alarm]] for alarm in self._alarms]

    def load_state_dict(self, state: Sequence[Sequence[float]]) -> None:
        for alarm, (total, count, rung) in zip(self._alarms, state, strict=True):
            self._heard[alarm], self._rung[alarm] = [total, count], int(rung)

    def check(self, tally: Tally) -> list[str]:
        """The messages to log after this rollout."""
        messages = []
        for alarm in self._alarms:
            heard = self._heard[alarm]
            for i, new in enumerate(tally.sums.get(alarm.metric, (0.0, 0.0))):
                heard[i] += new
            if heard[1] < alarm.count:
                continue
            share = heard[0] / heard[1]
            self._heard[alarm] = [0.0, 0.0]
            if share <= alarm.limit if alarm.below else share >= alarm.limit:
                if self._rung[alarm] == 0 or (alarm.again and self._rung[alarm] % REPEAT_EVERY == 0):
                    messages.append(f"arpo/{alarm.metric}: {alarm.advice.format(share=f'{share:.0%}')}")
                self._rung[alarm] += 1
        return messages
