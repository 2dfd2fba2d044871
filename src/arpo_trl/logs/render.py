"""A tree as text for the terminal.

Only forks are indented. The turns and tool results of a path have the same indentation, so that long paths fit into 80
columns.
"""

from __future__ import annotations

from rich.text import Text
from rich.tree import Tree

from arpo_trl.logs.trajectories import LoggedTree
from arpo_trl.rollout.rules import mean
from arpo_trl.rollout.tree import BranchDecision, Node, NodeKind, address_text
from arpo_trl.visible import visible

MAX_CHARS = 160

LEGEND = (
    "A path is a list of turns (▸) and tool results (◂). H: mean entropy of a turn's first tokens, in nats. A fork "
    "(+) starts extra turns under a result; ΔH and P are the values of the branch rule. ■ ends a path, with its "
    "reward and advantage A."
)


def render_tree(logged: LoggedTree, *, full: bool = False, title: str = "") -> Tree:
    """Renders turns and tool results, entropies at the start of turns, forks, and the leaves' rewards.

    `full` shows whole texts instead of the first `MAX_CHARS` characters. `title` replaces "step …, group …".
    """
    heading = Text(title or f"step {logged.step}, group {logged.group}", style="bold")
    picture = Tree(Text.assemble(heading, "  ", _shown(logged.prompt, full)), guide_style="dim")
    results = {leaf.nodes[-1].index: (reward, advantage) for leaf, reward, advantage in logged.scored_leaves()}
    writers, nodes = logged.tree.writers(), logged.tree.nodes
    waiting = [(child, picture, 0) for child in reversed(nodes[0].children)]
    while waiting:
        start, above, number = waiting.pop()
        kind = "branch" if number else "path"
        path = above.add(Text(f"{kind} {address_text(writers[start])}", style="bold yellow" if number else "bold"))
        node = nodes[start]
        while True:
            path.add(_label(node, results, full))
            if len(node.children) != 1:
                break
            node = nodes[node.children[0]]
        # A branch may have started first. Sorted by address, the continuing path comes before its branches.
        forks = list(enumerate(sorted(node.children, key=writers.__getitem__)))
        waiting += [(child, path, order) for order, child in reversed(forks)]
    return picture


def _label(node: Node, results: dict[int, tuple[float | None, float]], full: bool) -> Text:
    label = Text(overflow="fold")
    if node.kind is NodeKind.OBSERVATION:
        ok = all(call.ok for call in node.calls)
        label.append(f"◂ {_shown(node.text, full)}", style="cyan" if ok else "red")
        if not ok:
            failures = ", ".join(str(call.failure) for call in node.calls if not call.ok)
            label.append(f"  failed: {failures}", style="bold red")
        if node.decision is not None:
            label.append(f"  {_decision(node.decision)}", style="bold yellow" if node.decision.granted else "dim")
        return label
    label.append(f"▸ {_shown(node.text, full)}")
    label.append(f"  H {mean(node.entropies):.2f}", style="dim")
    if node.unread:
        label.append(f"  no room for the result of {', '.join(call.name for call in node.unread)}", style="bold red")
    if node.index in results:
        reward, advantage = results[node.index]
        if reward is None:
            label.append(f"  ■ {node.stop} no reward", style="bold")
        else:
            style = "bold green" if reward > 0 else "bold red"
            label.append(f"  ■ {node.stop} reward {reward:.2f}, A {advantage:+.2f}", style=style)
    return label


def _decision(decision: BranchDecision) -> str:
    values = "".join(
        f", {name} {value:{form}}"
        for name, value, form in (("ΔH", decision.delta, "+.3f"), ("P", decision.probability, ".3f"))
        if value is not None
    )
    if decision.reason:
        values += f", {visible(decision.reason)}"
    if decision.granted:
        return f"+ {decision.granted} extra{values}"
    return f"no leaves left{values}" if decision.fires else f"no fork{values}"


def _shown(text: str, full: bool) -> str:
    if full:
        return visible(text)
    line = " ".join(visible(text).split())
    return line if len(line) <= MAX_CHARS else line[: MAX_CHARS - 1] + "…"
