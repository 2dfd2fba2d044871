"""A tokenizer and a model of the Qwen3 architecture with about 0.6 million parameters, built locally.

The weights are random, except for a few attention heads that are initialized to copy. In this task a policy mostly
learns to copy names and numbers to the right place. A model that must first learn to copy with attention ("induction
heads", Olsson et al. 2022) needs several times as many demonstrations. The model must still learn in training what to
copy, and where.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from arpo_trl.common.files import share_weights
from arpo_trl.quickstart.corpus import ALIASES, TOPICS, passages
from arpo_trl.quickstart.tasks import make_tasks

PAD_TOKEN = "<|endoftext|>"
MESSAGE_START, MESSAGE_END = "<|im_start|>", "<|im_end|>"


def tags_of(*names: str) -> tuple[str, ...]:
    """Return the opening and the closing tag of each name."""
    return tuple(f"<{slash}{name}>" for name in names for slash in ("", "/"))


TAGS = tags_of("think", "search", "python", "result", "answer")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML without the newline between messages, to save prompt tokens."""

MAX_LENGTH = 4096

# Words with their leading space, single digits (numbers are copied digit by digit), runs of punctuation, white space.
_PIECES = r" ?[\p{L}°²]+|\p{N}| ?[^\s\p{L}\p{N}°²]+|\s+"

_VOCAB_SIZE = 1000
_HIDDEN = 128
_HEADS = 4
_HEAD_DIM = 32


def build_tokenizer(texts: Iterable[str], tags: Sequence[str] = TAGS) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts` that can encode any text.

    Each of `tags` (of the tools and of the protocol) is one special token. EOS is `<|im_end|>`; the padding token
    differs from it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE,
        special_tokens=[PAD_TOKEN, MESSAGE_START, MESSAGE_END, *tags],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=MESSAGE_END,
        additional_special_tokens=[MESSAGE_START, *tags],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )


def quickstart_texts() -> list[str]:
    """Return the training texts of the quickstart's tokenizer. Names repeat, so that almost all become one token."""
    names = [*(title for topic in TOPICS for title in topic.titles), *ALIASES]
    questions, _ = make_tasks(seed=0, n_train=400, n_heldout=0)
    return [
        *passages(),
        *(f" {name}" for name in names for _ in range(6)),
        *(row["prompt"][0]["content"] for row in questions),
        *(["system\nuser\nassistant\ntool\nprint(round(1.2*3-(4-5)))\nprint(round(6+7))\n\\boxed{8}"] * 200),
    ]


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A model for `tokenizer` with new weights, determined by the seed. Does not change the global generator."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=_HIDDEN,
        intermediate_size=2 * _HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS,
        head_dim=_HEAD_DIM,
        max_position_embeddings=MAX_LENGTH,
        rope_theta=1_000_000.0,
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
        with torch.no_grad():
            _wire_copying(model)
    return model


def save_cold_start_base(
    directory: str | Path, seed: int = 0, tokenizer: PreTrainedTokenizerFast | None = None
) -> None:
    """Save a tokenizer and its untrained model to `directory`, ready for `sft.py`.

    Args:
        tokenizer: None: the tokenizer of the quickstart's questions.
    """
    tokenizer = tokenizer or build_tokenizer(quickstart_texts())
    tokenizer.save_pretrained(directory)
    build_model(tokenizer, seed).save_pretrained(directory)
    share_weights(Path(directory))


# The initial use of the 128 channels of the residual stream:
#
#     0 ……… 63 | 64 …… 83      | 84 …… 103     | 104 … 126 | 127
#     token    | previous token| the one before| free      | constant
#
# Layer 0 fills the two middle parts with heads that attend one and two positions back. Layer 1 attends to the position
# after an earlier occurrence of the last one or two tokens, and adds the token there to the prediction.
_TOKEN_BEFORE, _TWO_BEFORE, _CODE_WIDTH = 64, 84, 20
_CONSTANT = 127
_EMBEDDING_STD = 0.05
_WRITE = 0.12  # about twice an embedding's entries, to dominate the output of the random weights
_JITTER = 0.01  # noise, because weights that are exactly equal or zero would get tied gradients
_POSITION_SHARPNESS, _CONTENT_SHARPNESS = 6.0, 6.0
_FAST_PAIRS = (1.0, 0.8, 0.6, 0.4)
"""Weights of the rotary pairs with the highest frequencies, which distinguish neighbouring positions."""
_SLOW_PAIRS = range(6, 16)
"""Rotary pairs that barely rotate within a trajectory, so that they compare only content."""


def _wire_copying(model: Qwen3ForCausalLM) -> None:
    """Initialize two heads of layer 0 and three heads of layer 1 so that together they copy."""
    embedding = model.model.embed_tokens.weight
    nn.init.normal_(embedding, std=_EMBEDDING_STD)
    embedding[:, _TOKEN_BEFORE : _TWO_BEFORE + _CODE_WIDTH] = 0.0
    embedding[:, _CONSTANT] = 2 * _EMBEDDING_STD

    first, second = (model.model.layers[i].self_attn for i in (0, 1))
    inverse_frequencies = model.model.rotary_emb.inv_freq.tolist()
    for head, (offset, part) in enumerate(((1, _TOKEN_BEFORE), (2, _TWO_BEFORE))):
        query, key, value, output = _head(first, head)
        for pair, weight in enumerate(_FAST_PAIRS):
            # A key rotated by `offset` positions matches best the query `offset` positions later.
            angle = offset * inverse_frequencies[pair]
            query[pair, _CONSTANT] = weight
            key[pair, _CONSTANT] = weight * math.cos(angle)
            key[pair + _HEAD_DIM // 2, _CONSTANT] = weight * math.sin(angle)
        for channel in range(_CODE_WIDTH):
            value[channel, channel] = 1.0
            output[part + channel, channel] = _WRITE
    first.q_norm.weight.fill_(_POSITION_SHARPNESS)

    content = [*_SLOW_PAIRS, *(pair + _HEAD_DIM // 2 for pair in _SLOW_PAIRS)]
    half = _CODE_WIDTH // 2
    # The channels to compare, (query channel, key channel). One head compares the query's token with the token before
    # the key. The others also compare the token before the query with the token two before the key.
    one_token = [(i, _TOKEN_BEFORE + i) for i in range(_CODE_WIDTH)]
    two_tokens = one_token[:half] + [(_TOKEN_BEFORE + i, _TWO_BEFORE + i) for i in range(half)]
    for head, (matches, copied) in enumerate(((one_token, 0), (two_tokens, _HEAD_DIM), (two_tokens, 0))):
        query, key, value, output = _head(second, head)
        for row, (of_query, of_key) in zip(content, matches, strict=True):
            query[row, of_query] = 1.0
            key[row, of_key] = 1.0
        for channel in range(_HEAD_DIM):
            value[channel, copied + channel] = 1.0
            output[copied + channel, channel] = _WRITE
    second.q_norm.weight.fill_(_CONTENT_SHARPNESS)

    for attention in (first, second):
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            projection.weight.add_(_JITTER * torch.randn_like(projection.weight))


def _head(attention: Qwen3Attention, head: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Zero one head's weights and return views: query, key, value (head_dim, hidden) and output (hidden, head_dim)."""
    rows = slice(head * _HEAD_DIM, (head + 1) * _HEAD_DIM)
    views = (
        attention.q_proj.weight[rows],
        attention.k_proj.weight[rows],
        attention.v_proj.weight[rows],
        attention.o_proj.weight[:, rows],
    )
    for view in views:
        view.zero_()
    return views
