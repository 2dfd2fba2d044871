"""A tokenizer and a Qwen3-architecture model of about half a million parameters, built on the spot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PAD_TOKEN = "<|endoftext|>"
MESSAGE_START, MESSAGE_END = "<|im_start|>", "<|im_end|>"
TAGS = tuple(f"<{slash}{name}>" for name in ("think", "search", "python", "result", "answer") for slash in ("", "/"))

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML without the newline between messages, since every token of a prompt costs time."""

# Words with the space before them, digits one by one (a policy copies numbers digit by digit), runs of punctuation, runs
# of white space.
_WORDS = r" ?[\p{L}°²]+|\p{N}| ?[^\s\p{L}\p{N}°²]+|\s+"


def build_tokenizer(texts: Iterable[str], vocab_size: int = 900) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts` that can encode any text.

    Tool and protocol tags are special tokens of their own; EOS is `<|im_end|>` and the padding token another one.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = [PAD_TOKEN, MESSAGE_START, MESSAGE_END, *TAGS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=MESSAGE_END,
        additional_special_tokens=[MESSAGE_START, *TAGS],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The widths of a tiny model."""

    hidden: int = 128
    intermediate: int = 256
    layers: int = 3
    heads: int = 4
    key_value_heads: int = 2
    head_dim: int = 32


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int, size: ModelSize = ModelSize()) -> Qwen3ForCausalLM:
    """A randomly initialised model for `tokenizer`, the same for the same seed; the global generator is left alone."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        head_dim=size.head_dim,
        max_position_embeddings=1024,
        rope_theta=1_000_000.0,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)
