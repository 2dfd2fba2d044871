"""Which models the transformers engine can sample from, and what their queries see.

A row's keys lie in one buffer at their positions, so what a query sees is a comparison of positions: all before it, or
those in its window or chunk, kind by kind where a model's layers differ. A model whose attention, positions or state
is something else is refused: by name where its configuration says so, and otherwise by a comparison of a few tokens
with the model's own forward, the one that training scores with.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel

from arpo_trl.errors import ConfigError, EngineError
from arpo_trl.rollout.engines.compute_dtype import computed_in
from arpo_trl.rollout.engines.slots import SlotCache

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
ATTENTION = ("sdpa", "eager")
"""Attention implementations that take a 4-D mask."""
LENGTHS = (13, 6)
"""Tokens of the two rows that the comparison reads; then each writes one, and the first reads `MORE`."""
MORE = 3
PADDING = 5
"""Tokens of padding on the left of a row that is compared with as TRL scores it."""
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.03}
"""Most difference of two logits in standard deviations of a distribution's logits, by type; else `COARSE`."""
COARSE = 0.1

Mask = torch.Tensor | dict[str, torch.Tensor]
Forward = Callable[[SlotCache, torch.Tensor, slice, torch.Tensor], torch.Tensor]
"""(cache, ids, rows, positions) → (rows, vocabulary) logits of the last query of each row."""


def why_not_sampled(model: PreTrainedModel) -> str | None:
    """Why the engine cannot sample from the model, by its configuration and its class; None if nothing is known."""
    if is_peft_model(model):
        if any(config.is_prompt_learning for config in model.peft_config.values()):
            return "its adapter puts virtual tokens before the prompt (prompt learning)"
        model = model.get_base_model()
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        return "it has an encoder"
    if getattr(model, "_is_stateful", False):
        return "it keeps a recurrent state, which cannot go back to an earlier token"
    if other := sorted(set(attention_kinds(config)) - {FULL, SLIDING, CHUNKED}):
        return f"it has layers of type {other}, which keep something else than keys and values"
    if "local" in (getattr(config, "attention_layers", None) or []):
        return "its local attention counts from the end of the batch, not from a row's own position"
    if "position_ids" not in inspect.signature(model.forward).parameters or getattr(config, "alibi", False):
        return "its positions are those in the batch (no position_ids), and rows of different lengths have their own"
    return None


def attention_kinds(config: Any) -> tuple[str, ...]:
    """The kinds of attention in the model's layers, each once, in transformers' names."""
    if kinds := getattr(config, "layer_types", None):
        return tuple(dict.fromkeys(kinds))
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return (SLIDING,) if windowed else (FULL,)


def mask_for(config: Any, positions: torch.Tensor, length: int, additive: torch.dtype | None) -> Mask:
    """What queries at `positions` (rows, queries) see of `length` keys, (rows, 1, queries, keys).

    True where visible; with `additive` zero there, and the type's lowest number elsewhere. Where layers differ in kind
    one mask for each, by name, as transformers' models take them.
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
    """Tokens up to which a path sampled token by token is what a forward over it gives; None: any number.

    The rotary embedding "longrope" turns all positions of a batch by other angles once the longest row is beyond some
    length, except those whose keys were computed before.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [each for each in rope.values() if isinstance(each, dict)]  # one for each kind of layer
    lengths = [
        each["original_max_position_embeddings"] for each in nested or [rope] if each.get("rope_type") == "longrope"
    ]
    return min(lengths, default=None)


