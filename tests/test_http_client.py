"""The client understands when a server allows a retry, and limits the time of a request."""

from __future__ import annotations

import gzip
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from arpo_trl.common.per_process import one_per_process
from arpo_trl.errors import ConfigError
from arpo_trl.net import http_client
from arpo_trl.net.chat_model import ChatModel
from arpo_trl.net.http_client import (
    MAX_JSON_BYTES,
    MAX_PIECES,
    RequestFailed,
    _client,
    _retry_after_s,
    fetch,
    fetch_json,
)
from arpo_trl.tools.search.cache import SearchCache
from arpo_trl.tools.search.providers import make_provider
from arpo_trl.tools.search.web import WebSearch
from loopback import Loopback, Reply


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("", None),
        ("soon", None),
        ("2", 2.0),
        ("0.5", 0.5),
        ("-3", 0.0),
        ("inf", 86400.0),
        ("nan", 86400.0),
    ],
)
def test_retry_after_in_seconds(value: str | None, seconds: float | None) -> None:
    assert _retry_after_s(value) == seconds


def test_retry_after_as_a_date() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    assert _retry_after_s(soon) == pytest.approx(60, abs=5)
    assert _retry_after_s("Thu, 01 Jan 1970 00:00:00 GMT") == 0.0


@pytest.mark.parametrize(
    "value", ["Thu, 01 Jan 99999999999999999999 00:00:00 GMT", "Thu, 01 Jan 1970 00:00:00 +99999999999999999999"]
)
def test_retry_after_as_a_date_that_there_cannot_be(value: str) -> None:
    assert _retry_after_s(value) is None


@pytest.mark.parametrize(
    ("status", "may_pass"),
    [(None, True), (408, True), (429, True), (503, True), (200, False), (404, False), (401, False)],
)
def test_which_failures_may_pass(status: int | None, may_pass: bool) -> None:
    assert RequestFailed("x", status=status).may_pass is may_pass


def test_a_server_that_drips_its_headers_is_left_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            connection, _ = listener.accept()
            with connection:
                for byte in b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 3000:
                    try:
                        connection.sendall(bytes([byte]))
                    except OSError:
                        return
                    time.sleep(0.02)

        threading.Thread(target=drip, daemon=True).start()
        start = time.monotonic()
        with pytest.raises(RequestFailed, match=r"no complete answer within 0\.5 s"):
            fetch(httpx.Request("GET", f"http://127.0.0.1:{listener.getsockname()[1]}/"), timeout_s=0.5)
        assert time.monotonic() - start < 30


def test_what_is_no_http_is_a_failed_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def babble() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH\r\n" * 10)

        threading.Thread(target=babble, daemon=True).start()
        with pytest.raises(RequestFailed, match="the connection failed"):
            fetch(httpx.Request("GET", f"http://127.0.0.1:{listener.getsockname()[1]}/"), timeout_s=60)


@pytest.mark.parametrize("pooled", [True, False])
def test_no_cookie_is_kept(pooled: bool) -> None:
    with Loopback(lambda asked: Reply("x", headers={"Set-Cookie": f"c{len(asked.path)}=1; Path=/"})) as server:
        for path in ("/a", "/bc"):
            request = httpx.Request("GET", server.url + path)
            fetch(request, timeout_s=5, max_bytes=10, pooled=pooled)
    assert len(_client(pooled).cookies.jar) == 0


def chat_model(folder: Path) -> object:
    return ChatModel(url="http://127.0.0.1:9/v1", model="m", key_variable="UNSET_KEY", setting="judge_url")


def web_search(folder: Path) -> object:
    return WebSearch(make_provider("searxng", url="http://127.0.0.1:9"), SearchCache(folder / "cache.sqlite"))


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("all_proxy", "socks5://127.0.0.1:9", r"a SOCKS proxy, .*: pip install 'httpx\[socks\]'"),
        ("all_proxy", "gopher://user:planted@127.0.0.1:9", "a proxy, .* that is not an http, https, socks5 or"),
        ("all_proxy", "http://planted:x", "a proxy, .* that is not an http, https, socks5 or"),
        ("SSL_CERT_FILE", "/absent.pem", r"SSL_CERT_FILE or SSL_CERT_DIR names cannot be read \(FileNotFoundError\)"),
    ],
)
@pytest.mark.parametrize("make", [chat_model, web_search])
def test_a_proxy_or_certificates_that_cannot_be_used_are_an_error_at_the_start(
    make: Callable[[Path], object],
    variable: str,
    value: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, value)
    monkeypatch.setitem(sys.modules, "socksio", None)  # not installed
    monkeypatch.setattr(http_client, "_client", one_per_process(http_client._client.__wrapped__))  # a new client
    with pytest.raises(ConfigError, match=message) as error:
        make(tmp_path)
    assert "planted" not in str(error.value)


