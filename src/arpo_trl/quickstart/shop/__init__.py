"""The quickstart's shop: a task in which the model acts on a state.

environment    `Shop`: shelves, stock, a cart, a budget
orders         rows for training and evaluation
demonstrations a scripted customer that makes mistakes at known rates
train          stage 2, a separate script: `ARPOTrainer` with `environment_factory`
task           the quickstart's task: data, settings, measurement
"""
