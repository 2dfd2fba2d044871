"""The programs of `train.py` and `sft.py`. Without a checkout: `arpo-trl train`."""
