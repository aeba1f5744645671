"""A generative recommender over Semantic IDs: from histories to a trained model to the paper's metrics.

data/         histories of items become sequences of SID tokens, and those become batches
training/     a language model learns from the batches, with the encoder on its embeddings or without; or the encoder
              is pre-trained alone
evaluation/   the trained model names the next item: TF-L, recall, NDCG and hit rates beside simple baselines

They chain by two objects. `training.config.RunConfig` says what a run is, and `training.run.train` reads its data by
`data`, trains, and writes a folder. `training.run.load_run` gives the folder back as a model with its data, which
`evaluation.report.evaluate` scores. `prefixmem pretrain`, `prefixmem train` and `prefixmem evaluate` are these calls.
"""

from importlib import import_module


def __getattr__(name: str):
    if name in ("data", "evaluation", "training"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
