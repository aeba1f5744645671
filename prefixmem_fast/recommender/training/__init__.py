"""From options to a trained recommender.

config.py           the options of a run, from files and flags
backbone.py         models and tokenizers
model_checks.py     which models are refused, and how soon
arms.py             plain, PrefixMem, SID-Transformer; the optimizer
trainer.py          transformers' Trainer, validated by TF-L; a loss that is not finite stops it
run.py              one run, from its options to its folder and back
session.py          one process at work on it: starts, goes on, finishes
folder.py           its folder: marked, locked, with checkpoints that are whole; removes nothing of others
inputs.py           the files that it reads, by their places and digests
classification.py   pre-training without a transformer
"""
