"""A model can visit only the public web, and reads the part of a page that matches its question."""

from __future__ import annotations

import gzip
import logging
import os
import resource
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from arpo_trl.common.per_process import one_per_process
from arpo_trl.errors import ConfigError, ToolError
from arpo_trl.net import http_client
from arpo_trl.net.chat_model import ChatModel
from arpo_trl.net.http_client import RequestFailed
from arpo_trl.tools.builtin import ToolArguments, build_tools
from arpo_trl.tools.spec import tool_spec
from arpo_trl.tools.visit.pages import (
    MAX_REDIRECTS,
    SUMMARY_KEY_VARIABLE,
    AddressGuard,
    visit_tool,
)
from arpo_trl.tools.visit.worker import of_html
from loopback import Asked, Loopback, Reply

PARAGRAPHS = [f"Filler paragraph number {i}, about nothing that anybody would ever want to know." for i in range(60)]
PARAGRAPHS[40] = "Iron melts at 1538 degrees Celsius, as measured in the laboratory."
PAGE = (
    "<html><head><title>Metals</title><script>var secret = 1;</script></head><body><nav>Home</nav><article>"
    + "".join(f"<p>{paragraph}</p>" for paragraph in PARAGRAPHS)
    + "</article></body></html>"
)


def html(body: str) -> Reply:
    return Reply(body, headers={"Content-Type": "text/html; charset=utf-8"})


def pages(asked: Asked) -> Reply:
    match asked.path:
        case "/metals":
            return html(PAGE)
        case "/plain":
            return Reply("just text", headers={"Content-Type": "text/plain"})
        case "/table":
            return Reply("a,b", headers={"Content-Type": "text/csv"})
        case "/there":
            return Reply("", 302, {"Location": "/plain"})
        case "/loop":
            return Reply("", 302, {"Location": "/loop"})
        case "/out":
            return Reply("", 302, {"Location": asked.params["to"]})
        case "/empty":
            return html("")
        case "/image":
            return Reply(b"\x89PNG", headers={"Content-Type": "image/png"})
    return Reply("", 404)


@pytest.fixture
def server() -> Iterator[Loopback]:
    with Loopback(pages) as server:
        yield server


@pytest.fixture
def visit(server: Loopback) -> Any:
    return visit_tool(allowed_hosts=[f"127.0.0.1:{server.port}"], timeout_s=60)


CAFE = "Le café à Málaga coûte 2 EUR, près de l'hôtel."
TOKYO = "東京タワーの高さは333メートルです。"


@pytest.mark.parametrize(
    ("text", "written", "stated"),
    [
        (CAFE, "latin-1", "iso-8859-1"),
        (TOKYO, "shift_jis", "shift_jis"),
        (TOKYO, "iso2022_jp", "iso-2022-jp"),
        (CAFE, "utf-16", "utf-16"),
        ("333 m", "utf-16-le", "utf-16le"),
        (CAFE, "utf-8-sig", "utf-8"),
        (CAFE, "utf-8", "iso-8859-1"),  # a default of the server, which is wrong
        (CAFE, "utf-8", "no-such"),
        ("“first” — €500", "cp1252", "iso-8859-1"),
    ],
)
@pytest.mark.parametrize("kind", ["plain", "html"])
def test_a_page_is_read_in_the_encoding_that_its_server_states(
    text: str, written: str, stated: str, kind: str
) -> None:
    body = text if kind == "plain" else f"<html><body><article><p>{text}</p></article></body></html>"
    page = Reply(body.encode(written), headers={"Content-Type": f"text/{kind}; charset={stated}"})
    with Loopback(lambda asked: page) as server:
        visit = visit_tool(allowed_hosts=[f"127.0.0.1:{server.port}"], timeout_s=60)
        assert visit(f"http://127.0.0.1:{server.port}/") == text


@pytest.mark.parametrize(("text", "encoding"), [("Столица России — Москва.", "windows-1251"), (TOKYO, "shift_jis")])
def test_a_pages_own_encoding_counts_before_a_default_of_the_server(text: str, encoding: str) -> None:
    body = f'<html><head><meta charset="{encoding}"></head><body><article><p>{text}</p></article></body></html>'
    page = Reply(body.encode(encoding), headers={"Content-Type": "text/html; charset=iso-8859-1"})
    with Loopback(lambda asked: page) as server:
        visit = visit_tool(allowed_hosts=[f"127.0.0.1:{server.port}"], timeout_s=60)
        assert visit(f"http://127.0.0.1:{server.port}/") == text


