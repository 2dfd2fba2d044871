import io

import pytest
from rich.console import Console

from arpo_trl.logs.render import MAX_CHARS, render_tree
from arpo_trl.logs.trajectories import LoggedTree
from arpo_trl.rollout.tree import BranchDecision, RolloutTree
from arpo_trl.tools.calls import ToolFailure
from support import one_fork


def tree(text: str = "words", failure: ToolFailure | None = None) -> RolloutTree:
    return one_fork(text, failure=failure)


def shown(
    made: RolloutTree, rewards: tuple[float | None, float | None] = (1.0, -1.0), prompt: str = "a prompt"
) -> list[str]:
    console = Console(file=io.StringIO(), width=400, color_system=None)
    console.print(
        render_tree(
            LoggedTree(step=12, group=3, prompt=prompt, tree=made, rewards=list(rewards), advantages=[0.75, -0.75])
        )
    )
    return console.file.getvalue().splitlines()


def test_a_tree_is_drawn_line_by_line_and_only_forks_indent():
    assert shown(tree()) == [
        "step 12, group 3  a prompt",
        "└── path 0",
        "    ├── ▸ <search>iron</search>  H 0.50",
        "    ├── ◂ 1538 degrees  + 1 extra, ΔH +0.125, P 0.525, drew 0.312",
        "    ├── path 0",
        "    │   └── ▸ words  H 1.50  ■ eos reward 1.00, A +0.75",
        "    └── branch 0,1,0",
        "        └── ▸ cut off  H 0.50  ■ length reward -1.00, A -0.75",
    ]


def test_the_continuing_path_is_before_a_branch_that_started_earlier():
    made = tree()
    made.nodes[2].children.reverse()
    assert shown(made) == shown(tree())


def test_a_result_shows_failures_and_the_reason_without_a_fork():
    made = tree(failure=ToolFailure.TIMEOUT)
    made.nodes[2].decision = BranchDecision(entropy_nats=1.0, delta=-0.25, probability=0.45)
    assert shown(made)[3].endswith("◂ 1538 degrees  failed: timeout  no fork, ΔH -0.250, P 0.450")
    made.nodes[2].decision = BranchDecision(fires=True)
    assert shown(made)[3].endswith("no leaves left")
    made.nodes[2].decision = BranchDecision(reason="round 1: 0 of 2 paths, score 1.000 nats")
    assert shown(made)[3].endswith("no fork, round 1: 0 of 2 paths, score 1.000 nats")


def test_no_reward_is_not_zero():
    assert shown(tree(), (None, 0.0))[5].endswith("■ eos no reward")
    assert "reward 0.00" in shown(tree(), (None, 0.0))[7]


@pytest.mark.parametrize(
    "text", ["[bold]not markup[/bold]", "[/]", "\\[x] ends with a backslash\\", "ratio a:b:c and :x:"]
)
def test_brackets_in_text_are_no_markup_and_words_between_colons_no_emoji(text):
    lines = shown(tree(text), prompt=text)
    assert text in lines[0]
    assert text in lines[5]


def test_long_texts_are_cut_and_lines_joined():
    lines = shown(tree("word\n" * 200))
    assert len(lines) == 8
    written = lines[5].partition("▸ ")[2].partition("  H ")[0]
    assert len(written) == MAX_CHARS
    assert written.startswith("word word word ") and written.endswith("…")


def test_nothing_that_was_logged_steers_the_terminal():
    hostile = "\x1b]52;c;Y3VybA==\x07\x1b]0;owned\x07\x1b[2J\x9b2J\u202edlo"
    shown_as = "␛]52;c;Y3VybA==␇␛]0;owned␇␛[2J‹U+009B›2J‹U+202E›dlo"
    made = tree(hostile)
    made.nodes[2].text = hostile
    made.nodes[2].decision = BranchDecision(reason=hostile)
    lines = shown(made, prompt=hostile)
    assert [shown_as in line for line in lines] == [True, False, False, True, False, True, False, False]
    assert all(char.isprintable() for line in lines for char in line)
