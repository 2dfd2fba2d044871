r"""System prompts, all of them, by name.

`reasoning` and `deepsearch` teach the tags of `TagProtocol`: a tool's name is its tag, results come back in
`<result>`; `tags_system_prompt` does so for tools of your own. `tools` is for `tool_protocol: chat_template`, whose
template shows the tools itself. With all of them the answer stands in `<answer>` within `\boxed{}`, which is what the
reward's format check and `extract_answer` look for.
"""

from collections.abc import Callable, Sequence
from typing import Any

from arpo_trl.errors import ToolSpecError
from arpo_trl.tools.toolbox import tool_spec

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


_TAGS = _form(
    "<search>a query</search> to look something up.",
    "<python>code</python> to compute; print what you want to see.",
)

SYSTEM_PROMPTS: dict[str, str] = {
    "reasoning": "Solve the task step by step. You can search an encyclopedia and run Python code." + _TAGS,
    "deepsearch": (
        "Answer the question by research. You can search the web, where a result may hold text from the pages found, "
        "and run Python code. Break the question into parts, follow leads over several searches, and check what you "
        "find against a second source before you rely on it."
    )
    + _TAGS,
    "tools": "Solve the task step by step. Call the tools as often as you need. " + _ANSWER,
}
"""`reasoning`: mathematics and questions of fact, with local search. `deepsearch`: many searches on the live web.
`tools`: either, when the chat template says how tools are called."""


def tags_system_prompt(tools: Sequence[Callable[..., Any]]) -> str:
    """A system prompt that describes `tools`, by their docstrings, and the tags of `TagProtocol`.

    Raises:
        ToolSpecError: A tool cannot be offered by tags.
    """
    calls = []
    for spec in map(tool_spec, tools):
        name, parameter, function = spec.name, spec.single_text_parameter, spec.schema["function"]
        if parameter is None:
            raise ToolSpecError(
                f"The tool {name!r} takes {list(spec.parameters)}; between two tags there is room for exactly one "
                'required `str` argument. Give it one, or set tool_protocol "chat_template".'
            )
        about = function["parameters"]["properties"][parameter]["description"]
        calls.append(f"<{name}>{parameter}</{name}>: {_sentence(function['description'])} {parameter}: {about}")
    return "Solve the task step by step. You can call tools." + _form(*calls)


def _sentence(text: str) -> str:
    """The text in one line, with a full stop."""
    line = " ".join(text.split())
    return line if line.endswith((".", "!", "?")) else f"{line}."
