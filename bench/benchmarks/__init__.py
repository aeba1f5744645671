"""The benchmarks; importing this registers them, by importance.

tables.py          forward, token_stream, gradient, training: the tables and what is done with them
pretraining.py     a whole step of pre-training the encoder alone
decoding.py        one token a sequence
language_model.py  a step of a causal LM, with the encoder and without
native.py          forward and training on a CPU beside bare loops over the same rows, by threads and busy cores
constrained.py     a step of beam search over the items of a catalogue
"""

from . import tables, pretraining, language_model, decoding, constrained, native  # noqa: F401, I001
