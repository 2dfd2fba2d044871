r"""System prompts, all of them, by name.

`reasoning` and `deepsearch` teach the tags of `TagProtocol`: a tool's name is its tag, results come back in
`<result>`. `tools` is for `tool_protocol: chat_template`, whose template shows the tools itself. With all of them the
answer stands in `<answer>` within `\boxed{}`, which is what the reward's format check and `extract_answer` look for.
"""

_ANSWER = r"""Finish with <answer>a short conclusion, \boxed{the answer}</answer>.
Give exactly one answer, with nothing after it, and only the answer itself inside \boxed{}."""

_TAGS = rf"""

Write in this form:
- <think>your reasoning</think> before each step.
- <search>a query</search> to look something up.
- <python>code</python> to compute; print what you want to see.
- After a call, stop. Its result is shown to you as <result>…</result>; never write that tag yourself.
- Use as many steps as you need.
{_ANSWER}"""

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
