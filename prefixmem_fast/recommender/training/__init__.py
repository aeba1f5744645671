"""From options to a trained recommender.

config.py           the options of a run, from files and flags
backbone.py         models and tokenizers
model_checks.py     which models are refused, and how soon
arms.py             plain, PrefixMem, SID-Transformer; the optimizer
trainer.py          transformers' Trainer, validated by TF-L, with checkpoints that a kill cannot spoil
run.py              one run, from its options to its folder and back
classification.py   pre-training without a transformer
"""
