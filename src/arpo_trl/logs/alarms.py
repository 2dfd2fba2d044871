"""Warnings about metrics that indicate silent failures of a run, each with advice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from arpo_trl.common.alarm import Alarm
from arpo_trl.logs.metrics import Tally
from arpo_trl.rollout.rules import BranchRule

REPEAT_EVERY = 50
"""The checks between two reports of a lasting condition."""
ALARMS = (
    Alarm(
        metric="alarm/unparsed",
        limit=0.5,
        advice="{share} of the rollouts contain neither a valid tool call nor an answer: the model does not follow "
        "the tool protocol. Start from a cold-started model (sft.py), and inspect its output (arpo-trl tree).",
    ),
    Alarm(
        metric="alarm/truncated",
        limit=0.5,
        advice="{share} of the rollouts were truncated by the length limit before they could answer. Raise "
        "max_completion_length, or start from a model that ends its turns (sft.py).",
    ),
    Alarm(
        metric="alarm/zero_variance_groups",
        limit=0.9,
        advice="{share} of the groups have the same reward on all leaves, so they provide no learning signal. If all "
        "answers have a wrong format, see arpo/format, alarm/unparsed and alarm/truncated. If all are right, the rows "
        "are too easy.",
    ),
    Alarm(
        metric="baseline/reinforced_below_mean",
        limit=0.25,
        advice="{share} of the leaves with less reward than their group's mean have a positive advantage: the "
        "baseline is below the reward of wrong answers, and the policy drifts towards them. Set score_norm_cap (3), "
        "or advantage_baseline mean, and watch entropy.",
        count=100,
    ),
    Alarm(
        metric="tools/search/degraded",
        limit=0.1,
        advice="{share} of the searches got a notice instead of results: the service fails, its rate limit is "
        "reached, or search_max_calls is used up. See the warnings above. Such rollouts discourage searches.",
    ),
)


def failure_alarm(tool: str) -> Alarm:
    """The alarm about a tool all of whose calls fail: only the model sees the errors."""
    return Alarm(
        metric=f"tools/{tool}/failed",
        limit=1.0,
        advice=f"{{share}} of the last calls of {tool} failed. If the tool itself is broken, the rollouts discourage "
        "its use. Read the errors in the results (arpo-trl tree), and call the tool by hand.",
        count=50,
    )


def reward_alarm(name: str) -> Alarm:
    """The alarm about a reward function that never gives anything: the others hide it in the sum of the rewards."""
    return Alarm(
        metric=f"alarm/unrewarded/{name}",
        limit=1.0,
        advice=f"the reward function {name} gave a single reward, 0 or less, to all of the last rollouts, so that it "
        "teaches nothing beside the other functions. It may read a column (as by kwargs.get) or a text that is not "
        "there: look at the rollouts (arpo-trl tree), and call it by hand. A penalty that none deserves is fine.",
        count=200,
        again=False,
    )


class Alarms:
    """Checks a run's tallies for the alarms of all runs, those of the branch rule and those about `tools` and
    `rewards`.

    Args:
        rewards: The names of reward functions whose sum is the reward.
        tags: Whether the model must write tags, for calls or for answers. Without them, a path that consists of plain
            text is in order.
    """

    def __init__(self, rule: BranchRule, tools: Iterable[str] = (), rewards: Iterable[str] = (), *, tags: bool = True):
        of_all = [alarm for alarm in ALARMS if tags or alarm.metric != "alarm/unparsed"]
        self._alarms = (*of_all, *rule.alarms, *map(failure_alarm, tools), *map(reward_alarm, rewards))
        self._counted = {alarm: [0.0, 0.0] for alarm in self._alarms}
        """Sum and count of each alarm's metric since its last check."""
        self._told = dict.fromkeys(self._alarms, 0)
        """The number of rollouts from each alarm's last message on, that one included; 0: there was none."""

    def state_dict(self) -> list[list[float]]:
        """For each alarm: sum and count since its last check, and the rollouts from its last message on."""
        return [[*self._counted[alarm], self._told[alarm]] for alarm in self._alarms]

    def load_state_dict(self, state: Sequence[Sequence[float]]) -> None:
        """The inverse of `state_dict`."""
        # Not strict: a run may resume with another version of the package, or of its rule, which has other alarms.
        for alarm, (total, count, told) in zip(self._alarms, state, strict=False):
            self._counted[alarm], self._told[alarm] = [total, count], int(told)

    def check(self, tally: Tally) -> list[str]:
        """The messages to log after this rollout."""
        messages = []
        for alarm in self._alarms:
            self._told[alarm] += self._told[alarm] > 0
            counted = self._counted[alarm]
            for i, new in enumerate(tally.sums.get(alarm.metric, (0.0, 0.0))):
                counted[i] += new
            if counted[1] < alarm.count:
                continue
            share = counted[0] / counted[1]
            self._counted[alarm] = [0.0, 0.0]
            is_due = self._told[alarm] == 0 or (alarm.again and self._told[alarm] > REPEAT_EVERY)
            if is_due and (share <= alarm.limit if alarm.below else share >= alarm.limit):
                messages.append(f"arpo/{alarm.metric}: {alarm.advice.replace('{share}', f'{share:.0%}')}")
                self._told[alarm] = 1
        return messages