# Addresses


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://localhost/",
        "http://LOCALHOST./",
        "http://2130706433/",  # 127.0.0.1 as one number
        "http://0x7f000001/",
        "http://0177.0.0.1/",
        "http://0x7f.1/",
        "http://127.1/",
        "http://①②⑦.0.0.1/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:7f00:1]/",
        "http://169.254.169.254/latest/meta-data/",
        "http://0/",
        "http://user@8.8.8.8/",
        "http://8.8.8.8@127.0.0.1/",
        "http://8.8.8.8:22/",
        "https://8.8.8.8:80/",
        "http://8.8.8.8:99999/",
        "http://127.0.0.1#@8.8.8.8/",
        "http://127.0.0.1\\@8.8.8.8/",
        "file:///etc/passwd",
        "ftp://8.8.8.8/",
        "gopher://8.8.8.8/",
        "javascript:alert(1)",
        "//8.8.8.8/",
        "8.8.8.8",
        "http://",
        "http:///etc/passwd",
        "",
        "\0",
        "http://\ud800/",
        "http://" + "a" * 300 + ".test/",
    ],
)
def test_no_request_leaves_for_such_an_address(url: str) -> None:
    with pytest.raises(ToolError, match=r"^Error: "):
        visit_tool(timeout_s=5)(url)


def test_a_name_with_one_private_address_among_public_ones_is_refused() -> None:
    guard = AddressGuard((), lambda host, port: ["8.8.8.8", "10.0.0.1"])
    with pytest.raises(ToolError, match=r"'two-faced\.test' is not on the public internet"):
        guard.requests("http://two-faced.test/", 5.0)


def test_a_public_name_is_connected_to_by_its_address_under_its_own_name() -> None:
    asked = []

    def resolve(host: str, port: int) -> list[str]:
        asked.append((host, port))
        return ["93.184.215.14"]

    (request,) = AddressGuard((), resolve).requests("https://Example.COM/a?b=c#d", 5.0)
    assert str(request.url) == "https://93.184.215.14/a?b=c"
    assert request.headers["host"] == "example.com"
    assert request.extensions == {"sni_hostname": "example.com"}
    assert asked == [("example.com", 443)]


def test_a_name_is_resolved_once_so_that_it_cannot_change_after_the_check(server: Loopback) -> None:
    answers = iter([["127.0.0.1"], ["203.0.113.1"]])  # a second look would get another address
    visit = visit_tool(
        allowed_hosts=[f"rebinding.test:{server.port}"], resolve=lambda host, port: next(answers), timeout_s=60
    )
    assert visit(f"http://rebinding.test:{server.port}/plain") == "just text"
    assert server.asked[0].headers["host"] == f"rebinding.test:{server.port}"


def test_the_next_address_is_tried_if_one_cannot_be_reached(server: Loopback) -> None:
    def visit(*addresses: str) -> str:
        host = f"wiki.test:{server.port}"
        return visit_tool(allowed_hosts=[host], resolve=lambda *_: addresses, timeout_s=60)(f"http://{host}/plain")

    assert visit("127.0.0.2", "127.0.0.1") == "just text"  # the server listens at the second one only
    with pytest.raises(ToolError, match=r"the connection failed \(ConnectError\)"):
        visit("127.0.0.2", "127.0.0.3")
    server.answer = lambda asked: Reply("", 500)
    with pytest.raises(ToolError, match="answered 500"):
        visit("127.0.0.1", "127.0.0.2")


