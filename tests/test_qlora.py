"""Quantized models train. bitsandbytes is not among the packages of the tests, so a separate process runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fetch_packages import folder

CASES = Path(__file__).parent / "quantized_cases.py"


@pytest.mark.slow
@pytest.mark.bitsandbytes
def test_adapters_train_on_weights_quantized_to_4_bits():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(folder("bitsandbytes")), os.environ.get("PYTHONPATH")])
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "4 passed" in done.stdout
