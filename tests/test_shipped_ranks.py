"""One step of each configuration whose vLLM spans two ranks; tests/test_shipped.py runs all others."""

import pytest

from ranks import launch
from shipped import IN_PAIRS, NO_SLEEP, check, family, replaced, save_data, save_family
from support import VLLM

pytestmark = [pytest.mark.vllm, pytest.mark.distributed, pytest.mark.slow]


def test_runs_with_vllm_on_two_ranks_together_train(tmp_path):
    """As they are launched, with ZeRO-3, on the two ranks that share one vLLM."""
    save_data(tmp_path)
    models = {name: save_family(name, tmp_path / name) for name in sorted({family(config) for config in IN_PAIRS})}
    words = []
    for config in IN_PAIRS:
        words += [config, *replaced(config, models, tmp_path, tmp_path / config), *NO_SLEEP, "--"]
    launch("zero3", "tests/shipped.py", *words, environment=VLLM)
    for config in IN_PAIRS:
        check(config, tmp_path / config, ranks=2)
