"""`arpo-trl doctor`: lists the features that work on this machine, and the others with the reason."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING

from arpo_trl.common.flags import CommandParser
from arpo_trl.common.full_disk import free_bytes
from arpo_trl.common.hub_cache import can_write
from arpo_trl.errors import ArpoError
from arpo_trl.visible import say

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

GB = 1e9
LEAST_MEMORY_GB, LEAST_DISK_GB = 2, 2
EXTRAS = {
    "vllm": "rollouts on vLLM (use_vllm)",
    "deepspeed": "ZeRO (--accelerate zero2, zero3)",
    "bitsandbytes": "QLoRA (load_in_4bit), on a GPU",
    "trafilatura": "the visit tool",
    "mcp": "tools of MCP servers",
    "trackio": "report_to: trackio",
    "wandb": "report_to: wandb",
    "tensorboard": "report_to: tensorboard",
}
"""Package → the feature that needs it."""
OF_USERS = ("vllm", "deepspeed", "qlora", "tools")
"""The extras of this package that are not for its development."""


class Verdict(StrEnum):
    GOOD = "ok"
    LIMITED = "note"
    """A feature is missing or works only partly."""
    BAD = "error"
    """Training cannot work."""


@dataclass(frozen=True, slots=True)
class Finding:
    subject: str
    verdict: Verdict
    text: str


def main(words: Sequence[str]) -> int:
    CommandParser(
        prog="arpo-trl doctor",
        description="Shows versions, devices, the python tool's sandbox, vLLM, the keys that are set (never their "
        "values), free memory and disk, and the features that will not work here, with the reason. Exit "
        "status: 1 if training cannot work.",
    ).parse_args(words)
    worst = 0
    for check in CHECKS:
        for finding in check():
            say(f"{finding.verdict:<5}  {finding.subject:<18} {finding.text}")
            worst = max(worst, int(finding.verdict is Verdict.BAD))
    return worst


def packages() -> Iterator[Finding]:
    """The required packages, compared with the ranges that this package declares. Then the uses of optional packages.

    An optional package counts if it can be imported, even without installation metadata.
    """
    from packaging.requirements import Requirement

    yield Finding("python", Verdict.GOOD, f"{platform.python_version()} on {platform.platform()}")
    yield Finding("arpo-trl", Verdict.GOOD, f"{metadata.version('arpo-trl')} in {Path(__file__).parents[1]}")
    shown = {"torch", "transformers", "trl", "accelerate", "peft"}
    for requirement in map(Requirement, metadata.requires("arpo-trl") or ()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            has = "is not installed" if found is None else f"is {found}"
            text = f"{has}; expected {requirement}. To install it: pip install '{requirement}'"
            yield Finding(requirement.name, Verdict.BAD, text)
        elif requirement.name in shown:
            yield Finding(requirement.name, Verdict.GOOD, found)
    optional = _optional()
    for name, use in EXTRAS.items():
        found = _version(name)
        wanted = optional.get(name)
        if found is None and util.find_spec(name) is None:
            yield Finding(name, Verdict.LIMITED, f"is not installed: no {use}")
        elif found is not None and wanted is not None and not wanted.contains(found, prereleases=True):
            text = f"is {found}; expected {wanted} for {use}. To install it: pip install '{name}{wanted}'"
            yield Finding(name, Verdict.LIMITED, text)
        else:
            yield Finding(name, Verdict.GOOD, f"{found or 'version unknown'}: {use}")


def devices() -> Iterator[Finding]:
    """The accelerators, with their memory and bfloat16 support."""
    if util.find_spec("torch") is None:
        return
    import torch

    if not torch.accelerator.is_available():
        yield Finding("devices", Verdict.LIMITED, f"no accelerator: training runs on {os.cpu_count()} CPU cores")
        return
    if not torch.cuda.is_available():
        yield Finding("devices", Verdict.GOOD, str(torch.accelerator.current_accelerator()))
        return
    count = torch.cuda.device_count()
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        text = f"{torch.cuda.get_device_name(index)}, {free / GB:.0f} of {total / GB:.0f} GB free"
        works = torch.cuda.is_bf16_supported(including_emulation=False)
        more = "" if works else "; no bfloat16: set bf16: false and fp16: true"
        yield Finding(f"GPU {index}", Verdict.GOOD if works else Verdict.LIMITED, text + more)
    if count > 1:
        yield Finding(
            "GPUs", Verdict.GOOD, f"to use all: arpo-trl train --accelerate zero3 --num_processes {count} --config …"
        )


def sandbox() -> Iterator[Finding]:
    """Whether the model's code can be isolated, tested with a worker."""
    try:
        from arpo_trl.tools.python.sandbox import isolating_tier

        tier = isolating_tier()
    except (ArpoError, ImportError, OSError) as error:
        yield Finding(
            "python tool",
            Verdict.LIMITED,
            f"cannot isolate code here: {error}. Remove python from tools, or set python_executor_url",
        )
    else:
        yield Finding("python tool", Verdict.GOOD, f"isolates code by {tier}")


