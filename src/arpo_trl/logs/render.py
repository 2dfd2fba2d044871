"""A tree as text for the terminal."""

from __future__ import annotations

from rich.markup import escape
from rich.text import Text
from rich.tree import Tree

from arpo_trl.logs.trajectories import LoggedTree
from arpo_trl.rollout.rules import mean
from arpo_trl.rollout.tree import Node, NodeKind
from arpo_trl.visible import visible

MAX_CHARS = 160


def render_tree(logged: LoggedTree) -> Tree:
    """Renders turns and tool results, entropies at the start of turns, forks, and the leaves' rewards."""
    tree = logged.tree
    results = {
        leaf.nodes[-1].index: (reward, advantage)
        for leaf, reward, advantage in zip(tree.leaves(), logged.rewards, logged.advantages, strict=True)
    }
    title = f"[bold]step {logged.step}, group {logged.group}[/]  {escape(_short(logged.prompt))}"
    picture = Tree(title, guide_style="dim")
    branches = {0: picture}
    for node in tree.nodes[1:]:
        assert node.parent is not None
        branches[node.index] = branches[node.parent].add(_label(node, results))
    return picture


def _label(node: Node, results: dict[int, tuple[float | None, float]]) -> Text:
    label = Text(overflow="fold")
    if node.kind is NodeKind.OBSERVATION:
        label.append(_short(node.text), style="dim cyan" if all(call.ok for call in node.calls) else "dim red")
        if node.decision is not None:
            sign = "⑂" if node.decision.granted else "·"
            rise = "" if node.decision.delta is None else f" ΔH {node.decision.delta:+.3f},"
            label.append(
                f"  {sign}{rise} {node.decision.granted} extra",
                style="bold yellow" if node.decision.granted else "dim",
            )
        return label
    label.append(_short(node.text))
    label.append(f"  H {mean(node.entropies):.2f}", style="dim")
    if node.index in results:
        reward, advantage = results[node.index]
        good = reward is not None and reward > 0
        shown = "none" if reward is None else f"{reward:.2f}"
        label.append(f"  ■ {node.stop} reward {shown}, A {advantage:+.2f}", style="bold green" if good else "bold red")
    return label


def _short(text: str) -> str:
    line = " ".join(visible(text).split())
    return line if len(line) <= MAX_CHARS else line[: MAX_CHARS - 1] + "…"
