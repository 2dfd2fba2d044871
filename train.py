"""Train a tool-using policy: `accelerate launch train.py --config configs/quickstart.yaml`."""

from arpo_trl.common.interrupted import hide_interrupt_tracebacks
from arpo_trl.common.waiting import say_loading

if __name__ == "__main__":
    hide_interrupt_tracebacks()  # the import takes seconds
    say_loading("train.py")
    from arpo_trl.scripts.train import main

    main()
