"""The encoder in models of Hugging Face's transformers: `attach`, and generation that names items of a catalogue.

attach.py             puts an encoder on a model, and takes it off
hooks.py              adds m to the input embeddings of each call
token_history.py      the tokens before, kept in the KV cache
kv_cache.py           where a model takes and returns its KV cache
files.py              the encoder is saved and loaded with the model
table_checkpoints.py  divided tables in the checkpoints of the Trainer
constrained.py        beam search among the items of a catalogue
"""
