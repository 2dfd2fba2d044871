"""Describes and checks settings, and defines the settings that training and evaluation share.

A setting is a dataclass field. Its range, unit and choices are defined once, in the field's metadata:

    search_top_k: int = setting(10, "Results per search.", at_least=1)

    --help                       Results per search. At least 1.
    check_fields(settings)       search_top_k is 0; expected an integer of at least 1.

Pure: no torch, no TRL, no engine.
"""

from __future__ import annotations

import json
import math
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from datetime import date
from enum import Enum
from numbers import Integral, Real
from os import PathLike, fspath
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from arpo_trl.common.trl_settings import MEANINGS
from arpo_trl.errors import ConfigError
from arpo_trl.options import ProtocolKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """The finite numbers that a setting accepts. `unit` is a plural noun, such as "tokens".

    str(Range(at_least=16, unit="tokens"))      # "at least 16 tokens"
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    unit: str = ""

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
        )

    def __str__(self) -> str:
        """Text such as "at least 16 tokens", "more than 0 seconds" or "in [0, 1]"; empty without limits."""
        low = self.at_least if self.above is None else self.above
        if self.at_most is not None:
            start = "(-inf" if low is None else f"{'[' if self.above is None else '('}{low}"
            return f"in {start}, {self.at_most}] {self.unit}".rstrip()
        if low is None:
            return ""
        unit = self.unit.removesuffix("s") if low == 1 else self.unit
        return f"{'at least' if self.above is None else 'more than'} {low} {unit}".rstrip()


class _Metadata(Mapping[str, Any]):
    """A field's metadata. A range and choices are read by name only: iteration, and thus a copy, gives argparse's
    entries, because parsers pass a copy of the metadata to `add_argument`."""

    def __init__(self, entries: Mapping[str, Any]):
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> Any:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in ("help", "metavar") if name in self._entries)

    def __len__(self) -> int:
        return len(list(self))

    def copy(self) -> dict[str, Any]:
        return dict(self)


def setting(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    unit: str = "",
    choices: Iterable[str] = (),
) -> Any:
    """A dataclass field with its meaning and the values that `check_fields` accepts.

    Args:
        default: The default, or a function that makes it, such as `list`. MISSING: the setting has to be given.
        help: Sentences for `--help`. The range is appended.
        at_least, above, at_most: Limits of a number. `at_least` and `at_most` are inclusive.
        unit: The unit of the number, as a plural noun such as "tokens".
        choices: The accepted texts; for a list, the accepted entries.
    """
    limits = Range(at_least=at_least, above=above, at_most=at_most, unit=unit)
    text = str(limits)
    made: dict[str, Any] = {"help": f"{help} {text[0].upper()}{text[1:]}." if text else help, "range": limits}
    if names := [str(name) for name in choices]:
        made |= {"choices": names, "metavar": f"{{{','.join(names)}}}"}
    metadata = _Metadata(made)
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def default_of(each: Field[Any]) -> Any:
    """The default of a dataclass's field; MISSING if it has none."""
    return each.default if each.default_factory is MISSING else each.default_factory()


def help_of(each: Field[Any]) -> str:
    """The text of a setting for `--help`, on one line and without argparse's escapes; empty if it has none."""
    text = MEANINGS.get(each.name) or each.metadata.get("help") or ""
    return " ".join(text.split()).replace("%%", "%")


def changed(settings: Any) -> list[str]:
    """The names of the fields of a dataclass that differ from their defaults, in their order."""
    return [each.name for each in fields(settings) if getattr(settings, each.name) != default_of(each)]


