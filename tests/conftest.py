"""What holds for every test: nothing is downloaded, one thread, the same seed.

The environment is set before anything imports transformers or torch, and child processes inherit it.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # forked children would warn about it
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models lose more to threads than they gain; sums keep their order
os.environ["MPLBACKEND"] = "Agg"

import pytest
from transformers import set_seed


@pytest.fixture(autouse=True)
def seed() -> None:
    """Seed random, numpy and torch, so that no test depends on which ran before it."""
    set_seed(0)
