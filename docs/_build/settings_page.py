"""Writes docs/settings.md, the page of all settings, from the code: `python docs/_build/settings_page.py`."""

from __future__ import annotations

import copy
import dataclasses
import html
import re
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from trl import GRPOConfig, ModelConfig, SFTConfig

from arpo_trl.common.settings import JudgeArguments, Range, ToolLimits, default_of, help_of
from arpo_trl.config import ARPOConfig
from arpo_trl.evaluation.settings import EvalSettings
from arpo_trl.scripts.sft import ColdStartArguments
from arpo_trl.scripts.train import TrainArguments
from arpo_trl.tools.builtin import ToolArguments

PAGE = Path(__file__).parents[1] / "settings.md"
HEAD = """\
# Every setting

Generated from the code by `python docs/_build/settings_page.py`. A setting is a key of the YAML file that `--config`
names, a flag (`--name value`), or a field of the class in Python. Flags win over the file, and an unknown name is an
error. `train.py` takes all settings of the sections that name it.

[from-grpo.md](from-grpo.md#defaults-that-differ) lists the defaults that differ from TRL's, with the reasons.
"""
OURS: tuple[tuple[str, str, tuple[type[Any], ...]], ...] = (
    ("Trees, batches and credit", "`train.py`; `ARPOConfig`.", (ARPOConfig,)),
    ("Calls of tools", "`train.py`, `arpo-trl eval`; `ARPOConfig`.", (ToolLimits,)),
    ("Data and scoring", "`train.py`.", (TrainArguments,)),
    ("The judge", "`train.py`, `arpo-trl eval`.", (JudgeArguments,)),
    ("Built-in tools", "`train.py`, `arpo-trl eval`.", (ToolArguments,)),
    ("Demonstrations", "`sft.py`.", (ColdStartArguments,)),
    ("Evaluation", "`arpo-trl eval`, where `-` may stand for `_`.", (EvalSettings,)),
)


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, used_by, kinds in OURS:
        parts.append(
            section(title, f"Ours. {used_by}", [row for kind in kinds for row in own_fields(kind)], whole=True)
        )
    trl, transformers = version("trl"), version("transformers")
    theirs = [field for field in own_fields(GRPOConfig) if field.name not in ARPOConfig.__annotations__]
    parts.append(section(f"TRL {trl}: GRPO", "TRL's. `train.py`; `ARPOConfig`.", theirs))
    parts.append(section(f"TRL {trl}: the model", "TRL's. `train.py`, `sft.py`.", own_fields(ModelConfig)))
    parts.append(section(f"TRL {trl}: SFT", "TRL's. `sft.py`.", own_fields(SFTConfig)))
    inherited = [field for field in own_fields(TrainingArguments, GRPOConfig) if field.name not in changed()]
    parts.append(section(f"transformers {transformers}", "transformers'. `train.py`, `sft.py`.", inherited))
    return "\n".join(parts)


def changed() -> set[str]:
    """Settings of transformers that are listed in another section, because their default differs there."""
    return {*ARPOConfig.__annotations__, *GRPOConfig.__annotations__}


def own_fields(kind: type[Any], subclass: type[Any] | None = None) -> list[dataclasses.Field[Any]]:
    """The fields that a dataclass itself defines, in their order; with the defaults of its subclass, if one is given.

    TRL changes defaults of transformers in a base class of its configurations.
    """
    own = kind.__annotations__
    by_name = {field.name: copy.copy(field) for field in dataclasses.fields(subclass or kind)}
    for name in own.keys() & by_name.keys():
        by_name[name].type = own[name]  # transformers' parser of arguments changes the type of a field
    return [by_name[name] for name in own if name in by_name]


def section(title: str, used_by: str, fields: Iterable[dataclasses.Field[Any]], *, whole: bool = False) -> str:
    """A table. Unless `whole`, only the first sentences of each setting's text are shown."""
    head = [f"## {title}\n", f"{used_by}\n", "| name | default | values | meaning |", "|---|---|---|---|"]
    rows = []
    for field in fields:
        text = meaning(field)
        shown = in_table(text if whole else first_sentences(text))
        rows.append(f"| `{field.name}` | {default(field)} | {values(field)} | {shown} |")
    return "\n".join([*head, *rows, ""])


def default(field: dataclasses.Field[Any]) -> str:
    value = default_of(field)
    if value is dataclasses.MISSING:
        return "required"
    value = getattr(value, "value", value)  # of an enum
    return f"`{value!r}`".replace("|", "\\|")


def values(field: dataclasses.Field[Any]) -> str:
    """The choices, else the range with its unit, else the type."""
    if choices := field.metadata.get("choices"):
        return ", ".join(f"`{getattr(choice, 'value', choice)}`" for choice in choices)
    limits: Range | None = field.metadata.get("range")
    if limits is not None and (text := str(limits)):
        return f"{kind(field)}, {text}"
    return kind(field)


def kind(field: dataclasses.Field[Any]) -> str:
    text = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    return " or ".join(f"`{one}`" for one in re.sub(r"\b(?:\w+\.)+", "", text).split(" | "))


def meaning(field: dataclasses.Field[Any]) -> str:
    """The text of `--help`, without the range, which has its own column."""
    text = help_of(field)
    limits = str(field.metadata.get("range", ""))
    return text.removesuffix(f" {limits[:1].upper()}{limits[1:]}.") if limits else text


def first_sentences(text: str, at_most: int = 240) -> str:
    """As many whole sentences as fit, and at least one."""
    sentences = re.split(r"(?<=[.!?]) (?=[A-Z`\"'])", text)
    kept = sentences[0]
    for sentence in sentences[1:]:
        if len(kept) + len(sentence) > at_most:
            break
        kept += f" {sentence}"
    return kept


_NAMES = re.compile(r"https?://\S+|</?\w+>(?:…</\w+>|/\w+)?|'(\w+)'|\w[\w.]*_[\w…]*(?:\.\w+)*(?::\w+)?|\w[\w.]*\.[A-Z_]+\b")


def in_table(text: str) -> str:
    """Text for a cell: tags, and names with an underscore or in quotes as code; nothing that Markdown would read."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [
        _NAMES.sub(lambda found: found[0] if "://" in found[0] else f"`{found[1] or found[0]}`", part)
        for part in parts[::2]
    ]
    parts = re.split(r"(`[^`]*`)", "".join(parts))
    parts[::2] = [html.escape(part, quote=False).replace("*", r"\*") for part in parts[::2]]
    return "".join(parts).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
