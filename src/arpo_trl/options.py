"""What settings choose from, and the names of environment variables. Pure: no torch, no TRL, no engine."""

from __future__ import annotations

from enum import StrEnum

VLLM_KEY_VARIABLE = "VLLM_API_KEY"
"""The environment variable that holds the servers' key, if they ask for one; vLLM's own servers read the same."""


class RolloutSchedule(StrEnum):
    """When the sampler takes in what has finished."""

    OVERLAP = "overlap"
    """Take in whatever has finished."""
    ROUNDS = "rounds"
    """Take in tool results together once nothing is left to decode: repeats bit for bit."""


class ProtocolKind(StrEnum):
    """How a model calls tools."""

    TAGS = "tags"
    """`TagProtocol`."""
    CHAT_TEMPLATE = "chat_template"
    """`ChatTemplateProtocol`."""


class SharedPrefixForward(StrEnum):
    """Whether the update computes shared tokens once."""

    AUTO = "auto"
    """Where that is exact and saves time, else the padded batch; where it is not exact, the log says once why."""
    ON = "on"
    """Always; an error at start-up where that is not exact."""
    OFF = "off"
    """TRL's padded batch."""


class WeightSync(StrEnum):
    """How weights reach vLLM servers."""

    NCCL = "nccl"
    """TRL's transfer from GPU to GPU."""
    DISK = "disk"
    """Saved to a folder that trainer and servers share, and loaded from there."""
