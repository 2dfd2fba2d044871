"""Terminal control characters and invisible characters are shown as symbols in all untrusted text."""

import io
import json
import logging
import sys
from urllib.parse import quote

import pytest
from accelerate import PartialState

from arpo_trl import cli
from arpo_trl.command_line import report_errors
from arpo_trl.errors import DataError, ToolError, ToolUnavailable
from arpo_trl.visible import (
    get_logger,
    get_rank_logger,
    say,
    visible,
    visible_data,
    without_credentials,
    without_secrets,
)

OSC_52 = "\x1b]52;c;Y3VybA==\x07"  # fills the clipboard
HOSTILE = f"a{OSC_52}\x1b[2J\x9b31m\u202eb\u2066\u200bc"
SHOWN = "a␛]52;c;Y3VybA==␇␛[2J‹U+009B›31m‹U+202E›b‹U+2066›‹U+200B›c"


def test_every_c0_control_but_new_line_and_tab_is_its_picture():
    assert visible("".join(map(chr, range(32)))) == "␀␁␂␃␄␅␆␇␈\t\n␋␌␍␎␏␐␑␒␓␔␕␖␗␘␙␚␛␜␝␞␟"


def test_delete_and_every_c1_control_is_a_symbol():
    assert visible("\x7f") == "␡"
    assert visible("\x9b\x9d") == "‹U+009B›‹U+009D›"
    assert all(visible(chr(code)) == f"‹U+{code:04X}›" for code in range(0x80, 0xA0))


@pytest.mark.parametrize(
    "code",
    [
        *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C,  # the order of reading
        0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF, 0x00AD, 0x034F, 0x115F, 0x2065, 0x3164, 0xFFA0, 0x180E,  # no ink
        0x2028, 0x2029,  # more lines than there seem to be
        0xFE00, 0xE0001, 0xE0041, 0xE0100, 0xE0FFF,  # text within text
        0xFFF9, 0xD800, 0xDFFF,  # notes between the lines, halves of characters
    ],
)  # fmt: skip
def test_what_reorders_or_hides_is_its_number(code):
    assert visible(f"a{chr(code)}b") == f"a‹U+{code:04X}›b"


@pytest.mark.parametrize(
    "text", ["plain", "two\nlines\tand a tab", "naïve 中文 عربى Ω ∑ e\u0301 🙂 ❤\ufe0f \u00a0", "␛", ""]
)
def test_what_can_be_read_stays(text):
    assert visible(text) == text


def test_texts_in_lists_and_mappings_are_shown_too():
    assert visible_data([{"a\x1b": ("b\x07", 1, None)}, 2.5]) == [{"a␛": ["b␇", 1, None]}, 2.5]


def test_an_errors_quotes_are_visible_and_a_tools_message_reaches_the_model_unchanged():
    assert str(DataError(HOSTILE)) == SHOWN
    assert str(ToolError(HOSTILE)) == str(ToolUnavailable(HOSTILE)) == HOSTILE


def test_an_error_that_ends_a_command_cannot_steer_the_terminal(capsys):
    @report_errors
    def main():
        raise DataError(HOSTILE)

    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == f"DataError: {SHOWN}\n"


