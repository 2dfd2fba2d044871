"""A tiny model that knows the format of tool calls: a cold start within seconds, for a first try."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from arpo_trl.common.files import share_weights
from arpo_trl.data.demonstrations import encode_trajectory
from arpo_trl.quickstart.model import build_model, build_tokenizer
from arpo_trl.rollout.protocols import TagProtocol

BATCH, LEARNING_RATE = 32, 4e-3


def save_taught_model(
    folder: Path, texts: Sequence[str], demonstrations: Sequence[Mapping[str, Any]], steps: int
) -> None:
    """Saves a model to `folder`, with a tokenizer for `texts`, after `steps` batches of rows {messages}.

    Shows a progress bar. The same arguments give the same model on the same machine.
    """
    tokenizer = build_tokenizer(texts)
    model = build_model(tokenizer, seed=0)
    protocol = TagProtocol(tokenizer, {})
    encoded = [encode_trajectory(row, protocol) for row in demonstrations]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # equally fast for such a small model, and much faster on a busy machine
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    rng = random.Random(0)
    for _ in tqdm(range(steps), desc="Training a tiny model", unit="step"):
        rows = rng.sample(encoded, BATCH)
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
        labels = torch.tensor([row["labels"] + [-100] * (longest - len(row["labels"])) for row in rows])
        model(ids, labels=labels).loss.backward()  # causal: padding on the right changes nothing
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    share_weights(folder)
