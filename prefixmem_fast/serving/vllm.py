"""A saved model with its encoder in vLLM: `pip install vllm`, then

    llm = vllm.LLM(**engine_arguments("folder", "items.index.json"))
    found = generate_items(llm, trie, prompts, num_beams=20)

vLLM finds the models by the entry point group ``vllm.general_plugins``, also in its worker processes. Importing this
module does not import vLLM.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import _checks
from .._choices import QUANTIZATIONS
from .._environment import cache_folder
from .._files import read_json
from .._inputs import shown
from ..checkpoint import FOLDER
from ..sid import Catalogue, SIDTrie, SIDVocabulary

if TYPE_CHECKING:
    from ..huggingface.constrained import GeneratedItems

NAME = "prefixmem"  # of the encoder in a model, and of its settings in the engine's `additional_config`
FREE = "prefixmem_free"  # in a request's `extra_args`: may go on with anything
ARCHITECTURES = {
    "qwen2": "PrefixMemQwen2ForCausalLM",
    "qwen3": "PrefixMemQwen3ForCausalLM",
    "llama": "PrefixMemLlamaForCausalLM",
}
_PROCESSOR = "prefixmem_fast.serving.vllm_processors:ItemsOnly"
_PLACES = ("device", "mapped")


def register() -> None:
    """Tell vLLM of the models; it calls this in each of its processes."""
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for name in ARCHITECTURES.values():
        if name not in known:
            ModelRegistry.register_model(name, f"prefixmem_fast.serving.vllm_models:{name}")


def engine_arguments(
    folder: str | Path,
    catalogue: SIDTrie | Catalogue | str | Path | None = None,
    *,
    max_beams: int = 100,
    tables: str = "device",
    quantization: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Arguments of `vllm.LLM` and `vllm.EngineArgs` for a folder that `save_pretrained` of an attached model wrote.

    A folder of a model without an encoder, with a SIDVocabulary beside it, is served as vLLM knows it.

    Args:
        folder: the model's, of Qwen3, Qwen2 or Llama.
        catalogue: keeps requests among its items: a `SIDTrie`, a `Catalogue`, or the path of an index or of a saved
            trie. Without one requests go on with any token.
        max_beams: the most that `generate_items` will be asked for.
        tables: "device", or "mapped": the tables stay in the host's memory as a map of their file, one copy for all
            processes of a host.
        quantization: "int8" or "fp8": the tables are quantized as they are read.
        options: further arguments, such as ``max_model_len``. Settings of the encoder under an `additional_config` of
            yours are kept.

    Raises:
        FileNotFoundError, TypeError, ValueError: an argument is not as stated, or vLLM cannot serve such a model.
    """
    folder = Path(folder)
    _checks.choice("tables", tables, _PLACES)
    if quantization is not None:
        _checks.choice("quantization", quantization, QUANTIZATIONS)
        if tables == "mapped":
            raise ValueError(
                f"quantization = {quantization!r} with tables = 'mapped', which reads a file as it is; leave one of "
                "the two out"
            )
    if options.get("enable_prompt_embeds"):
        raise ValueError("enable_prompt_embeds: prompt embeddings have no tokens for the encoder; leave it out")
    config, encoder = _described(folder)
    kind = config.get("model_type")
    if encoder and kind not in ARCHITECTURES:
        raise ValueError(
            f"{folder} holds a model of type {shown(kind)}; served are {', '.join(ARCHITECTURES)}. Another family "
            "takes a class of two lines, see prefixmem_fast.serving.vllm_models"
        )
    vocabulary = SIDVocabulary.from_pretrained(folder)
    settings: dict[str, Any] = {"tables": tables, "quantization": quantization}
    arguments: dict[str, Any] = {"model": str(folder)}
    if catalogue is not None:
        trie = _trie_of(catalogue, vocabulary)
        settings |= {"trie": str(_saved(trie)), "end": _end_of(config, trie)}
        # Beam search adds the processor's scores up, so they are what vLLM must report.
        arguments |= {"logits_processors": [_PROCESSOR], "logprobs_mode": "processed_logits"}
        arguments["max_logprobs"] = _checks.integer("max_beams", max_beams)
    if encoder:
        overrides = {"architectures": [ARCHITECTURES[kind]], **(options.pop("hf_overrides", None) or {})}
        arguments["hf_overrides"] = overrides
    own = options.pop("additional_config", None) or {}
    arguments["additional_config"] = {**own, NAME: {**settings, **own.get(NAME, {})}}
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        arguments["skip_tokenizer_init"] = True
    if encoder and torch.cuda.is_available():  # as vLLM's own models with such embeddings: piecewise graphs lose them
        arguments["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL"}
    return {**arguments, **options}