@pytest.mark.slow
def test_an_address_that_does_not_answer_leaves_time_for_the_next_one(server: Loopback) -> None:
    with socket.socket() as silent:  # its queue of connections is full, so that it drops the next ones
        silent.bind(("127.0.0.2", server.port))
        silent.listen(0)
        waiting = [socket.socket() for _ in range(3)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(silent.getsockname())
        host = f"wiki.test:{server.port}"
        addresses = ["127.0.0.2", "127.0.0.1"]
        visit = visit_tool(allowed_hosts=[host], resolve=lambda *_: addresses, timeout_s=10)
        assert visit(f"http://{host}/plain") == "just text"
        for one in waiting:
            one.close()


def test_the_resolution_of_a_name_times_out() -> None:
    answered = threading.Event()

    def resolve(host: str, port: int) -> list[str]:
        answered.wait(30)
        return []

    visit = visit_tool(resolve=resolve, timeout_s=0.2)
    with pytest.raises(ToolError, match=r"the name 'slow\.test' took too long to look up"):
        visit("http://slow.test/")
    answered.set()


def test_names_that_are_not_resolved_delay_no_other_tool() -> None:
    """asyncio resolves the names of other requests in at most 32 threads."""
    started, answered = threading.Semaphore(0), threading.Event()

    def resolve(host: str, port: int) -> list[str]:
        started.release()
        answered.wait(60)
        return []

    visit = visit_tool(resolve=resolve, timeout_s=60)
    with ThreadPoolExecutor(33) as pool, Loopback(pages) as server:
        hanging = [pool.submit(visit, f"http://slow{number}.test/") for number in range(33)]
        assert all(started.acquire(timeout=60) for _ in range(min(32, (os.cpu_count() or 1) + 4)))
        request = httpx.Request("GET", f"http://localhost:{server.port}/plain")
        try:
            assert http_client.fetch(request, timeout_s=30).status == 200
        finally:
            answered.set()
        assert {type(call.exception(60)) for call in hanging} == {ToolError}


def test_a_redirect_is_followed_within_the_limits(visit: Any, server: Loopback) -> None:
    assert visit(f"{server.url}/there") == "just text"


@pytest.mark.parametrize(
    "to",
    [
        "http://localhost/",
        "http://169.254.169.254/",
        "file:///etc/passwd",
        "http://[::1]:22/",
        "//10.0.0.1/x",
        "http://[",
    ],
)
def test_a_redirect_to_another_host_is_checked_again(visit: Any, server: Loopback, to: str) -> None:
    with pytest.raises(ToolError, match=r"public internet|web page|port 22|invalid address"):
        visit(f"{server.url}/out?to={to}")


def test_a_redirect_to_another_port_of_an_allowed_host_is_refused(visit: Any, server: Loopback) -> None:
    with Loopback(pages) as other, pytest.raises(ToolError, match=f"port {other.port} cannot be visited"):
        visit(f"{server.url}/out?to={other.url}/plain")
    assert other.asked == []


def test_a_certificate_has_to_be_valid_for_the_name_that_was_visited(tmp_path: Path) -> None:
    named: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(self_signed(tmp_path / "pem", "pages.test"))
    context.sni_callback = lambda connection, name, _: named.append(name)
    with Loopback(pages) as server:
        server.server.socket = context.wrap_socket(server.server.socket, server_side=True)
        visit = visit_tool(allowed_hosts=["pages.test"], resolve=lambda host, port: ["127.0.0.1"], timeout_s=60)
        with pytest.raises(ToolError, match=r"the connection failed \(ConnectError\)"):  # signed by nobody known
            visit(f"https://pages.test:{server.port}/plain")
    assert named == ["pages.test"]
    assert server.asked == []


def test_a_page_whose_certificate_the_environment_trusts_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pem = self_signed(tmp_path / "pem", "pages.test")
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    monkeypatch.setattr(http_client, "_client", one_per_process(http_client._client.__wrapped__))  # a new client
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    with Loopback(pages) as server:
        server.server.socket = context.wrap_socket(server.server.socket, server_side=True)
        visit = visit_tool(allowed_hosts=["pages.test"], resolve=lambda host, port: ["127.0.0.1"], timeout_s=60)
        assert visit(f"https://pages.test:{server.port}/plain") == "just text"


def self_signed(file: Path, name: str) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return file


def test_redirects_end(visit: Any, server: Loopback) -> None:
    with pytest.raises(ToolError, match="more than 5 redirects"):
        visit(f"{server.url}/loop")
    assert len(server.asked) == MAX_REDIRECTS + 1


# Pages


def test_the_windows_around_the_goal_are_shown(visit: Any, server: Loopback) -> None:
    whole = visit_tool(allowed_hosts=[f"127.0.0.1:{server.port}"], max_chars=1000, timeout_s=60)
    text = whole(f"{server.url}/metals", "melting point: at how many degrees does iron melt?")
    assert "Iron melts at 1538 degrees" in text
    assert len(text) <= 1000
    assert "secret" not in text


def test_the_goal_may_follow_the_address(visit: Any, server: Loopback) -> None:
    url = f"{server.url}/metals"
    assert visit(f"  {url} degrees of iron ") == visit(url, "degrees of iron")
    assert tool_spec(visit).single_text_parameter == "url"


@pytest.mark.parametrize(("path", "text"), [("/plain", "just text"), ("/table", "a,b")])
def test_other_text_is_shown_as_it_is(visit: Any, server: Loopback, path: str, text: str) -> None:
    assert visit(server.url + path) == text


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("5.9722×10<sup>24</sup> kg<sup class=ref><a>[1]</a></sup>", "5.9722×10^24 kg[1]"),
        ("10<sup>−9</sup> <i>m</i><sup>2</sup> (1 + <i>i</i>)<sup>n</sup>", "10^−9 m^2 (1 + i)^n"),
        ("H<sub>2</sub>O, SO<sub>4</sub><sup>2−</sup>, Na<sup>+</sup>", "H2O, SO4^2−, Na+"),
        ("the 1<sup>st</sup> isotope <sup>238</sup>U", "the 1st isotope 238U"),
        ("a statement<sup>1</sup> per joule<sup>-1</sup>", "a statement1 per joule^-1"),
    ],
)
def test_powers_are_written_with_a_mark(body: str, text: str) -> None:
    page = f"<html><body><main><p>{PARAGRAPHS[0]}</p><p>Values: {body}.</p></main></body></html>"
    assert of_html(page.encode()) == f"{PARAGRAPHS[0]}\nValues: {text}."


