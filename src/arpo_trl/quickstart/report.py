"""The quickstart's final report: numbers, a table and a plot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from arpo_trl.logs.picture import save
from arpo_trl.rollout.rules import mean
from arpo_trl.rollout.tree import RolloutTree

PROBE = 8
"""The number of tokens after a tool result that count as "directly after" it."""
AVERAGED = 5
"""The number of steps whose mean reward is reported as the first and the last reward of a run."""


ELSEWHERE = "elsewhere"


def entropy_places(trees: Iterable[RolloutTree], tools: Sequence[str]) -> dict[str, float]:
    """Return mean entropies of a token, in nats, of trees that contain the entropy of every token.

    "after TOOL", for each of `tools`, is over the first `PROBE` tokens after its results; "elsewhere" is over all
    other tokens.
    """
    found: dict[str, list[float]] = {place: [] for place in (*(f"after {tool}" for tool in tools), ELSEWHERE)}
    for tree in trees:
        for turn in tree.turns():
            assert turn.parent is not None
            after = found.get(f"after {tree.nodes[turn.parent].tool}", found[ELSEWHERE])
            after.extend(turn.entropies[:PROBE])
            found[ELSEWHERE].extend(turn.entropies[PROBE:])
    return {place: mean(entropies) for place, entropies in found.items()}


TERMS = (
    "Held out: not trained on. Entropy: the model's uncertainty, 0 if certain; branches start where it increases.\n"
    "Leaf: one complete answer. Branch: an answer that starts at a tool result of another answer. "
    "Top-up: an answer that starts at the question instead.\n"
    "Leaf tokens per sampled token: above 1, leaves share sampled tokens."
)


def summarise(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return totals and means over the training steps of a trainer's log history."""
    steps = [row for row in history if "reward" in row]
    groups = [row["arpo/tree/groups"] for row in steps]

    def column(name: str) -> list[float]:
        return [row[f"arpo/{name}"] for row in steps]

    def total_per_group(name: str) -> int:
        return round(sum(value * count for value, count in zip(column(name), groups, strict=True)))

    leaves = round(sum(column("tree/leaves")))
    return {
        "reward_first": mean([row["reward"] for row in steps[:AVERAGED]]),
        "reward_last": mean([row["reward"] for row in steps[-AVERAGED:]]),
        "tool_calls_made": round(sum(column("tools/calls_made"))),
        "tool_calls_executed": round(sum(column("tools/calls_executed"))),
        "tool_calls_distinct": round(sum(column("tools/calls_distinct"))),
        "tool_calls_per_leaf": sum(column("tools/calls_made")) / leaves,
        "leaves": leaves,
        "branches": total_per_group("tree/branches"),
        "topups": total_per_group("tree/topups"),
        "generated_tokens": total_per_group("tree/generated_tokens"),
        "turns_in_sequence": mean(column("tree/turns_in_sequence")),
        "sharing_ratio": mean(column("tree/sharing_ratio")),
        "sampler_share": mean(column("time/sampler_share")),
        "steps": len(steps),
    }


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Return the table of the main numbers."""
    table = Table(show_header=True, header_style="bold")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row(
        "held-out accuracy, sampled", f"{summary['accuracy_before']:.3f}", f"{summary['accuracy_after']:.3f}"
    )
    table.add_row("held-out accuracy, greedy", f"{summary['greedy_before']:.3f}", f"{summary['greedy_after']:.3f}")
    table.add_row("reward, first and last steps", f"{summary['reward_first']:.3f}", f"{summary['reward_last']:.3f}")
    table.add_section()
    for label, value in (
        ("leaves trained on", f"{summary['leaves']:,}"),
        ("branches, top-ups", f"{summary['branches']:,}, {summary['topups']:,}"),
        ("tool calls made, per leaf", f"{summary['tool_calls_made']:,}, {summary['tool_calls_per_leaf']:.2f}"),
        ("leaf tokens per sampled token", f"{summary['sharing_ratio']:.2f}"),
        ("seconds, cold start and RL", f"{summary['seconds_sft']:.0f} + {summary['seconds_rl']:.0f}"),
    ):
        table.add_row(label, "", value)
    return table


def accuracy_lines(
    history: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], accuracy: str = "eval_arpo/accuracy"
) -> dict[str, list[tuple[int, float]]]:
    """Return label → points (step, accuracy): one line for each set of held-out questions.

    The evaluation during training answers only some of the held-out questions, so its accuracy is a separate line.
    `accuracy` is its metric in `history`.
    """
    last = max(row["step"] for row in history if "reward" in row)
    whole = [(0, summary["accuracy_before"]), (last, summary["accuracy_after"])]
    watched = [(row["step"], row[accuracy]) for row in history if accuracy in row]
    lines = {"accuracy, all held-out questions": whole, "accuracy, those watched in training": watched}
    return {label: points for label, points in lines.items() if points}


def draw(
    history: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    before: Mapping[str, float],
    after: Mapping[str, float],
    path: Path,
    accuracy: str,
) -> None:
    """Save the plot: reward and accuracy over steps, entropy around tool results, tool calls, tree shape.

    `accuracy` is the metric in `history` of the evaluation during training.
    """
    from matplotlib.figure import Figure

    steps = [row for row in history if "reward" in row]
    figure = Figure(figsize=(10, 7.6), layout="constrained")
    (curve, places), (calls, shape) = figure.subplots(2, 2)

    x = [row["step"] for row in steps]
    curve.plot(x, [row["reward"] for row in steps], color="tab:blue", label="reward (training)")
    lines = accuracy_lines(history, summary, accuracy).items()
    for (label, points), colour in zip(lines, ("tab:green", "tab:orange"), strict=False):
        curve.plot(*zip(*points, strict=True), "o--", color=colour, label=label)
    curve.set(title="Reward and held-out accuracy", xlabel="step")
    curve.legend(fontsize="small")

    for offset, (when, values) in zip((-0.2, 0.2), (("cold start", before), ("trained", after)), strict=True):
        bars = places.bar([i + offset for i in range(len(values))], list(values.values()), width=0.4, label=when)
        places.bar_label(bars, fmt="%.2f", fontsize=8)
    places.set_xticks(range(len(before)), list(before))
    places.set(title=f"Entropy of the first {PROBE} tokens after a tool result", ylabel="nats per token")
    places.legend()

    leaves = [row["arpo/tree/leaves"] for row in steps]
    for name, label in (("calls_made", "made"), ("calls_distinct", "distinct in the step")):
        per_leaf = [row[f"arpo/tools/{name}"] / count for row, count in zip(steps, leaves, strict=True)]
        calls.plot(x, per_leaf, label=label)
    calls.plot(x, [row["arpo/tools/calls_per_leaf"] for row in steps], "--", color="grey", label="on a leaf's path")
    calls.set(title="Tool calls per leaf", xlabel="step", ylim=(0, None))
    calls.legend()

    shape.plot(x, [row["arpo/tree/sharing_ratio"] for row in steps], label="leaf tokens per sampled token")
    shape.plot(x, [row["arpo/tree/branches"] for row in steps], label="branches per group")
    shape.plot(x, [row["arpo/tree/topups"] for row in steps], label="top-ups per group")
    shape.set(title="Shape of the trees", xlabel="step", ylim=(0, None))
    shape.legend()
    figure.supxlabel(TERMS, fontsize="small", ha="left", x=0.02)
    save(figure, path, dpi=120)
