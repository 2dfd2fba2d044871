"""The programs of `train.py` and `sft.py`. Without a checkout: `arpo-trl train`."""

from arpo_trl.common.interrupted import hide_interrupt_tracebacks
from arpo_trl.common.noise import hide_noise

# Here, since the imports of the programs take seconds and already print messages.
hide_noise()
hide_interrupt_tracebacks()
