"""`retry`: stamina's decorator, without its log line for each further attempt.

The line, "stamina.retry_scheduled", names neither the function nor the error. If the last attempt fails, the function
raises its error, which the caller reports.
"""

from __future__ import annotations

import logging

from stamina import retry

__all__ = ["retry"]


def _is_of_others(record: logging.LogRecord) -> bool:
    return not str(getattr(record, "stamina.callable", "")).startswith("arpo_trl.")


logging.getLogger("stamina").addFilter(_is_of_others)
