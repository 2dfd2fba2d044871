"""HTTP requests to servers that may be slow or hostile: one deadline for the whole exchange, and limits on its size.

Errors do not quote a request or an answer, because both can contain keys. Limits bound the cost of an answer: its
bytes after decompression and those that follow compressed data, and its number of pieces, since each piece costs about
30 µs and may contain a single byte.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, TypeVar

import httpx

from arpo_trl.common.per_process import one_per_process
from arpo_trl.common.retries import retry
from arpo_trl.errors import ConfigError
from arpo_trl.net import background

MAX_BYTES = 8 << 20
MAX_JSON_BYTES = 2 << 20
MAX_PIECES = 1 << 14
"""Half a second of work. 8 MiB arrive in 6,000 pieces if each piece is one network packet."""
_MAX_AFTER_GZIP_BYTES = 1 << 16
_SLOW_ENCODINGS = ("punycode", "idna")
"""Their time grows with the square of the length: minutes for an answer."""
_CODINGS = ("", "identity", "gzip", "x-gzip")
_HEADERS = {"User-Agent": "arpo-trl", "Accept-Encoding": "gzip"}
_GRACE_S = 1.0
_ERROR_BYTES = 4096
_ACCOUNT_WORDS = re.compile(
    r"(?<!unexpected )(?<!many )(?<!max )(?<!maximum )(?<!of )tokens?\b(?! (?:limit|at|in) )|\bkeys?\b|apikey"
    r"|\bcredits?\b|\bquota|\bbilling|\bsubscription|\bunauthori[sz]ed|\bnot authori[sz]ed|\bauthori[sz]ation"
    r"|authenticat|\bcredentials?\b|\bsecret\b|\bpermissions?\b|\baccounts?\b|\blicen[cs]e|\btrial\b|\bfree tier\b"
    r"|\bplan\b|\b(?:usage|rate|daily|monthly|request) limit|\bbalance\b|\bfunds\b|\bpayment|\bsuspended|\bzone\b"
    r"|\b(?:customer|organi[sz]ation|client id)\b"
)
"""Words in the errors of services that reject an account. Some of them return the status of a bad request."""
_ATTEMPTS = 3

T = TypeVar("T")


class RequestFailed(Exception):
    """A request without a usable answer. The message contains no address and no content.

    Args:
        status: The HTTP status of the answer; None if there was none.
        retry_after_s: The seconds after which the server requests a retry.
        about_account: Whether the answer mentions the API key, or the credits or quota of the account.
        connected: Whether the request may have reached the server.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        retry_after_s: float | None = None,
        about_account: bool = False,
        connected: bool = True,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self.about_account = about_account
        self.connected = connected

    @property
    def may_pass(self) -> bool:
        """Whether a retry can succeed: there was no answer, or its status is 408, 429 or a server error."""
        return self.status is None or self.status in (408, 429) or self.status >= 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A complete HTTP response, of any status."""

    status: int
    headers: httpx.Headers
    body: bytes

    @property
    def encoding(self) -> str | None:
        """Python's name of the encoding that the server states; None if it states none that is known."""
        stated = httpx.Response(200, headers=self.headers).charset_encoding
        try:
            name = None if stated is None else codecs.lookup(stated).name
        except (LookupError, ValueError):
            return None
        return None if name in _SLOW_ENCODINGS else name


def check_client(*, pooled: bool = True) -> None:
    """Check that `fetch` can use the proxies and the certificates that the environment names.

    Raises:
        ConfigError: A proxy needs a package that is not installed, or has no valid address, or the certificates cannot
            be read.
    """
    _client(pooled)


def fetch(request: httpx.Request, *, timeout_s: float, max_bytes: int = MAX_BYTES, pooled: bool = True) -> Answer:
    """Return the server's answer to `request`, without following redirects. Blocks; thread-safe.

    Args:
        timeout_s: The deadline for the whole exchange, from connecting to the last byte.
        max_bytes: The maximum size of the body, after decompression.
        pooled: Use the environment's proxies and reuse open connections. False if `request` contains a checked IP
            address.

    Raises:
        ConfigError: See `check_client`.
        RequestFailed: There was no complete answer within these limits.
    """
    for name, value in _HEADERS.items():  # the client adds defaults only to requests that it builds
        request.headers.setdefault(name, value)
    future = background.start(_exchange(request, timeout_s, max_bytes, pooled))
    try:
        return future.result(timeout_s + _GRACE_S)
    except TimeoutError:
        raise _too_late(timeout_s) from None
    finally:
        future.cancel()


def fetch_json(request: httpx.Request, *, timeout_s: float, sent: str = "") -> Any:
    """Return the decoded JSON of a successful answer.

    Args:
        sent: Text of the request that an error may quote. Its words do not count for `RequestFailed.about_account`.

    Raises:
        RequestFailed: There was no answer, its status is not 200, or it is not JSON.
    """
    answer = fetch(request, timeout_s=timeout_s, max_bytes=MAX_JSON_BYTES)
    if answer.status != 200:
        retry_after = _retry_after_s(answer.headers.get("retry-after"))
        redirect = ", a redirect, which is not followed" if 300 <= answer.status < 400 else ""
        raise RequestFailed(
            f"answered {answer.status}{redirect}",
            status=answer.status,
            retry_after_s=retry_after,
            about_account=mentions_account(answer.body[:_ERROR_BYTES].decode("utf-8", "replace"), sent),
        )
    try:
        return json.loads(_text(answer))
    except (ValueError, RecursionError):
        kind = "a web page instead of JSON" if answer.body.lstrip()[:1] == b"<" else "something that is not JSON"
        raise RequestFailed(f"answered with {kind}", status=200) from None