def serves(folder: str | Path) -> bool:
    """Whether a folder holds a model with an encoder that vLLM can serve."""
    config, encoder = _described(Path(folder))
    return encoder and config.get("model_type") in ARCHITECTURES


def _described(folder: Path) -> tuple[dict[str, Any], bool]:
    """The configuration of a folder's model, and whether an encoder lies beside it."""
    return read_json(folder / "config.json"), (folder / FOLDER / "config.json").is_file()


def settings_of(vllm_config: Any) -> dict[str, Any]:
    """What `engine_arguments` has set, in any of the engine's processes."""
    config = vllm_config.additional_config
    return config.get(NAME, {}) if isinstance(config, dict) else {}


def generate_items(llm: Any, trie: SIDTrie, prompts: Sequence[Sequence[int]], num_beams: int = 20) -> GeneratedItems:
    """Beam search for the next item after each prompt, as `huggingface.constrained.generate_items` finds it.

    Each level is one call of the engine with a request a beam; its prefix cache keeps the history.

    Args:
        llm: a `vllm.LLM` of `engine_arguments` with the same catalogue, and ``max_beams >= num_beams``.
        prompts: token ids, one list a prompt.

    Raises:
        TypeError, ValueError: an argument is not as stated, or the engine has no catalogue.
    """
    from ..huggingface.constrained import GeneratedItems

    items, sids, sequences = [], [], []
    scores = torch.full((len(prompts), num_beams), -torch.inf)
    for i, (prompt, levels) in enumerate(zip(prompts, beam_search(llm, trie, prompts, num_beams), strict=True)):
        tokens, found = levels[-1]
        nodes = trie.follow(_node_after(trie, prompt).expand(len(tokens)), tokens)
        missing = num_beams - len(nodes)
        nodes = torch.nn.functional.pad(nodes, (0, missing), value=-1)
        scores[i, : len(found)] = found
        items.append(trie.items_of(nodes))
        sids.append(trie.sids_of(nodes))
        sequences += [[*prompt, *row] for row in tokens.tolist()] + [[*prompt]] * missing
    longest = max(map(len, sequences), default=0)
    padded = [row + [trie.text_token] * (longest - len(row)) for row in sequences]
    sids = torch.stack(sids) if sids else torch.empty(0, num_beams, trie.levels, dtype=torch.int64)
    return GeneratedItems(items, scores, sids, torch.tensor(padded))