def test_a_text_without_a_stated_type_is_shown(server: Loopback, visit: Any) -> None:
    server.answer = lambda asked: Reply("The answer is 42.\nIt is.")
    assert visit(server.url) == "The answer is 42.\nIt is."


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("The answer is 42.\nAnd x < y &amp; z.", "The answer is 42.\nAnd x < y & z."),
        ("<p>The answer is 42</p>", "The answer is 42"),
        ("<style>p {}</style><footer>The <b>answer</b><script>x</script><br>is 42</footer>", "The answer\nis 42"),
    ],
)
def test_a_text_or_a_part_of_a_page_is_read_as_html(body: str, text: str) -> None:
    assert of_html(body.encode()) == text


@pytest.mark.parametrize("opened", ["<div>", "<ul><li>"])
def test_deeply_nested_elements_hide_nothing_after_them(opened: str) -> None:
    page = f"<body><p>before</p>{opened * 900}<p>in 10<sup>3</sup></p><p>it</p>{'</ul></div>' * 900}<p>after</p>"
    shown = of_html(page.encode())
    assert shown.startswith("before") and "in 10^3" in shown and shown.endswith("after")


def test_a_page_without_the_goal_is_shown_from_its_beginning(visit: Any, server: Loopback) -> None:
    text = visit(f"{server.url}/metals", "zebra")
    assert text.startswith("Metals\nFiller paragraph number 0")
    assert text.endswith(" …")
    assert len(text) == 4000


def pdf(*streams: bytes) -> bytes:
    """A PDF file with a page for each stream. A stream without an operator is one that cannot be decoded."""
    kids = b" ".join(b"%d 0 R" % (4 + 2 * number) for number in range(len(streams)))
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[%s]/Count %d>>" % (kids, len(streams)),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    for stream in streams:
        coding = b"" if b"Tj" in stream else b"/Filter/NoSuchDecode"
        resources = b"/Resources<</Font<</F1 3 0 R>>>>"
        objects.append(b"<</Type/Page/Parent 2 0 R/Contents %d 0 R%s>>" % (len(objects) + 2, resources))
        objects.append(b"<</Length %d%s>>stream\n%s\nendstream" % (len(stream), coding, stream))
    body, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        offsets.append(len(body))
        body += b"%d 0 obj%s endobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    size = len(objects) + 1
    return body + b"xref\n0 %d\n0000000000 65535 f \n%strailer<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % (
        *(size, table, size),
        len(body),
    )


def test_pdf_text_is_read_without_the_pages_that_are_broken(server: Loopback, visit: Any) -> None:
    iron, tin = (b"BT /F1 24 Tf 72 700 Td (%s melts) Tj ET" % name for name in (b"Iron", b"Tin"))
    server.answer = lambda asked: Reply(pdf(iron, b"?", tin), headers={"Content-Type": "application/octet-stream"})
    assert visit(server.url) == "Iron melts\nTin melts"


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply("", 404), "the server answered 404"),
        (Reply("", 500), "the server answered 500"),
        (html(""), "has no text"),
        (html("<html><body></body></html>"), "has no text"),
        (Reply(b"\x89PNG", headers={"Content-Type": "image/png"}), "of type 'image/png', not text"),
        (Reply(b"%PDF-1.4 broken", headers={"Content-Type": "application/pdf"}), "has no text|cannot be read"),
        (Reply(b"x" * 2_000_001, headers={"Content-Type": "text/plain"}), "more than 2,000,000 bytes"),
        (Reply(gzip.compress(b"x" * 50_000_000), headers={"Content-Encoding": "gzip"}), "more than 2,000,000 bytes"),
        (Reply(b"x", headers={"Content-Encoding": "br"}), "an unsupported compression"),
        (Reply(b"x" * 100, headers={"Content-Encoding": "gzip"}), "answered with broken gzip"),
    ],
)
def test_unreadable_files_are_errors_with_the_reason(server: Loopback, reply: Reply, message: str) -> None:
    server.answer = lambda asked: reply
    visit = visit_tool(allowed_hosts=["127.0.0.1"], max_bytes=2_000_000, timeout_s=60)
    with pytest.raises(ToolError, match=message):
        visit(server.url)