def test_redirects_are_not_followed() -> None:
    with Loopback(lambda asked: Reply("", 302, {"Location": "/elsewhere"})) as server:
        assert fetch(httpx.Request("GET", server.url), timeout_s=60).status == 302
        with pytest.raises(RequestFailed, match="answered 302"):
            fetch_json(httpx.Request("GET", server.url), timeout_s=60)
    assert len(server.asked) == 2


GZIP_HEADER, EMPTY_BLOCK = gzip.compress(b"", mtime=0)[:10], b"\0\0\0\xff\xff"


def in_pieces(piece: bytes, number: int) -> Callable[[Any], None]:
    return lambda file: file.write((b"%x\r\n%b\r\n" % (len(piece), piece)) * number)


@pytest.mark.parametrize(("coding", "start", "piece"), [("identity", b"x", b"x"), ("gzip", GZIP_HEADER, EMPTY_BLOCK)])
def test_an_answer_in_too_many_pieces_is_an_error(coding: str, start: bytes, piece: bytes) -> None:
    """Of gzip's empty blocks none adds a byte to the answer."""

    def write(file: Any) -> None:
        in_pieces(start, 1)(file)
        in_pieces(piece, MAX_PIECES + 10)(file)

    reply = Reply(stream=write, headers={"Transfer-Encoding": "chunked", "Content-Encoding": coding})
    with Loopback(lambda asked: reply) as server, pytest.raises(RequestFailed, match=f"in more than {MAX_PIECES:,} "):
        fetch(httpx.Request("GET", server.url), timeout_s=60)


def test_an_encoding_that_takes_minutes_is_not_used() -> None:
    body = b'{"a": "' + b"x" * 200_000 + b'-9"}'
    for stated in ("punycode", "idna", "no-such", "rot13"):
        headers = {"Content-Type": f"application/json; charset={stated}"}
        with Loopback(lambda asked, headers=headers: Reply(body, headers=headers)) as server:
            assert len(fetch_json(httpx.Request("GET", server.url), timeout_s=60)["a"]) == 200_002


def test_an_answer_in_gzip_is_read() -> None:
    body = gzip.compress(b"iron " * 10_000)
    with Loopback(lambda asked: Reply(body, headers={"Content-Encoding": "gzip"})) as server:
        answer = fetch(httpx.Request("GET", server.url), timeout_s=60)
        assert server.asked[0].headers["accept-encoding"] == "gzip"
    assert answer.body == b"iron " * 10_000


@pytest.mark.parametrize(
    "body",
    [
        gzip.compress(b"iron " * 9)[:-9],
        gzip.compress(b"a") + gzip.compress(b"b"),
        gzip.compress(b"a") + bytes(1 << 20),
    ],
    ids=["cut", "two", "zeros after it"],
)
def test_an_answer_in_gzip_of_which_a_part_would_be_lost_is_an_error(body: bytes) -> None:
    reply = Reply(body, headers={"Content-Encoding": "gzip"})
    with Loopback(lambda asked: reply) as server, pytest.raises(RequestFailed, match="broken gzip"):
        fetch(httpx.Request("GET", server.url), timeout_s=60)


def test_an_empty_answer_may_be_called_gzip() -> None:
    with Loopback(lambda asked: Reply(b"", headers={"Content-Encoding": "gzip"})) as server:
        assert fetch(httpx.Request("GET", server.url), timeout_s=60).body == b""


def test_json_that_is_too_long_or_too_deep_is_an_error() -> None:
    for body, message in (
        ("[" + "0," * MAX_JSON_BYTES + "0]", f"more than {MAX_JSON_BYTES:,} bytes"),
        ("[" * 200_000 + "]" * 200_000, "not JSON"),
        ("1" * 100_000, "not JSON"),
    ):
        with Loopback(lambda asked, body=body: Reply(body)) as server, pytest.raises(RequestFailed, match=message):
            fetch_json(httpx.Request("GET", server.url), timeout_s=60)
