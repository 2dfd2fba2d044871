"""`Alarm`: a limit on a metric, with advice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """A limit on a metric that is a share, and advice if it is reached.

    The share is checked when its count since the last check has reached `count`. The alarm is raised if the share is
    at least `limit` (with `below`, at most `limit`). It is raised once per run or, with `again`, at the first check
    that reaches the limit and then again from time to time. `metric` is the name without `arpo/`.

        Alarm(metric="alarm/truncated", limit=0.5, advice="{share} of the rollouts hit the length limit. Raise it.")
    """

    metric: str
    limit: float
    advice: str
    below: bool = False
    count: int = 1
    again: bool = True
