"""The records of a rollout that code outside the package makes or receives."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from inspect import isabstract
from types import ModuleType

import pytest

from arpo_trl.rollout import build, sampler, tree
from arpo_trl.rollout.engines import base as engines
from arpo_trl.rollout.engines import scripted
from arpo_trl.rollout.protocols import base as protocols
from arpo_trl.rollout.rules import RULES
from arpo_trl.rollout.rules import base as rules


def public_records(module: ModuleType) -> list[type]:
    """The public dataclasses that `module` defines."""
    return [
        kind
        for name, kind in vars(module).items()
        if is_dataclass(kind) and kind.__module__ == module.__name__ and not name.startswith("_")
    ]


RECORDS = [
    *(
        record
        for module in (build, engines, protocols, rules, sampler, scripted, tree)
        for record in public_records(module)
    ),
    *(RULES.get(name) for name in RULES.own),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_a_public_record_takes_its_fields_by_name_and_shows_an_example(record):
    assert all(field.kw_only for field in fields(record))
    example = f"({record.__name__})" if isabstract(record) else f"{record.__name__}("
    assert example in record.__doc__
