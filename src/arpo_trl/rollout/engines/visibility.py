"""Checks which models the transformers engine can sample from, and computes their attention masks.

A row's keys are in one buffer, at their positions. So a mask is a comparison of positions: a query attends to the keys
up to its own position, or to the keys in its window or chunk. Models with several kinds of layers have one mask per
kind. The engine cannot sample from models with another kind of attention, positions or state. The configuration
identifies most of these models. The others fail a comparison, on a few tokens, with the model's plain forward, which
training uses to score tokens.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel

from arpo_trl.errors import ConfigError, EngineError
from arpo_trl.rollout.engines.compute_dtype import COARSE_ROUNDING, largest_rounding
from arpo_trl.rollout.engines.slots import SlotCache

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
ATTENTION = ("sdpa", "eager")
"""Attention implementations that accept a 4-D mask."""
LENGTHS = (13, 6)
"""The prefill lengths of the comparison's two rows. Then each row decodes one token, and the first row prefills
`MORE`."""
MORE = 3
PADDING = 5
"""Left padding, in tokens, of the rows in the comparison with padded scoring, as TRL does it."""

Mask = torch.Tensor | dict[str, torch.Tensor]
Forward = Callable[[SlotCache, torch.Tensor, slice, torch.Tensor], torch.Tensor]
"""(cache, ids, rows, positions) → (rows, vocabulary) logits of the last query of each row."""


def why_not_sampled(model: PreTrainedModel) -> str | None:
    """Why the engine cannot sample from the model, by configuration and class; None if no reason is known."""
    if is_peft_model(model):
        if any(config.is_prompt_learning for config in model.peft_config.values()):
            return "its adapter puts virtual tokens before the prompt (prompt learning)"
        if any(getattr(config, "alora_invocation_tokens", None) for config in model.peft_config.values()):
            return "its adapter is active only after certain tokens (activated LoRA)"
        model = model.get_base_model()
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        return "it has an encoder"
    if getattr(model, "_is_stateful", False):
        return "it has a recurrent state, which cannot return to an earlier token"
    if other := sorted(set(attention_kinds(config)) - {FULL, SLIDING, CHUNKED}):
        return f"it has layers of type {other}, whose state is not keys and values"
    if "local" in (getattr(config, "attention_layers", None) or []):
        return "its local attention counts from the end of the batch, not from a row's own position"
    if "position_ids" not in inspect.signature(model.forward).parameters or getattr(config, "alibi", False):
        return "it accepts no position_ids, so it cannot decode rows of different lengths at their own positions"
    return None


def attention_kinds(config: Any) -> tuple[str, ...]:
    """The distinct kinds of attention in the model's layers, by transformers' names."""
    if kinds := getattr(config, "layer_types", None):
        return tuple(dict.fromkeys(kinds))
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return (SLIDING,) if windowed else (FULL,)


def mask_for(config: Any, positions: torch.Tensor, length: int, additive: torch.dtype | None) -> Mask:
    """The attention mask (rows, 1, queries, keys) of queries at `positions` (rows, queries) over `length` keys.

    Bool, True for visible keys. With a dtype `additive`: 0 for visible keys, the dtype's lowest number for others.
    A model with several kinds of layers gets one mask per kind, by name, as transformers' models accept.
    """
    masks = {kind: _visible(kind, config, positions, length) for kind in attention_kinds(config)}
    if additive is not None:
        lowest = torch.finfo(additive).min
        masks = {
            kind: torch.zeros(seen.shape, dtype=additive, device=seen.device).masked_fill(~seen, lowest)
            for kind, seen in masks.items()
        }
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _visible(kind: str, config: Any, positions: torch.Tensor, length: int) -> torch.Tensor:
    keys, at = torch.arange(length, device=positions.device), positions.unsqueeze(-1)
    seen = keys <= at
    if kind == SLIDING:
        seen &= keys > at - config.sliding_window
    elif kind == CHUNKED:
        seen &= keys // config.attention_chunk_size == at // config.attention_chunk_size
    return seen.unsqueeze(1)


def exact_length(config: Any) -> int | None:
    """The maximum length in tokens at which sampling token by token equals one forward over the path; None: no limit.

    Once the longest row of a batch exceeds a certain length, the rotary embeddings "longrope" and "dynamic" use other
    angles for all positions of the batch, but not for keys that are already in the cache.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [each for each in rope.values() if isinstance(each, dict)]  # one for each kind of layer
    lengths = []
    for each in nested or [rope]:
        if each.get("rope_type") == "longrope":
            lengths.append(each["original_max_position_embeddings"])
        elif each.get("rope_type") == "dynamic":
            lengths.append(config.max_position_embeddings)
    return min(lengths, default=None)