def _text(answer: Answer) -> str:
    """Return the text of an answer, in the encoding that it states or, as JSON is, in UTF-8, UTF-16 or UTF-32."""
    with contextlib.suppress(LookupError, UnicodeError):  # not an encoding of text, or not that of the body
        if (encoding := answer.encoding) is not None and answer.body[:3] != codecs.BOM_UTF8:
            return answer.body.decode(encoding)
    return answer.body.decode(json.detect_encoding(answer.body), "replace")


def mentions_account(text: str, sent: str) -> bool:
    """Return whether an error is about the API key or the account. Words that `sent` has do not count."""
    return bool(_account_words(text) - _account_words(sent))


def _account_words(text: str) -> set[str]:
    return set(_ACCOUNT_WORDS.findall(text.lower().replace("_", " ")))


def retried(ask: Callable[[], T], left_s: Callable[[], float]) -> T:
    """Return the result of `ask`, with up to three attempts if its failure may be temporary and `left_s` allows a
    wait.

    Args:
        left_s: Returns the remaining seconds of the call.

    Raises:
        RequestFailed: `ask` failed permanently, or in every attempt.
    """

    def pause(error: Exception) -> bool | float:
        if not isinstance(error, RequestFailed) or not error.may_pass:
            return False
        if error.retry_after_s is None:
            return left_s() > 1.0
        return error.retry_after_s if error.retry_after_s < left_s() else False

    @retry(on=pause, attempts=_ATTEMPTS, timeout=None, wait_initial=0.25, wait_max=4.0, wait_jitter=0.25)
    def attempt() -> T:
        return ask()

    return attempt()


def without(secret: str, text: str) -> str:
    """Return `text` with every `secret` replaced by a mark. Servers may quote the key that they received."""
    return text.replace(secret, "[key]") if secret else text


def _too_late(timeout_s: float) -> RequestFailed:
    # Rounded, so that differences of milliseconds in the remaining time do not change the text for the model.
    return RequestFailed(f"no complete answer within {round(timeout_s, 1):g} s")


async def _exchange(request: httpx.Request, timeout_s: float, max_bytes: int, pooled: bool) -> Answer:
    client = _client(pooled)
    try:
        async with asyncio.timeout(timeout_s):
            response = await client.send(request, stream=True)
            status = response.status_code
            try:
                return Answer(status=status, headers=response.headers, body=await _body(response, max_bytes))
            finally:
                await response.aclose()
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise RequestFailed(f"the connection failed ({type(error).__name__})", connected=False) from None
    except (TimeoutError, httpx.TimeoutException):
        raise _too_late(timeout_s) from None
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError, ValueError) as error:
        # The messages of these errors can quote headers and addresses. Their types are enough.
        raise RequestFailed(f"the connection failed ({type(error).__name__})") from None


async def _body(response: httpx.Response, max_bytes: int) -> bytes:
    coding, status = response.headers.get("content-encoding", "").lower(), response.status_code
    if coding not in _CODINGS:
        raise RequestFailed("answered in an unsupported compression", status=status)
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 16) if coding.endswith("gzip") else None
    body, pieces = bytearray(), 0
    async for piece in response.aiter_raw():
        pieces += 1
        try:
            # One byte more than the limit is enough to detect an excess. A piece may expand a thousandfold.
            body += inflater.decompress(piece, max_bytes + 1 - len(body)) if inflater else piece
        except zlib.error:
            raise RequestFailed("answered with broken gzip", status=status) from None
        if len(body) > max_bytes:
            raise RequestFailed(f"answered with more than {max_bytes:,} bytes", status=status)
        if inflater and len(inflater.unused_data) > _MAX_AFTER_GZIP_BYTES:
            raise RequestFailed("answered with broken gzip", status=status)
        if pieces > MAX_PIECES:
            raise RequestFailed(f"answered in more than {MAX_PIECES:,} pieces", status=status)
    if inflater and pieces and (inflater.unused_data.strip(b"\0") or not inflater.eof):
        raise RequestFailed("answered with broken gzip", status=status)
    return bytes(body)


@one_per_process
def _client(pooled: bool) -> httpx.AsyncClient:
    """Return this process's HTTP client, for its background loop."""
    try:
        verify = httpx.create_ssl_context()  # of SSL_CERT_FILE or SSL_CERT_DIR, also without `trust_env`
    except OSError as error:
        raise ConfigError(
            f"The certificates that SSL_CERT_FILE or SSL_CERT_DIR names cannot be read ({type(error).__name__}). "
            "Correct or unset the variable."
        ) from None
    try:
        return httpx.AsyncClient(
            timeout=None,  # `_exchange` sets one deadline for the whole exchange
            trust_env=pooled,
            verify=verify,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),  # no server leaves anything for later requests
            # The certificate of an open connection was checked for one host name, not for others at the same address.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=32 if pooled else 0),
        )
    except ImportError:
        raise ConfigError(
            "The environment names a SOCKS proxy, such as in ALL_PROXY, which needs a further package: "
            "pip install 'httpx[socks]'. Or unset the variable."
        ) from None
    except (ValueError, httpx.InvalidURL):  # its message may contain the proxy's password
        raise ConfigError(
            "The environment names a proxy, such as in ALL_PROXY, that is not an http, https, socks5 or socks5h "
            "address. Correct or unset the variable."
        ) from None


def _retry_after_s(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header, which contains seconds or a date."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except (ValueError, OverflowError):
            return None
        seconds = ((date if date.tzinfo else date.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if seconds < 86_400 else 86_400.0  # this also replaces nan