def keys() -> Iterator[Finding]:
    """The names of the keys that are set, never their values."""
    from arpo_trl.tools.search.providers import PROVIDERS

    of_search = [variable for name in PROVIDERS.own if (variable := PROVIDERS.get(name).key_variable)]
    names = [*of_search, "JUDGE_API_KEY", "VISIT_SUMMARY_API_KEY", "COMPLETIONS_API_KEY", "VLLM_API_KEY"]
    names += ["HF_TOKEN", "WANDB_API_KEY"]
    given = [name for name in names if os.environ.get(name)]
    yield Finding("keys set", Verdict.GOOD, ", ".join(given) or "none")
    if not set(given) & set(of_search):
        yield Finding(
            "web search",
            Verdict.LIMITED,
            f"none of {', '.join(of_search)} is set: search with search_index, or with a service without a key",
        )
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        yield Finding("Hub", Verdict.LIMITED, "HF_HUB_OFFLINE is 1: only models and data on this disk")


def space() -> Iterator[Finding]:
    """Free memory, and free disk in this folder and in the cache of models."""
    import psutil
    from huggingface_hub import constants

    yield _enough("memory", psutil.virtual_memory().available / GB, LEAST_MEMORY_GB, "free")
    for subject, folder, remedy in (
        ("disk, here", Path(), "run this in another folder"),
        ("disk, model cache", Path(constants.HF_HUB_CACHE), "set HF_HOME to a folder of yours"),
    ):
        try:
            free = free_bytes(folder)
        except OSError as error:  # such as the cache of another user
            yield Finding(subject, Verdict.LIMITED, f"{folder} cannot be read ({error.strerror}): {remedy}")
        else:
            if can_write(folder):
                yield _enough(subject, free / GB, LEAST_DISK_GB, f"free in {folder.absolute()}")
            else:
                yield Finding(subject, Verdict.LIMITED, f"{folder.absolute()} cannot be written: {remedy}")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (packages, devices, sandbox, keys, space)


def _enough(subject: str, gigabytes: float, least: float, where: str) -> Finding:
    if gigabytes >= least:
        return Finding(subject, Verdict.GOOD, f"{gigabytes:.1f} GB {where}")
    return Finding(subject, Verdict.BAD, f"{gigabytes:.1f} GB {where}; expected at least {least:g} GB")


def _optional() -> dict[str, SpecifierSet]:
    """Optional package → the versions that the extras of this package, which include some of TRL's, require."""
    from packaging.requirements import Requirement

    installed = [package for package in ("trl", "arpo-trl") if _version(package)]
    listed = [line for package in installed for line in metadata.requires(package) or ()]
    return {
        requirement.name: requirement.specifier
        for requirement in map(Requirement, listed)
        if requirement.marker and any(requirement.marker.evaluate({"extra": extra}) for extra in OF_USERS)
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
