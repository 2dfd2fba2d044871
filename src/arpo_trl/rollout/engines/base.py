"""The interface between the sampler and an engine, which produces tokens.

An engine takes requests for single turns and reports events: a `Probe` after the first k tokens of a turn, and a
`Turn` when the turn has ended. An engine whose requests can fail one by one reports `TurnFailed` in that case. An
engine does not know trees, tools or branching. Within a session its methods are not collectives, so ranks need not
have the same number of live paths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from arpo_trl.common.user_files import shown
from arpo_trl.errors import ConfigError, EngineError


class TurnStop(StrEnum):
    """Why a turn ended."""

    EOS = "eos"
    STOP_STRING = "stop_string"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """The distribution to sample from, with transformers' names; temperature 0 is greedy.

    A turn ends as soon as its text contains one of `stop_strings`. Its ids stay exactly as sampled, even if the last
    token has characters after the stop string.

        SamplingParams(eos_ids=(tokenizer.eos_token_id,), stop_strings=("</search>",), temperature=0.7)
    """

    eos_ids: tuple[int, ...]
    stop_strings: tuple[str, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0

    @property
    def for_vllm(self) -> dict[str, Any]:
        """The distribution with the names of vLLM's requests. All fields are present, since a server reads missing
        ones from the model's generation_config.json."""
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p or 0.0,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRequest:
    """A request for one turn of at most `max_tokens` tokens after `ids`, the prompt and the path so far.

    `probe_tokens` is k. `seed` alone determines the random numbers of the turn, independent of the rest of the batch.
    `key` is the turn's place in its tree, (group, *address, depth), for scripts and logs. `after` is the request id of
    the earlier turn that `ids` continues, None at the root: an engine can reuse that turn's KV cache. If `ids` ends
    with that turn's tokens, the turn ended at a stop string that is only text, and continues.

        TurnRequest(id=7, ids=[50, 51], max_tokens=256, probe_tokens=20, seed=1, key=(0, 0, 0))
    """

    id: int
    ids: list[int]
    max_tokens: int
    probe_tokens: int
    seed: int
    key: tuple[int, ...]
    after: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """The entropies in nats of a turn's first k tokens. Sent only if the turn continues after them.

    Probe(id=7, entropies=[1.3, 0.2])
    """

    id: int
    entropies: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A finished turn: at least one token, one logprob per token, entropies of the first k (or fewer) tokens.

    `versions` has one number per token: the trainer's step whose weights sampled it. It is empty if the engine does
    not report versions.

    Turn(id=7, ids=[60, 2], logprobs=[-0.4, -0.1], entropies=[1.3, 0.2], stop=TurnStop.EOS)
    """

    id: int
    ids: list[int]
    logprobs: list[float]
    entropies: list[float]
    stop: TurnStop
    versions: list[int] = field(default_factory=list)

    def followed_by(self, rest: Turn) -> Turn:
        """Return this turn and `rest`, which continues it, as one turn with the id of `rest`."""
        return replace(
            rest,
            ids=self.ids + rest.ids,
            logprobs=self.logprobs + rest.logprobs,
            entropies=self.entropies + rest.entropies,
            versions=self.versions + rest.versions,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnFailed:
    """A request that failed permanently, for example because the server rejects it. Other turns continue.

    TurnFailed(id=7, reason="The server answered 400.")
    """

    id: int
    reason: str


Event = Probe | Turn | TurnFailed


class Engine(Protocol):
    """The interface that the sampler needs.

    with engine.session():
        engine.submit(TurnRequest(id=7, ids=[50, 51], max_tokens=100, probe_tokens=20, seed=0, key=(0, 0)))
        events = engine.poll(1.0)  # a Probe and a Turn with id 7, now or at a later call
    """

    vocab_size: int
    """V in ln V: the number of tokens in the sampling distribution."""
    has_logprobs: bool
    """Whether turns have sampling logprobs. Otherwise all of them are NaN."""

    @property
    def forward_s(self) -> float:
        """Seconds spent in model forwards since the engine was created."""

    @property
    def max_length(self) -> int | None:
        """The maximum number of tokens of prompt and path together; None if the engine has no such limit."""

    def session(self) -> AbstractContextManager[None]:
        """Open a rollout: sync or gather the weights once and keep them until the end. The only collective of a
        rollout."""

    def submit(self, request: TurnRequest) -> None:
        """Queue a turn, without blocking."""

    def poll(self, timeout_s: float) -> Sequence[Event]:
        """Return the events since the last call. Waits at most about `timeout_s` seconds for the first one."""


def check_engine(engine: Engine) -> None:
    """Check that an engine from outside the package has the members of `Engine`.

    Raises:
        ConfigError: It lacks some.
    """
    members = [*Engine.__annotations__, *(name for name in vars(Engine) if not name.startswith("_"))]
    if missing := [name for name in members if not hasattr(engine, name)]:
        raise ConfigError(
            f"The engine {type(engine).__name__} has no {', '.join(missing)}, which the sampler needs. Define "
            f"{'it' if len(missing) == 1 else 'them'} as in `Engine`."
        )


def check_request(request: TurnRequest) -> None:
    """Check that a request has a prompt and asks for tokens.

    Raises:
        EngineError: It does not.
    """
    if request.max_tokens < 1 or not request.ids:
        raise EngineError(
            f"Turn {request.key} requests {request.max_tokens} tokens after {len(request.ids)}; expected at least 1 "
            "of each."
        )


def lacks_embedding(tokenizer: PreTrainedTokenizerBase, token_id: int, embeddings: int) -> str:
    """The end of an error message about a text with a token that the model cannot read. Its subject is the text."""
    return (
        f"contains the token {tokenizer.convert_ids_to_tokens(token_id)!r}, but the model has only {embeddings} "
        f"embeddings and the tokenizer has {len(tokenizer)} tokens. Call "
        "`model.resize_token_embeddings(len(tokenizer))` and train the new ones, or use the model's own tokenizer."
    )


def check_turn(turn: Turn, engine: Engine, vocabulary: Callable[[], Mapping[str, int]], max_tokens: int) -> None:
    """Check a turn of an engine, which may be from outside the package.

    Args:
        vocabulary: Returns the tokenizer's tokens with their ids. Called only for ids outside of V.
        max_tokens: The limit that the turn's request had.

    Raises:
        EngineError: A list has another type or length than `Turn` states, or an id is no token.
    """
    name = type(engine).__name__
    for part in ("ids", "logprobs", "entropies", "versions"):
        if not isinstance(value := getattr(turn, part), list):
            raise EngineError(f"{name} returned a turn whose {part} are a {type(value).__name__}; expected a list.")
    count = len(turn.ids)
    if not count:
        raise EngineError(f"{name} returned a turn without ids; expected at least one.")
    if count > max_tokens and engine.has_logprobs:  # text of a server can have other tokens here
        raise EngineError(
            f"{name} returned a turn of {count} tokens; the request had max_tokens {max_tokens}. A turn contains only "
            "the sampled tokens, without the prompt, and must end at its limit."
        )
    wrong = next((token for token in turn.ids if type(token) is not int or token < 0), None)
    if (
        wrong is None
        and (last := max(turn.ids)) >= engine.vocab_size
        and last > max(vocabulary().values(), default=-1)
    ):
        wrong = last
    if wrong is not None:
        raise EngineError(
            f"{name} returned a turn with the id {wrong!r} ({type(wrong).__name__}); expected an int that is the id "
            "of a token. Check that the engine has the trained model's tokenizer."
        )
    if len(turn.logprobs) != count:
        raise EngineError(
            f"{name} returned a turn of {count} tokens with {len(turn.logprobs)} logprobs; expected one logprob per "
            "sampled token."
        )
    if len(turn.entropies) > count:
        raise EngineError(
            f"{name} returned a turn of {count} tokens with {len(turn.entropies)} entropies; expected at most one "
            "entropy per sampled token."
        )
    if turn.versions and (len(turn.versions) != count or not all(type(version) is int for version in turn.versions)):
        raise EngineError(
            f"{name} returned a turn of {count} tokens with the versions {shown(list(turn.versions))}; expected "
            "none, or one step per sampled token."
        )


@runtime_checkable
class EngineAhead(Engine, Protocol):
    """An engine whose weights can be replaced while it decodes, so that rollouts can run during the update.

    One thread may use the session while another one calls `sync`. Its turns have `versions`.
    """

    def sync(self) -> None:
        """Load the trainer's current weights into the engine, unless it has them. Also allowed within a session. A
        collective.

        Unfinished turns keep their tokens and continue with the new weights.
        """
