"""Cold start on tool-using trajectories: `accelerate launch sft.py --config configs/quickstart_sft.yaml`."""

from arpo_trl.common.interrupted import hide_interrupt_tracebacks
from arpo_trl.common.waiting import say_loading

if __name__ == "__main__":
    hide_interrupt_tracebacks()  # the import takes seconds
    say_loading("sft.py")
    from arpo_trl.scripts.sft import main

    main()