@contextmanager
def fit_for_decoding(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode with an attention that takes a 4-D mask; as it was afterwards."""
    training, attention = model.training, model.config._attn_implementation
    if attention not in ATTENTION:
        base = model.get_base_model() if is_peft_model(model) else model
        model.set_attn_implementation("sdpa" if base._supports_sdpa else "eager")
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        if attention not in ATTENTION:
            model.set_attn_implementation(attention)


def mask_dtype(model: PreTrainedModel) -> torch.dtype | None:
    """The type of an additive mask, None where attention takes one of truth values."""
    if model.config._attn_implementation != "eager":
        return None
    dtype = model.get_input_embeddings().weight.dtype
    return dtype if dtype.is_floating_point else torch.float32


@torch.no_grad()
def compare_with_plain_forward(
    model: PreTrainedModel, make_cache: Callable[[], SlotCache], forward: Forward, *, padded: bool
) -> None:
    """Returns if `forward` row by row and step by step gives the logits of the model's plain forward.

    Two rows of different lengths are read together, each then writes a token, and the first reads several more, as
    after a tool result. Random numbers are not touched.

    Args:
        padded: Compares with rows that are padded on the left and have no positions, as TRL scores them.

    Raises:
        ConfigError: It does not, or fails; with the figures.
        EngineError: There is no memory for it.
    """
    vocabulary = model.config.get_text_config().vocab_size
    device = model.get_input_embeddings().weight.device
    # Ids all over the vocabulary, none twice where it has so many: equal tokens would hide what attention does.
    ids = torch.arange(1, sum(LENGTHS) + 2 + MORE + 1, device=device) * 7919 % vocabulary
    first, second = ids[: LENGTHS[0] + 1 + MORE], ids[LENGTHS[0] + 1 + MORE :]
    plain = _plain_logits(model, [first, second], 0)
    kind = f"a model of type {model.config.model_type!r}"
    with fit_for_decoding(model):
        cache = make_cache()
        cache.reserve(2, len(first))
        try:
            read = torch.nn.utils.rnn.pad_sequence([first[: LENGTHS[0]], second[: LENGTHS[1]]], batch_first=True)
            lengths = torch.tensor(LENGTHS, device=device)
            places = torch.arange(LENGTHS[0], device=device).minimum(lengths[:, None])
            newest = torch.stack([first[LENGTHS[0]], second[LENGTHS[1]]])
            more = torch.arange(LENGTHS[0] + 1, len(first), device=device)
            found = [
                forward(cache, read, slice(0, 2), places)[:1],
                forward(cache, newest[:, None], slice(0, 2), lengths[:, None]),
                forward(cache, first[None, LENGTHS[0] + 1 :], slice(0, 1), more[None]),
            ]
        except EngineError:
            raise  # there is no memory, which has its own way out
        except Exception as error:  # whatever the model's own code raises at a mask, a cache or positions like these
            raise ConfigError(
                f"The transformers engine cannot sample from {kind}: a forward with a mask and positions for each row "
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
            f"The transformers engine cannot sample what training scores with {kind}: it counts the padding before a "
            f"prompt, which moves its logits by {distance:.2g} standard deviations; expected at most {most:.2g}. "
            "Training scores prompts of different lengths in one padded batch. Train a model whose positions are "
            "relative (rotary), or read off the attention mask."
        )


def _plain_logits(model: PreTrainedModel, rows: list[torch.Tensor], padding: int) -> list[torch.Tensor]:
    """Each row's (length, vocabulary) logits, computed by itself after `padding` tokens of padding."""
    training = model.training
    model.eval()
    try:
        logits = []
        for row in rows:
            ids = torch.cat([row.new_zeros(padding), row])[None]
            mask = torch.ones_like(ids)
            mask[:, :padding] = 0
            logits.append(model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, padding:])
        return logits
    finally:
        model.train(training)


WAY_OUT = "Let vLLM sample (use_vllm), if it supports the model, or train another one."


def _distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Median over positions of the root mean square difference, in standard deviations over the vocabulary.

    The median: where a router sends one token to another expert by a rounding, that is not the engine's doing.
    """
    found, wanted = (logits - logits.mean(dim=-1, keepdim=True) for logits in (found, wanted))
    each = (found - wanted).square().mean(dim=-1).sqrt() / wanted.square().mean(dim=-1).sqrt()
    return float(each.quantile(0.5))


def _tolerance(model: PreTrainedModel) -> float:
    device = model.get_input_embeddings().weight.device
    dtypes = computed_in(model, device)
    if getattr(model.config, "quantization_config", None) is not None:
        return COARSE
    if device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        dtypes.add(torch.float16)  # TF32 has as many digits
    return max(TOLERANCE.get(dtype, COARSE) for dtype in dtypes)