@pytest.mark.parametrize(
    "words",
    [
        *(["tree", "x", "--\x1b[2J"], ["tree", "x", "\x1b[2J"], ["view", "x", "--leaves", HOSTILE]),
        *([HOSTILE], ["ask", "x", "q", "a\ufe00"]),
    ],
)
def test_an_error_about_the_words_of_a_command_cannot_either(monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", ["arpo-trl", *words])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    said = capsys.readouterr().err
    assert said == visible(said) and "error: " in said


def test_what_a_command_says_cannot_steer_the_terminal_and_has_no_key(capsys):
    say(f"{HOSTILE} at http://me:hunter2@host/v1?key=abc and b\udcff.jsonl")
    assert capsys.readouterr().out == f"{SHOWN} at http://host/v1 and b‹U+DCFF›.jsonl\n"


def test_no_message_and_no_error_has_a_secret_of_the_environment(monkeypatch, capsys):
    monkeypatch.setenv("shop_password", "hunter2-and-3")
    monkeypatch.setenv("SHOP_TOKEN", "short")
    say("hunter2-and-3 and short")
    assert capsys.readouterr().out == "[key] and short\n"
    assert str(DataError("the shop received hunter2-and-3")) == "the shop received [key]"


@pytest.mark.parametrize("secret", ["postgres", "12345678", sys.executable])
def test_a_secret_that_ordinary_text_may_contain_stays(monkeypatch, secret):
    monkeypatch.setenv("SHOP_PASSWORD", secret)
    assert without_secrets(f"about {secret}") == f"about {secret}"


@pytest.mark.parametrize("secret", ['ab"cd\\ef12', "two\nlines 12", "caf\udce9-geheim"])
def test_a_secret_is_found_as_urls_json_and_python_write_it(monkeypatch, secret):
    monkeypatch.setenv("SHOP_PASSWORD", secret)
    written = [secret, json.dumps([secret], ensure_ascii=False), repr(secret)]
    written.append(f"?key={quote(secret, safe='', errors='surrogateescape')}")
    assert [without_secrets(text) for text in written] == ["[key]", '["[key]"]', "'[key]'", "?key=[key]"]


@pytest.mark.parametrize("get", [get_logger, get_rank_logger])
def test_a_message_of_our_loggers_cannot_steer_the_terminal(get):
    PartialState()  # accelerate's loggers need it
    said = io.StringIO()
    name = f"arpo_trl.tests.{get.__name__}"
    logger, handler = get(name), logging.StreamHandler(said)
    logging.getLogger(name).addHandler(handler)
    try:
        logger.warning("it said: %s", HOSTILE)
        logger.warning("100 % of it", stacklevel=1)
    finally:
        logging.getLogger(name).removeHandler(handler)
    assert said.getvalue().replace("[RANK 0] ", "") == f"it said: {SHOWN}\n100 % of it\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://host/path", "https://host/path"),
        ("https://host/path?a=1#b", "https://host/path#b"),
        ("http://user@host", "http://host"),
        ("at http://me:hunter2@host:8000/v1, not", "at http://host:8000/v1, not"),
        ("'http://me:hun/ter?2#@host/v1'", "'http://host/v1'"),
        ("http://me:hunter2@[::1/v1", "http://[::1/v1"),
        ("http://a@b@host", "http://host"),
        ("GET https://host/mcp?api_key=hunter2&b=1: 401", "GET https://host/mcp 401"),
        ("http://[::1]:8000/v1 or http://host:80/@someone", "http://[::1]:8000/v1 or http://host:80/@someone"),
        ("http:/me:hunter2@host/x.json has no", "http:/host/x.json has no"),  # as pathlib writes it
        ("https:/host/x.json?key=hunter2", "https:/host/x.json"),
        ("C:/Users/me@home", "C:/Users/me@home"),
        ("what is a@b? see http", "what is a@b? see http"),
        ("https://medium.com/@someone, is it?", "https://medium.com/@someone, is it?"),
    ],
)
def test_urls_lose_what_can_be_a_secret(text, expected):
    assert without_credentials(text) == expected


@pytest.mark.slow
def test_what_looks_like_countless_urls_takes_no_time_that_grows_with_its_square():
    """Each of 150,000 :// could be followed to the end: 7 · 10¹⁰ characters."""
    for text in ("://" * 150_000, "://a:b" * 150_000):
        assert without_credentials(text) == text


def test_errors_and_logs_lose_them_too(caplog):
    said = "http://me:hunter2@host/v1?api_key=abc is away"
    assert str(DataError(said)) == "http://host/v1 is away"
    get_logger("arpo_trl.tests.addresses").warning("%s", said)
    assert caplog.messages == ["http://host/v1 is away"]
