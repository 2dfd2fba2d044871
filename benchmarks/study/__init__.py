"""The study of branch rules, credits and baselines: tabular, on frozen policies, and in training."""
