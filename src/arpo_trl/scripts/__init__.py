"""The programs of `train.py` and `sft.py`. Without a checkout: `accelerate launch -m arpo_trl.scripts.train`."""
