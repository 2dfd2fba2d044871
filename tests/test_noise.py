"""Irrelevant messages of other packages are hidden, and no others."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import stamina
import torch

from arpo_trl.common.noise import LOGGED, hide_noise
from arpo_trl.net.http_client import RequestFailed, retried


class Kept(logging.Handler):
    """Keeps the messages of the logger `name`, from its entry to its exit."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.logger, self.messages = logging.getLogger(name), list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def __enter__(self) -> Kept:
        self.logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self)


@pytest.mark.parametrize("name", LOGGED)
def test_a_message_about_a_missing_accelerator_is_hidden_if_there_is_none(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_noise()
    with Kept(name) as kept:
        for there in (False, True):
            monkeypatch.setattr(torch.accelerator, "is_available", lambda there=there: there)
            kept.logger.warning(f"{LOGGED[name]}.")
            kept.logger.warning("Something else.")
    assert kept.messages == ["Something else.", f"{LOGGED[name]}.", "Something else."]


@pytest.mark.parametrize(
    ("message", "is_shown"),
    [
        ("`gradient_checkpointing` is deprecated and will be removed in v6. Use `activation_checkpointing`.", False),
        ("`is_gradient_checkpointing` is deprecated and will be removed in v6.", False),
        ("`learning_rate` is deprecated.", True),
    ],
)
def test_warnings_about_names_that_trl_uses_are_hidden(message: str, is_shown: bool) -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        hide_noise()
        warnings.warn(message, FutureWarning, stacklevel=1)
    assert [str(each.message) for each in shown] == [message] * is_shown


@pytest.mark.parametrize(
    ("package", "file", "logger"),
    [
        ("deepspeed", "accelerator/real_accelerator.py", "DeepSpeed"),
        pytest.param("vllm", "triton_utils/importing.py", "vllm.triton_utils.importing", marks=pytest.mark.vllm),
    ],
)
def test_the_packages_still_log_these_messages(package: str, file: str, logger: str) -> None:
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    assert LOGGED[logger] in (Path(spec.origin).parent / file).read_text("utf-8")


def test_the_warning_about_pinned_memory_is_hidden() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        hide_noise()
        warnings.warn("'pin_memory' argument is set as true but no accelerator is found, then", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    # Without those of objects that are collected meanwhile
    assert [str(each.message) for each in seen if each.category is UserWarning] == ["something else"]


def fail_once() -> Callable[[], str]:
    """A function that fails in its first call."""
    failures = [RequestFailed("busy", status=503, retry_after_s=0.0)]

    def ask() -> str:
        if failures:
            raise failures.pop()
        return "answer"

    return ask


def test_a_retry_of_ours_is_not_logged_and_one_of_the_users_code_is() -> None:
    with Kept("stamina") as kept:
        assert retried(fail_once(), lambda: 60.0) == "answer"
        assert kept.messages == []
        at_once = stamina.retry(on=RequestFailed, attempts=2, wait_initial=0.0, wait_jitter=0.0)
        assert at_once(fail_once())() == "answer"
    assert kept.messages == ["stamina.retry_scheduled"]