def beam_search(
    llm: Any, trie: SIDTrie, prompts: Sequence[Sequence[int]], num_beams: int
) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """The beams that a search keeps after each token, best first.

    Args:
        llm, trie, prompts, num_beams: as for `generate_items`.

    Returns:
        for each prompt and t = 1 .. `trie.depth`, token ids int64 ``[K, t]`` and log-probabilities float ``[K]``.
        After a prompt that ends inside a SID, beams that are whole go on with `trie.text_token`.
    """
    from vllm import SamplingParams

    most = llm.llm_engine.model_config.max_logprobs
    if num_beams < 1 or (most >= 0 and num_beams > most):
        raise ValueError(f"num_beams = {num_beams}; allowed are 1..{most}: give engine_arguments more max_beams")
    if "trie" not in settings_of(llm.llm_engine.vllm_config):
        raise ValueError("the engine has no catalogue; give one to engine_arguments")
    if not all(prompts):
        raise ValueError("a prompt is empty; give a token or more")
    params = SamplingParams(max_tokens=1, logprobs=num_beams, temperature=0.0, detokenize=False)
    searches = [[_Beam((), 0.0, int(_node_after(trie, prompt)))] for prompt in prompts]
    kept: list[list] = [[] for _ in prompts]
    for _ in range(trie.depth):
        asked = [
            (prompt, beam)
            for prompt, beams in zip(prompts, searches, strict=True)
            for beam in beams
            if not trie.is_leaf(beam.node)
        ]
        requests = [{"prompt_token_ids": [*prompt, *beam.tokens]} for prompt, beam in asked]
        outputs = iter(llm.generate(requests, params, use_tqdm=False) if requests else ())
        for i, beams in enumerate(searches):
            searches[i] = beams = _grown(trie, beams, outputs, num_beams)
            scores = torch.tensor([beam.score for beam in beams])
            kept[i].append((torch.tensor([beam.tokens for beam in beams]), scores))
    return kept


class _Beam(NamedTuple):
    tokens: tuple[int, ...]
    score: float
    node: int


def _grown(trie: SIDTrie, beams: list[_Beam], outputs: Iterator[Any], num_beams: int) -> list[_Beam]:
    """The best continuations of the beams of one prompt; each that is no whole SID takes an output."""
    found = []
    for tokens, score, node in beams:
        if trie.is_leaf(node):
            found.append(_Beam((*tokens, trie.text_token), score, node))
            continue
        (logprobs,) = next(outputs).outputs[0].logprobs
        likely = [(token, entry.logprob) for token, entry in logprobs.items() if entry.logprob > -torch.inf]
        found += [_Beam((*tokens, token), score + logprob, node) for token, logprob in likely]
    best = sorted(found, key=lambda beam: -beam.score)[:num_beams]
    nodes = torch.tensor([beam.node for beam in best])
    after = trie.follow(nodes, torch.tensor([beam.tokens[-1:] for beam in best]))
    return [beam._replace(node=node) for beam, node in zip(best, after.tolist(), strict=True)]


def _node_after(trie: SIDTrie, prompt: Sequence[int]) -> torch.Tensor:
    """Where a prompt ends, ``[1]``."""
    return trie.enter(torch.tensor([list(prompt)]))


def _trie_of(catalogue: SIDTrie | Catalogue | str | Path, vocabulary: SIDVocabulary) -> SIDTrie:
    if isinstance(catalogue, SIDTrie):
        return catalogue
    if isinstance(catalogue, Catalogue):
        return SIDTrie(catalogue, vocabulary)
    if Path(catalogue).suffix.lower() == ".safetensors":
        return SIDTrie.load(catalogue)
    return SIDTrie(Catalogue.load(catalogue, codebook_sizes=vocabulary.codebook_sizes), vocabulary)


def _saved(trie: SIDTrie) -> Path:
    """The trie in a file of this user that the engine's processes can read, named by what it holds."""
    content = hashlib.sha256(repr((trie.begin, trie.end, trie.catalogue.items, trie.vocabulary.to_dict())).encode())
    content.update(trie.catalogue.codes.contiguous().numpy())
    folder = cache_folder() or Path(tempfile.mkdtemp(prefix="prefixmem_fast-"))
    file = folder / "tries" / f"{content.hexdigest()[:24]}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    trie.save(file)  # anew each time: what is there may be damaged, or of another release
    return file


def _end_of(config: dict[str, Any], trie: SIDTrie) -> int:
    """What follows a whole SID: the model's end of a sequence, or a token of text where it names none."""
    end = config.get("eos_token_id")
    end = end[0] if isinstance(end, list) else end
    return trie.text_token if end is None or trie.vocabulary.is_code(end) else int(end)