def check_fields(settings: Any, inherited: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Checks that the metadata of every field of the dataclass instance `settings` accepts its value.

    A number must have the annotated type, be finite and be within its range. True and False are bools, not numbers; no
    other value is a bool. None is accepted if the annotation allows it. If "on" or "off" is a choice, True and False
    are converted to it, because YAML reads a bare `on` or `off` as a bool. False becomes "no" if the annotated enum
    has that value. A field of this package with the annotation text, or list of texts, must have that type; a path is
    converted to its text.

    A field of another package is checked if its annotation consists of types of YAML and of enums. Its value must have
    one of these types, unless it is the default, None in place of a text, or an object of a type that YAML does not
    have. Annotations of texts often omit that True, False, lists and mappings are accepted, so these are.

    Args:
        inherited: The accepted values of fields of another package's class, by the field's name: `{"range":
            Range(…)}`, `{"text": True}` or `{"options": True}`, for a mapping, or its JSON text. With `{"optional":
            True}` None is accepted, too. With `{"nothing": "none"}` None and False are converted to this text.

    Raises:
        ConfigError: A value is not accepted. Names the setting, its value, and the expected values with their unit.
    """
    hints = get_type_hints(type(settings))
    for each in fields(settings):
        given = {"text": _is_own(type(settings), each.name), **(inherited or {}).get(each.name, {})}
        metadata = ChainMap(given, each.metadata)  # type: ignore[arg-type]  # only `given` is written to
        value = getattr(settings, each.name)
        if isinstance(value, bool) and (word := "on" if value else "off") in metadata.get("choices", ()):
            setattr(settings, each.name, value := word)
        if value is False and "no" in _members(hints[each.name]):
            setattr(settings, each.name, value := "no")
        if (value is False or value is None) and "nothing" in given:
            setattr(settings, each.name, value := given["nothing"])
        if metadata["text"] and isinstance(value, PathLike):
            setattr(settings, each.name, value := fspath(value))
        if expected := _unmet(metadata, hints[each.name], value, is_default=value is each.default):
            raise ConfigError(f"{each.name} is {value!r}; expected {expected}.")


def template_arguments(given: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """The setting `chat_template_kwargs`, which a flag gives as JSON text, as a dict. `check_fields` has checked it.

    Raises:
        ConfigError: The text is not valid JSON.
    """
    if not isinstance(given, str):
        return given
    try:
        return dict(json.loads(given))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"chat_template_kwargs is not valid JSON ({error}): {given}") from error


def _is_own(kind: type, name: str) -> bool:
    """Whether this package annotates the field, and not the package of a base class."""
    owner = next(each for each in kind.__mro__ if name in vars(each).get("__annotations__", {}))
    return owner.__module__.partition(".")[0] == __name__.partition(".")[0]


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _members(hint: Any) -> list[Any]:
    """The values of the enum that an annotation names; empty if it names none."""
    return [
        member.value for kind in _kinds(hint) if isinstance(kind, type) and issubclass(kind, Enum) for member in kind
    ]


def _unmet(metadata: Mapping[str, Any], hint: Any, value: Any, *, is_default: bool) -> str | None:
    """The expected values, in words, if `value` is not accepted; None if it is."""
    kinds = _kinds(hint)
    if value is None and (NoneType in kinds or metadata.get("optional")):
        return None
    if "choices" in metadata:
        choices = list(metadata["choices"])
        if any(get_origin(kind) is list for kind in kinds):
            accepted = isinstance(value, list) and all(entry in choices for entry in value)
            return None if accepted else f"a list of some of {choices}"
        return None if value in choices else f"one of {choices}"
    if metadata.get("options"):
        accepted = isinstance(value, Mapping) or (isinstance(value, str) and value.lstrip().startswith("{"))
        return None if accepted else "a mapping, such as {option: value}"
    if metadata["text"] and set(kinds) <= {str, NoneType} and not isinstance(value, str):
        return "a text" + ("" if isinstance(value, Mapping | list | tuple) else ", in quotes")
    if metadata["text"] and set(kinds) <= {list[str], NoneType}:
        accepted = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
        return None if accepted else "a list of texts"
    kind = next((kind for kind in (bool, int, float) if kind in kinds), None)
    if kind is None or "range" not in metadata:
        return None if metadata["text"] or is_default else _unlike(hint, value)
    if kind is bool:
        return None if isinstance(value, bool) else "true or false"
    limits: Range = metadata["range"]
    numeric = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if numeric and value in limits:
        return None
    noun, text = "an integer" if kind is int else "a number", str(limits)
    if not text:
        return "a finite number" if kind is float else noun
    return f"{noun} {text}" if text.startswith("in ") else f"{noun} of {text}"


_TYPES_OF_YAML: dict[type, tuple[Any, str]] = {
    bool: (bool, "true or false"),
    int: (Integral, "an integer"),
    float: (Real, "a number"),
    str: ((str, PathLike, bool, list, tuple, Mapping), "a text"),
    list: ((list, tuple, str), "a list"),  # argparse and TRL also store a list of one text as the text
    dict: (Mapping, "a mapping"),
}
"""Types in annotations of other packages: the values that are accepted, and the name in messages."""
_YAML = (bool, Integral, Real, str, list, tuple, Mapping, date)
"""The types of the values that YAML can contain."""


def _unlike(hint: Any, value: Any) -> str | None:
    """The expected types, in words, if `value` has a type of YAML that the annotation `hint` does not accept."""
    kinds = {get_origin(kind) or kind for kind in _kinds(hint)} - {NoneType}
    members, known = _members(hint), kinds & _TYPES_OF_YAML.keys()
    if any(kind not in known and not (isinstance(kind, type) and issubclass(kind, Enum)) for kind in kinds):
        return None  # an annotation such as Any
    if value is None:  # other packages use None for a text or a list although their annotations omit it
        accepted = not {int, float} & known
    elif members:
        accepted = value in members if isinstance(value, str) else not isinstance(value, _YAML)
    else:
        accepted = not isinstance(value, _YAML) or any(
            isinstance(value, _TYPES_OF_YAML[kind][0]) and (kind in (bool, str) or not isinstance(value, bool))
            for kind in known
        )
    if accepted:
        return None
    names = [name for kind, (_, name) in _TYPES_OF_YAML.items() if kind in known]
    return f"one of {members}" if members else " or ".join(names)


@dataclass
class ToolLimits:
    """The protocol of tool calls, and their limits, in training and in evaluation."""

    tool_protocol: str = setting(
        ProtocolKind.TAGS.value,
        "How the model calls tools: 'tags' (<search>…</search>, as in the paper, for any model) or "
        "'chat_template' (in the format of the tokenizer's chat template).",
        choices=ProtocolKind,
    )
    tool_parser: str = setting(
        "auto",
        "Parser of tool calls for tool_protocol 'chat_template': 'auto' (the first one that reads back a "
        "call that the template renders), 'hermes', 'qwen3_xml', 'nemotron3', 'llama3_json', 'gpt_oss', 'glm45', "
        "'gemma4', 'lfm2', 'tokenizer' (its own response template), or the name of one of vLLM's.",
    )
    tool_timeout_s: float = setting(
        20.0,
        "Time limit of a tool call. After it the call fails, and the model reads an error.",
        above=0,
        unit="seconds",
    )
    tool_concurrency: int = setting(32, "Maximum number of tool calls that run at the same time.", at_least=1)
    max_tool_result_tokens: int | None = setting(
        None,
        "Length limit of a tool result. The model sees the head and tail of a longer one. None: no limit.",
        at_least=16,
        unit="tokens",
    )


@dataclass
class JudgeArguments:
    """The language model that judges answers, in training and in evaluation.

    Raises:
        ConfigError: Only one of `judge_url` and `judge_model` is set.
    """

    judge_url: str | None = setting(
        None,
        "OpenAI-compatible server (…/v1) of the judge. If it requires a key, set the environment variable "
        "JUDGE_API_KEY. None: only rules score answers.",
    )
    judge_model: str | None = setting(
        None, "The judge's name on that server. The paper uses Qwen/Qwen2.5-72B-Instruct."
    )
    judge_cache: str | None = setting(
        None, "JSONL file that stores the judge's verdicts for later runs. None: stored only for this run."
    )

    def __post_init__(self) -> None:
        if (self.judge_url is None) != (self.judge_model is None):
            raise ConfigError("Only one of judge_url and judge_model is set; expected both or neither.")
        if self.judge_cache is not None and self.judge_url is None:
            raise ConfigError("judge_cache is set without judge_url, so there is no judge. Set judge_url too.")
