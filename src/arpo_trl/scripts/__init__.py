"""The programs of `train.py` and `sft.py`. Without a checkout: `arpo-trl train`."""

from arpo_trl.common.noise import hide_noise

hide_noise()  # here, since the imports of the programs already print messages
