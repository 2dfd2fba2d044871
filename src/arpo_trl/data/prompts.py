r"""The system prompts, by name.

`reasoning` and `deepsearch` explain the tags of `TagProtocol`: a tool's name is its tag, and its result is in
`<result>`. `tags_system_prompt` does the same for any tools. `tools` is for `tool_protocol: chat_template`, whose
template describes the tools. All prompts ask for the answer as `\boxed{}` within `<answer>`, which the reward's format
check and `extract_answer` expect. `default_system_prompt` selects one for the tools of a run.
"""

from collections.abc import Callable, Sequence
from typing import Any

from arpo_trl.tools.spec import tool_spec

_ANSWER = r"""Finish with <answer>a short conclusion, \boxed{the answer}</answer>.
Give exactly one answer, with nothing after it, and only the answer itself inside \boxed{}."""

_FORM = r"""

Write in this form:
- <think>your reasoning</think> before each step.
{calls}
- After a call, stop. Its result is shown to you as <result>…</result>; never write that tag yourself.
- Use as many steps as you need.
{answer}"""


def _form(*calls: str) -> str:
    return _FORM.format(calls="\n".join(f"- {call}" for call in calls), answer=_ANSWER)


_STEPS = "Solve the task step by step."


_TAGS = _form(
    "<search>a query</search> to look something up.",
    "<python>code</python> to compute; print what you want to see.",
)

SYSTEM_PROMPTS: dict[str, str] = {
    "reasoning": f"{_STEPS} You can search an encyclopedia and run Python code." + _TAGS,
    "deepsearch": (
        "Answer the question by research. You can search the web, where a result may hold text from the pages found, "
        "and run Python code. Break the question into parts, follow leads over several searches, and check what you "
        "find against a second source before you rely on it."
    )
    + _TAGS,
    "tools": f"{_STEPS} Call the tools as often as you need. {_ANSWER}",
}
"""`reasoning`: mathematics and factual questions, with local search. `deepsearch`: many searches on the live web.
`tools`: both, if the chat template describes the tools."""
_OF_REASONING = (["search", "python"], ["python", "search"])
"""The tools that `reasoning` describes."""


def tags_system_prompt(tools: Sequence[Callable[..., Any]]) -> str:
    """A system prompt that describes `tools`, from their docstrings, and the tags of `TagProtocol`.

    Raises:
        ToolSpecError: A tool does not have exactly one required `str` argument, so tags cannot call it.
    """
    calls = []
    for spec in map(tool_spec, tools):
        name, parameter, function = spec.name, spec.tag_parameter, spec.schema["function"]
        call = f"<{name}>{parameter}</{name}>: {_sentence(function['description'])}"
        schema = function["parameters"]["properties"][parameter]
        about = schema.get("description") or ""  # some MCP servers give none
        if choices := schema.get("enum"):
            about = f"{_sentence(about)} " if about else ""
            about += f"One of: {', '.join(map(str, choices))}."
        calls.append(f"{call} {parameter}: {about}" if about else call)
    return f"{_STEPS} You can call tools." + _form(*calls)


def default_system_prompt(
    offered: Sequence[Any], tools: Callable[[], Sequence[Callable[..., Any]]], *, tags: bool
) -> str:
    """The system prompt of plain questions, by its name in `SYSTEM_PROMPTS` or as text. It describes a run's tools and
    no others.

    Args:
        offered: The settings `tools` and `mcp_servers` together.
        tools: Makes the tools. It is called only if their descriptions are needed, since making them can take long.
        tags: Whether the tools are called by tags. Otherwise the chat template describes them.

    Raises:
        ToolSpecError: As for `tags_system_prompt`.
    """
    if not offered:
        return f"{_STEPS} {_ANSWER}"
    if not tags:
        return "tools"
    return "reasoning" if list(offered) in _OF_REASONING else tags_system_prompt(tools())


def _sentence(text: str) -> str:
    """The text in one line, ending with a full stop."""
    line = " ".join(text.split())
    return line if line.endswith((".", "!", "?")) else f"{line}."
