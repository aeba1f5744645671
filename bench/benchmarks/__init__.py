"""The benchmarks; importing this registers them, by importance.

tables.py          forward, token_stream, gradient, training: the tables and what is done with them
pretraining.py     a whole step of pre-training the encoder alone
decoding.py        one token a sequence
language_model.py  a step of a causal LM, with the encoder and without
constrained.py     a step of beam search over the items of a catalogue
"""

from . import tables, pretraining, language_model, decoding, constrained  # noqa: F401, I001
