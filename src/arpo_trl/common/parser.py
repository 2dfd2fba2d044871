"""TRL's parser of settings, with errors of one line and the texts of `MEANINGS` in its help."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NoReturn

from trl import TrlParser

from arpo_trl.common.flags import NUMBERS
from arpo_trl.common.trl_settings import MEANINGS
from arpo_trl.errors import ConfigError

_NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$|-inf(inity)?$", re.IGNORECASE)
"""Words that are values although they begin with -. argparse takes -1e-5 for a flag."""


class SettingsParser(TrlParser):
    """TRL's parser without abbreviated flags. It raises an error instead of printing all flags and exiting."""

    def __init__(self, kinds: Sequence[type[Any]], **parser: Any):
        super().__init__(kinds, allow_abbrev=False, **parser)
        self._negative_number_matcher = _NEGATIVE_NUMBER
        for action in self._actions:
            action.help = MEANINGS.get(action.dest, action.help)

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError with `message`. If it is about a value, the message is reworded in this package's
        style."""
        wrong = re.fullmatch(r"argument --([\w-]+)\S*: invalid (\S+) value: (.+)", message, re.DOTALL)
        if missing := re.fullmatch(r"argument --([\w-]+)\S*: expected one argument", message):
            raise ConfigError(f"{missing[1].replace('-', '_')} is set without a value.")
        if wrong is None:
            raise ConfigError(message.replace("argument --", "", 1))
        name, kind, value = wrong.groups()
        raise ConfigError(f"{name.replace('-', '_')} is {value}; expected {NUMBERS.get(kind, kind)}.")
