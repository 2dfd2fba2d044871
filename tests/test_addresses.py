"""Every setting for an address rejects invalid addresses and addresses with keys, without quoting them."""

from collections.abc import Callable

import pytest

from arpo_trl import ARPOConfig
from arpo_trl.errors import ConfigError
from arpo_trl.net.addresses import check_server_url
from arpo_trl.rewards.judge import LLMJudge
from arpo_trl.rollout.engines.base import SamplingParams
from arpo_trl.rollout.engines.completions import CompletionsEngine
from arpo_trl.tools.builtin import ToolArguments, build_tools
from support import tokenizer


@pytest.mark.parametrize(
    "url", ["http://h", "https://h.example:8000/v1", "http://127.0.0.1:1/v1/", "http://[::1]:8000/v1", "http://é.fr"]
)
def test_addresses_of_servers(url):
    check_server_url(url, "x", None)


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("http://[::1/v1", "It is not a valid URL"),
        ("http://h:abc", "It is not a valid URL"),
        ("http://h\n", "It is not a valid URL"),
        ("http://me:hun/ter2@h", "It is not a valid URL"),
        (5, "It is not a valid URL"),
        (None, "It is not a valid URL"),
        ("http://h/\u202ev1", "It has an invisible character"),
        ("http://h/v1\U000e0041", "It has an invisible character"),
        ("http://me@h", "It has a user name or password"),
        ("http://me:hunter2@h", "It has a user name or password"),
        ("http://:@h", "It has a user name or password"),
        ("", "It does not begin with http:// or https:// and a host"),
        ("h:8000", "It does not begin with http:// or https:// and a host"),
        ("ftp://h", "It does not begin with http:// or https:// and a host"),
        ("http://", "It does not begin with http:// or https:// and a host"),
        ("http://a b", "It does not begin with http:// or https:// and a host"),
        ("http://h:0", "Port 0 does not exist"),
        ("http://h:65536", "Port 65536 does not exist"),
        ("http://h?", "It has a query or fragment"),
        ("http://h/v1?api_key=hunter2", "It has a query or fragment"),
        ("http://h/v1#", "It has a query or fragment"),
    ],
)
def test_what_is_no_address_of_a_server_says_why(url, fault):
    with pytest.raises(ConfigError) as caught:
        check_server_url(url, "judge_url", "A_KEY")
    assert str(caught.value) == (
        f"judge_url must be an address like http://host:port/v1, without user name, password or query. {fault}. "
        "Put the key of the server, if it needs one, in the environment variable A_KEY."
    )


def test_a_query_is_allowed_if_requested():
    check_server_url("http://h/mcp?a=1", "x", None, may_have_query=True)
    with pytest.raises(ConfigError, match=r"without user name or password\. It has a query or fragment"):
        check_server_url("http://h/mcp?a=1#b", "x", None, may_have_query=True)


def tools(*names: str, **settings: object) -> Callable[[object], object]:
    """Builds tools with what it is called with in the place of …"""
    (setting,) = (name for name, value in settings.items() if value is ...)
    return lambda url: build_tools(ToolArguments(list(names), **{**settings, setting: url}))  # type: ignore[arg-type]


SETTINGS: dict[str, Callable[[str], object]] = {
    "judge_url": lambda url: LLMJudge(url, "wise"),
    "base_url": lambda url: CompletionsEngine(url, None, tokenizer(), SamplingParams(eos_ids=(0,))),
    "python_executor_url": tools("python", python_executor_url=...),
    "search_url": tools("search", search_provider="searxng", search_url=...),
    "visit_summary_url": tools("visit", visit_summary_url=..., visit_summary_model="small"),
    r"visit_allowed_hosts\[0\]": lambda url: tools("visit", visit_allowed_hosts=...)([url]),
    r"mcp_servers\[0\]: url": lambda url: build_tools(ToolArguments([], mcp_servers=[{"url": url}])),
    "A vLLM server's address": lambda url: ARPOConfig("x", use_cpu=True, vllm_server_base_url=url),
    "vLLM server's address": lambda url: ARPOConfig(
        "x", use_cpu=True, use_vllm=True, vllm_mode="server", vllm_server_urls=[url]
    ),
}


@pytest.mark.parametrize("url", ["http://me:hunter2@h/v1", "http://[::1/v1", "me:hunter2@h"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_refuses_it_by_name(setting, url):
    with pytest.raises(ConfigError, match=setting) as caught:
        SETTINGS[setting](url)
    assert "hunter2" not in str(caught.value) and "hunter2" not in repr(caught.value)
