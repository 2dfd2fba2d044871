"""Runs two ranks, of which the first waits for a server that hangs: `torchrun … waiting_ranks.py FOLDER`.

The collectives' timeout is shorter than the wait. Each rank writes its error.
"""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from accelerate import Accelerator

from arpo_trl.errors import EngineError
from arpo_trl.rollout.engines.vllm import weights
from arpo_trl.rollout.engines.vllm.client import FRESH, ServerClient, ServerFacts
from support import A_SERVER

TIMEOUT_S, HANGS_S = 4.0, 10.0


class Claimed(ServerClient):
    """A client of a server that a run can claim, without requests."""

    mark = FRESH

    def facts(self) -> ServerFacts:
        return A_SERVER

    def reset_prefix_cache(self) -> bool:
        return True

    def weight_version(self) -> str:
        return self.mark

    def set_weight_version(self, version: str) -> None:
        self.mark = version


class Hangs:
    """A transfer to a server that never answers."""

    def prepare(self, version: str) -> None:
        pass

    def deliver(self, client: ServerClient, version: str) -> None:
        time.sleep(HANGS_S)  # longer than a collective may take
        raise EngineError(f"{client.url} hangs")


def main(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
    weights.WAITING_S = 1.0
    served = weights.ServedWeights(
        [Claimed("http://server", timeout_s=1.0)],
        [A_SERVER],
        Hangs(),  # type: ignore[arg-type]  # the first sync calls no other method
        Accelerator(cpu=True),
        lambda: (1, 1),
        lambda ids: [-1.0],
        [5, 6],
        0.05,
    )
    try:
        served.sync()
    except Exception as error:  # the test reads which one it is: that of a collective is a RuntimeError
        (folder / f"rank{dist.get_rank()}").write_text(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