@contextmanager
def fit_for_decoding(model: PreTrainedModel) -> Iterator[None]:
    """Put the model in evaluation mode, with an attention that accepts 4-D masks, and restore both at the end."""
    attention = model.config._attn_implementation
    if attention not in ATTENTION:
        base = model.get_base_model() if is_peft_model(model) else model
        model.set_attn_implementation("sdpa" if base._supports_sdpa else "eager")
    try:
        with evaluating(model):
            yield
    finally:
        if attention not in ATTENTION:
            model.set_attn_implementation(attention)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """A context in which the model is in evaluation mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def trial_ids(model: PreTrainedModel, count: int) -> torch.Tensor:
    """(count,) ids on the model's device, spread over the whole vocabulary.

    They all differ if it is large enough: equal tokens would hide errors of the attention.
    """
    device = model.get_input_embeddings().weight.device
    return torch.arange(1, count + 1, device=device) * 7919 % model.config.get_text_config().vocab_size


def mask_dtype(model: PreTrainedModel) -> torch.dtype | None:
    """The dtype of an additive mask; None if the attention accepts a bool mask."""
    if model.config._attn_implementation != "eager":
        return None
    dtype = model.get_input_embeddings().weight.dtype
    return dtype if dtype.is_floating_point else torch.float32


@torch.no_grad()
def compare_with_plain_forward(
    model: PreTrainedModel, make_cache: Callable[[], SlotCache], forward: Forward, *, padded: bool
) -> None:
    """Check that `forward`, row by row and step by step, gives the logits of the model's plain forward.

    The check prefills two rows of different lengths together, decodes one token in each, and prefills several more
    tokens in the first, as after a tool result. It uses no random numbers.

    Args:
        padded: Also compare with left-padded rows without position ids, as TRL scores them.

    Raises:
        ConfigError: The logits differ or are not finite, or `forward` fails; the message has the figures.
        EngineError: The check does not fit into memory.
    """
    ids = trial_ids(model, sum(LENGTHS) + 2 + MORE)
    first, second = ids[: LENGTHS[0] + 1 + MORE], ids[LENGTHS[0] + 1 + MORE :]
    plain = _plain_logits(model, [first, second], 0)
    check_logits(model, torch.cat(plain))
    kind = f"a model of type {model.config.model_type!r}"
    with fit_for_decoding(model):
        cache = make_cache()
        cache.reserve(2, len(first))
        try:
            read = torch.nn.utils.rnn.pad_sequence([first[: LENGTHS[0]], second[: LENGTHS[1]]], batch_first=True)
            lengths = torch.tensor(LENGTHS, device=ids.device)
            places = torch.arange(LENGTHS[0], device=ids.device).minimum(lengths[:, None])
            newest = torch.stack([first[LENGTHS[0]], second[LENGTHS[1]]])
            more = torch.arange(LENGTHS[0] + 1, len(first), device=ids.device)
            found = [
                forward(cache, read, slice(0, 2), places)[:1],
                forward(cache, newest[:, None], slice(0, 2), lengths[:, None]),
                forward(cache, first[None, LENGTHS[0] + 1 :], slice(0, 1), more[None]),
            ]
        except EngineError:
            raise  # out of memory; the message says how to use less
        except Exception as error:  # the model's code can raise anything for these masks, caches and positions
            raise ConfigError(
                f"The transformers engine cannot sample from {kind}: a forward with a mask and positions per row "
                f"failed ({type(error).__name__}: {str(error).partition(chr(10))[0][:300]}). {WAY_OUT}"
            ) from error
        finally:
            cache.clear()

    def off(plain: list[torch.Tensor]) -> float:
        wanted = [plain[0][LENGTHS[0] - 1], plain[0][LENGTHS[0]], plain[1][LENGTHS[1]], plain[0][-1]]
        return _distance(torch.cat(found).float(), torch.stack(wanted).float())

    most, distance = _tolerance(model), off(plain)
    if not distance <= most:
        raise ConfigError(
            f"The transformers engine cannot sample from {kind}: its logits, row by row and token by token, are "
            f"{distance:.2g} standard deviations away from those of a plain forward; expected at most {most:.2g}. "
            f"{WAY_OUT}"
        )
    if padded and not (distance := off(_plain_logits(model, [first, second], PADDING))) <= most:
        raise ConfigError(
            f"Training cannot score what the transformers engine samples from {kind}: the model counts the padding "
            f"before a prompt, which changes its logits by {distance:.2g} standard deviations; expected at most "
            f"{most:.2g}. Training scores prompts of different lengths in one padded batch. Train a model with "
            "relative (rotary) positions, or one that computes positions from the attention mask."
        )


def check_logits(model: PreTrainedModel, logits: torch.Tensor) -> None:
    """Raises ConfigError if logits are NaN or infinite. -inf is accepted: some models exclude tokens by it."""
    if not bool((logits < math.inf).all()):
        raise ConfigError(
            f"The logits of the model of type {model.config.model_type!r} are not finite: its weights are broken, or "
            f"its dtype ({str(model.dtype).removeprefix('torch.')}) is too narrow. Copy or download the model again, "
            "or set dtype: float32."
        )


def _plain_logits(model: PreTrainedModel, rows: list[torch.Tensor], padding: int) -> list[torch.Tensor]:
    """Each row's (length, vocabulary) logits, from a separate forward with `padding` tokens of left padding."""
    logits = []
    with evaluating(model):
        for row in rows:
            ids = torch.cat([row.new_zeros(padding), row])[None]
            mask = torch.ones_like(ids)
            mask[:, :padding] = 0
            logits.append(model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, padding:])
    return logits


WAY_OUT = "Sample with vLLM (use_vllm), if it supports the model, or train another model."


def _distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Median over positions of the root mean square difference, in standard deviations over the vocabulary.

    The median ignores single positions where rounding makes a router choose another expert.
    """
    found, wanted = (logits - logits.mean(dim=-1, keepdim=True) for logits in (found, wanted))
    each = (found - wanted).square().mean(dim=-1).sqrt() / wanted.square().mean(dim=-1).sqrt()
    return float(each.quantile(0.5))


def _tolerance(model: PreTrainedModel) -> float:
    if getattr(model.config, "quantization_config", None) is not None:
        return COARSE_ROUNDING
    return largest_rounding(model, model.get_input_embeddings().weight.device)
