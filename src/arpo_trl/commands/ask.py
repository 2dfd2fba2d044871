"""`arpo-trl ask RUN "question"`: a trained model answers one question with its tools. Shows its path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial

from arpo_trl.common.flags import VisibleParser
from arpo_trl.common.waiting import say_loading
from arpo_trl.evaluation.parsing import parse_evaluation

ENTROPY_TOKENS = 20
"""The number of tokens at the start of a turn whose mean entropy is shown."""


def main(words: Sequence[str]) -> int:
    parser = VisibleParser(
        prog="arpo-trl ask",
        usage='arpo-trl ask RUN "QUESTION" [options of arpo-trl eval]',
        allow_abbrev=False,  # the remaining words are options of the evaluation
        description="Asks a trained model one question, with the tools, lengths, protocol and system prompt of its "
        "training.",
        epilog="Every option of `arpo-trl eval` about the model, sampling and tools can follow, such as "
        "--temperature 0, --search-index FILE or --system-prompt NAME.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run, or any model")
    parser.add_argument("question", metavar="QUESTION", help="the question")
    arguments, options = parser.parse_known_args(words)
    if any(word.startswith("--") for word in words[:2]):  # the value of an option would count as the question
        parser.error("an option stands before the question; expected RUN, the question, and then the options")
    if not arguments.question.strip():
        parser.error("the question is blank")
    if options and not options[0].startswith("-"):
        parser.error(f"{options[0]!r} follows the question. Put a question of several words in quotes")
    say_loading("arpo-trl ask")
    settings, tool_arguments = parse_evaluation(["--model", arguments.run, *options])
    from rich.console import Console
    from rich.text import Text

    from arpo_trl.data.layouts import convert_row, system_prompt_text
    from arpo_trl.data.prompts import default_system_prompt
    from arpo_trl.evaluation.engines import load_tokenizer, make_sampler
    from arpo_trl.evaluation.scoring import predicted
    from arpo_trl.logs.render import render_tree
    from arpo_trl.logs.trajectories import LoggedTree
    from arpo_trl.options import ProtocolKind
    from arpo_trl.rollout.batch import GroupRequest
    from arpo_trl.tools.builtin import build_tools
    from arpo_trl.tools.toolbox import ToolBox
    from arpo_trl.visible import visible

    tools = cache(partial(build_tools, tool_arguments, run=arguments.run))
    # The prompt that training and evaluation give to a row that is a plain question. `own_reward`: it has no answer.
    row = convert_row(
        {"question": arguments.question},
        0,
        system_prompt_text(settings.system_prompt),
        own_reward=True,
        of_questions=system_prompt_text(
            default_system_prompt(tool_arguments.offered, tools, tags=settings.tool_protocol == ProtocolKind.TAGS)
        ),
    )
    assert row is not None
    tokenizer = load_tokenizer(settings)
    with ToolBox(tools(), timeout_s=settings.tool_timeout_s, concurrency=settings.tool_concurrency) as toolbox:
        sampler = make_sampler(settings, toolbox, tokenizer)
        rollout = sampler.sample(
            [GroupRequest(id=0, prompt_ids=sampler.protocol.encode_prompt(row["prompt"]))],
            seed=(settings.seed, "ask"),
            settings=replace(sampler.settings.without_branching(1), entropy_probe_tokens=ENTROPY_TOKENS),
        )
    (tree,) = rollout.trees
    (leaf,) = tree.leaves()
    console = Console()
    path = LoggedTree(step=0, group=0, prompt=arguments.question, tree=tree, rewards=[None], advantages=[0.0])
    console.print(render_tree(path, title=visible(arguments.run)))
    answer = predicted(sampler.protocol.whole_turns(tree.root.ids, leaf, calls=False))
    console.print(Text(f"Answer: {visible(answer)}" if answer is not None else "No answer in <answer>."))
    return 0
