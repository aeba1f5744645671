"""A trained model where it is served: over HTTP, in vLLM, and the encoder without Python.

engine.py               what an engine takes and returns: requests, and searches with the beams of each level
folder.py               what a folder serves: its model, its vocabulary, and how a history becomes a prompt
catalogue_engine.py     what the engines have in common
transformers_engine.py  the engine on transformers
vllm_engine.py          the engine on vLLM
worker.py               an engine in a process of its own, the requests that wait for it, and its end
questions.py            what clients send: bodies and names, checked
metrics.py              what Prometheus reads
http.py                 the application, and the server around it
page/                   the page that shows a search

vllm.py                 a saved model in vLLM: arguments of the engine, beam search, the plugin
vllm_models.py          the models that vLLM loads, and what its newer runner asks for
vllm_processors.py      the logits processor that keeps requests among the items, for both runners
token_windows.py        the last tokens before each token of an engine's step
item_logits.py          logits masked to the items

export.py               the encoder in plain PyTorch operators, for runtimes without Python
"""

from importlib import import_module

_MODULE_OF = {
    "Beam": "engine",
    "CatalogueEngine": "catalogue_engine",
    "Engine": "engine",
    "Found": "engine",
    "Request": "engine",
    "Search": "engine",
    "Served": "folder",
    "TransformersEngine": "transformers_engine",
    "VLLMEngine": "vllm_engine",
    "Worker": "worker",
    "engine_arguments": "vllm",
    "exportable": "export",
    "generate_items": "vllm",
    "make_app": "http",
    "make_engine": "engine",
    "read_served": "folder",
    "serve": "http",
}
__all__ = list(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
