"""The programs behind `train.py` and `sft.py`: `accelerate launch -m arpo_trl.scripts.train` without a checkout."""
