"""Trees as traces of trackio."""

from __future__ import annotations

import trackio

from arpo_trl.logs.traces import leaf_traces
from test_view import HOSTILE, logged


def test_a_leaf_is_a_trace_of_its_messages_and_reward() -> None:
    first, second = leaf_traces(logged(group=2))
    assert first["messages"] == [
        {"role": "user", "content": "question 2: 1538 degrees"},
        {"role": "assistant", "content": "<search>iron</search>"},
        {"role": "tool", "name": "search", "content": "1538 degrees"},
        {"role": "assistant", "content": "1538 degrees"},
    ]
    assert second["metadata"] == {
        **{"step": 4, "group": 2, "answers": ["1538"], "path": "0,1,0", "reward": -1.0, "advantage": -0.75},
        **{"stop_reason": "length", "tool_calls": 1, "tokens": 4},  # 2 + 1 + 1 tokens
    }


def test_trackio_takes_them_without_hidden_characters() -> None:
    traces = [trackio.Trace(**trace) for trace in leaf_traces(logged(text=HOSTILE))]
    assert not set(str([trace.messages for trace in traces])) & set("\x1b\u202e")