def test_a_page_that_drips_is_left_at_the_deadline(server: Loopback) -> None:
    left = threading.Event()

    def drip(file: Any) -> None:
        for _ in range(2400):  # two minutes
            file.write(b"x")
            file.flush()
            if left.wait(0.05):
                return

    server.answer = lambda asked: Reply(stream=drip, headers={"Content-Type": "text/plain"})
    start = time.monotonic()
    with pytest.raises(ToolError, match=r"no complete answer within 0\.5 s"):
        visit_tool(allowed_hosts=["127.0.0.1"], timeout_s=0.5)(server.url)
    left.set()
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    "body", [b"\xff\xfe\x00<", b"<" * 200_000, b"<div>" * 100_000, bytes(range(256)) * 100, b"<p>&#x110000;&#0;</p>"]
)
def test_broken_html_costs_at_most_a_text(server: Loopback, visit: Any, body: bytes) -> None:
    server.answer = lambda asked: Reply(body, headers={"Content-Type": "text/html"})
    try:
        assert len(visit(server.url)) <= 4000
    except ToolError as error:
        assert str(error).startswith("Error: the page")


# Work


def cpu_s(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def test_a_long_text_page_is_cut_and_read_in_another_process(server: Loopback) -> None:
    """8 MB as text: what is beyond the cap is not looked at, and the other process does most of the work. This one
    sends and receives the page, which takes a quarter of the time."""
    lines = [f"Filler line {i} about nothing at all." for i in range(200_000)]
    lines[20_000], lines[-1] = "Iron melts at 1538 degrees.", "Iron melts at 4711 degrees."
    body = "\n".join(lines).encode()
    server.answer = lambda asked: Reply(body, headers={"Content-Type": "text/plain"})
    here, there = cpu_s(resource.RUSAGE_SELF), cpu_s(resource.RUSAGE_CHILDREN)
    shown = visit_tool(allowed_hosts=["127.0.0.1"], timeout_s=60)(server.url, "when does iron melt")
    here, there = cpu_s(resource.RUSAGE_SELF) - here, cpu_s(resource.RUSAGE_CHILDREN) - there
    assert "1538" in shown and "4711 degrees" not in shown and len(shown) <= 4000
    assert here < there


def test_the_deadline_ends_the_work_on_a_long_text(server: Loopback) -> None:
    """Runs of accents in descending order take a second to put in order, or more."""
    body = ("a" + "\u0301\u0316" * 900_000).encode()
    server.answer = lambda asked: Reply(body, headers={"Content-Type": "text/plain"})
    here = cpu_s(resource.RUSAGE_SELF)
    with pytest.raises(ToolError, match=r"takes too long to read|no complete answer within"):
        visit_tool(allowed_hosts=["127.0.0.1"], timeout_s=0.2)(server.url, "a goal")
    assert cpu_s(resource.RUSAGE_SELF) - here < 1
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
    commands = [Path(f"/proc/{child}/cmdline").read_bytes() for child in children]
    assert not [command for command in commands if b"visit/worker.py" in command]


@pytest.mark.parametrize("to", ["/" + "x" * 5000, "http://" + "a." * 3000 + "/"])
def test_an_endless_address_is_refused(visit: Any, server: Loopback, to: str) -> None:
    with pytest.raises(ToolError, match="longer than 4096 characters"):
        visit(f"{server.url}{to}" if to.startswith("/") else to)
    server.answer = lambda asked: Reply("", 302, {"Location": to})
    with pytest.raises(ToolError, match="longer than 4096 characters"):
        visit(server.url)


# Summaries


@pytest.fixture
def model() -> Iterator[Loopback]:
    answer = {"choices": [{"message": {"role": "assistant", "content": " Iron: 1538 °C, sk-PLANTED. "}}]}
    with Loopback(lambda asked: Reply(answer)) as model:
        yield model


def test_a_model_sums_the_page_up(server: Loopback, model: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIT_SUMMARY_API_KEY", "sk-PLANTED")
    (visit,) = build_tools(
        ToolArguments(
            ["visit"],
            visit_allowed_hosts=["127.0.0.1"],
            visit_timeout_s=60,
            visit_summary_url=f"{model.url}/v1",
            visit_summary_model="small",
        )
    )
    assert visit(f"{server.url}/metals", "degrees of iron") == "Iron: 1538 °C, [key]."
    (asked,) = model.asked
    assert (asked.path, asked.headers["authorization"]) == ("/v1/chat/completions", "Bearer sk-PLANTED")
    assert asked.json["model"] == "small"
    assert "Iron melts at 1538 degrees" in asked.json["messages"][0]["content"]
    assert "authorization" not in server.asked[0].headers  # the page's server gets no key
    visit(f"{server.url}/metals")
    assert len(model.asked) == 1  # without a goal there is nothing to sum up for


@pytest.mark.parametrize(
    "reply", [Reply("", 500), Reply("not json"), Reply({}), Reply({"choices": [{"message": {"content": None}}]})]
)
def test_when_the_model_fails_the_pages_own_text_is_shown(
    server: Loopback, model: Loopback, reply: Reply, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    model.answer = lambda asked: reply
    visit = visit_tool(
        allowed_hosts=["127.0.0.1"],
        timeout_s=60,
        summariser=ChatModel(url=model.url, model="small", key_variable=SUMMARY_KEY_VARIABLE, setting="url"),
    )
    assert "Iron melts at 1538 degrees" in visit(f"{server.url}/metals", "degrees of iron")
    assert "The text of the page is shown instead" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"visit_timeout_s": 0}, "visit_timeout_s is 0"),
        ({"visit_max_chars": 10}, "visit_max_chars is 10"),
        ({"visit_summary_url": "http://me:planted@x/v1"}, "expected both or neither"),
    ],
)
def test_settings_that_cannot_work_say_so(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        build_tools(ToolArguments(["visit"], **settings))
    assert "planted" not in str(refused.value)


def test_a_port_of_the_settings_is_the_only_one_also_if_it_is_the_usual_one() -> None:
    guard = AddressGuard(["wiki.local:80"], lambda host, port: ["10.0.0.1"])
    assert guard.requests("http://wiki.local/x", 5.0)[0].url.host == "10.0.0.1"
    for url in ("http://wiki.local:6379/", "https://wiki.local/"):
        with pytest.raises(ToolError):
            guard.requests(url, 5.0)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("[::1]:8080", "http://[::1]:8080/x"),
        ("[::1]", "http://[::1]:9000/x"),
        ("bücher.local", "http://bücher.local/x"),
        ("Wiki.local.:81", "http://wiki.LOCAL:81/x"),
    ],
)
def test_a_host_of_the_settings_is_allowed_however_it_is_written(host: str, url: str) -> None:
    guard = AddressGuard([host], lambda host, port: ["127.0.0.1"])
    assert guard.requests(url, 5.0)[0].url.host == "127.0.0.1"
    with pytest.raises(ToolError):
        guard.requests("http://other.local/x", 5.0)


@pytest.mark.parametrize("key", ["sk-abc’", "sk\x01"])
def test_a_key_that_no_header_can_have_is_an_error_at_the_start(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv(SUMMARY_KEY_VARIABLE, key)
    with pytest.raises(ConfigError, match=f"{SUMMARY_KEY_VARIABLE} contains characters that are not allowed") as told:
        ChatModel(url="http://127.0.0.1:1/v1", model="m", key_variable=SUMMARY_KEY_VARIABLE, setting="url")
    assert key not in str(told.value)
    monkeypatch.delenv(SUMMARY_KEY_VARIABLE)
    model = ChatModel(url="http://127.0.0.1:1/v1", model="m", key_variable=SUMMARY_KEY_VARIABLE, setting="url")
    monkeypatch.setenv(SUMMARY_KEY_VARIABLE, key)
    with pytest.raises(RequestFailed, match="not allowed in a key"):
        model.ask("half of a pair: \ud83d", 5.0)


def test_a_missing_library_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs trafilatura: pip install 'arpo-trl\[tools\]'"):
        visit_tool()
