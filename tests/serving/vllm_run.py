"""One engine of vLLM beside transformers, in a process of its own: python -m tests.serving.vllm_run CASE FOLDER

CASE is JSON, see `Case`. Prints one JSON object: how many prompts got the same tokens, the largest difference of their
log-probabilities, and what the engine did meanwhile.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

LEVELS, CODES, HIDDEN = 4, 16, 64


@dataclass
class Case:
    """What is run.

    Attributes:
        what: "greedy", "beams", "samples" or "refusals".
        runner: 1 or 2, vLLM's model runner; the second one by Triton's interpreter.
        model: qwen3, qwen2 or llama.
        encoder: plain, zeroed (W_out is 0 in what vLLM reads), cross-item or lagged.
        arguments: of `engine_arguments`.
        mp: whether the engine and its worker are processes of their own.
    """

    what: str = "greedy"
    runner: int = 1
    model: str = "qwen3"
    encoder: str = "plain"
    prompts: int = 60
    passes: int = 1
    arguments: dict[str, Any] = field(default_factory=dict)
    mp: bool = False


def prepare(case: Case) -> None:
    """Before vLLM is imported."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING=str(int(case.mp)),
        VLLM_CPU_CI_ENV="1",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_USE_V2_MODEL_RUNNER=str(case.runner - 1),
        TRITON_INTERPRET=str(case.runner - 1),
        HF_HUB_OFFLINE="1",
    )
    if case.arguments.get("tensor_parallel_size"):
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"  # a core each; by itself vLLM asks for a NUMA node each
    if case.runner == 2:  # vLLM asks for a backend of Triton that is active here; the interpreter needs none
        from triton import backends

        backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)


def vocabulary():
    from prefixmem_fast import SIDVocabulary

    entries = {10 + l * CODES + c: (l + 1, c) for l in range(LEVELS) for c in range(CODES)}
    return SIDVocabulary.from_table(entries, (CODES,) * LEVELS)


def encoder_of(kind: str):
    from prefixmem_fast import AddressSpec, PrefixMem, PrefixMemConfig

    options = {"memory_init_std": 1.0, "output_init_std": 0.3}
    spec, cross = AddressSpec((CODES,) * LEVELS, table_rows=200), None
    if kind in ("cross-item", "lagged"):
        more = {"lags": 2, "earlier_codes": 2, "output_slot": True} if kind == "lagged" else {}
        window = AddressSpec.cross_item((CODES,) * LEVELS, table_rows=200, history=1)
        cross = PrefixMemConfig(window, 32, HIDDEN, **more, **options)
    return PrefixMem(PrefixMemConfig(spec, 32, HIDDEN, cross_item=cross, **options))


def model_of(kind: str):
    import transformers

    name = {"qwen3": "Qwen3", "qwen2": "Qwen2", "llama": "Llama"}[kind]
    sizes = {"vocab_size": 128, "hidden_size": HIDDEN, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 512}
    tokens = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    config = getattr(transformers, f"{name}Config")(**sizes, **heads, **tokens, tie_word_embeddings=True)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def prompts_of(catalogue, count: int) -> list[list[int]]:
    """Histories that end inside Semantic IDs and between them; every second one begins with what all share."""
    import torch

    def items(many: int) -> list[int]:
        rows = torch.randint(0, len(catalogue), (many,))
        return vocabulary().encode(catalogue.codes[rows]).flatten().tolist()

    shared, prompts = items(20), []
    for i in range(count):
        own = items(2 + i % 5)
        prompts.append((shared if i % 2 else []) + [5] + own[: len(own) - i % LEVELS])
    return prompts


def main(text: str, folder: Path) -> dict[str, Any]:
    case = Case(**json.loads(text))
    prepare(case)
    import torch
    from vllm import LLM, SamplingParams

    from prefixmem_fast import attach
    from prefixmem_fast.huggingface.constrained import generate_items
    from prefixmem_fast.serving import token_windows, vllm
    from prefixmem_fast.sid import Catalogue, SIDTrie

    torch.manual_seed(0)
    model, encoder, known = model_of(case.model), encoder_of(case.encoder), vocabulary()
    attach(model, encoder, known)
    if case.encoder == "zeroed":
        kept = encoder.out_proj.weight.detach().clone()
        encoder.out_proj.weight.data.zero_()
    model.save_pretrained(folder)
    known.save_pretrained(folder / "prefixmem")
    if case.encoder == "zeroed":
        encoder.out_proj.weight.data.copy_(kept)
    if case.arguments.get("quantization"):
        from prefixmem_fast import detach

        attach(model, detach(model).quantize(case.arguments["quantization"]), known)
    catalogue = Catalogue([f"i{i}" for i in range(300)], torch.randint(0, CODES, (300, LEVELS)), (CODES,) * LEVELS)
    trie, prompts = SIDTrie(catalogue, known), prompts_of(catalogue, case.prompts)
    arguments = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 32, "block_size": 32, "seed": 0}
    arguments |= {"enforce_eager": True, "disable_log_stats": False, **case.arguments}
    arguments["distributed_executor_backend"] = "mp" if case.mp else "uni"
    if case.what == "refusals":
        return _refusals(folder, arguments)
    done = {"windows_of_step": 0, "store": 0}
    _count(done, token_windows)
    llm = LLM(**vllm.engine_arguments(folder, None if case.what == "greedy" else trie, **arguments))
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    same, error = 0, 0.0
    if case.what == "greedy":
        params = SamplingParams(max_tokens=10, temperature=0, logprobs=1, ignore_eos=True, detokenize=False)
        expected = [_greedy(model, prompt) for prompt in prompts]
        for _ in range(case.passes):
            outputs = [output.outputs[0] for output in llm.generate(asked, params, use_tqdm=False)]
            same = 0
            for output, (tokens, logprobs) in zip(outputs, expected, strict=True):
                equal = list(output.token_ids) == tokens
                same += equal
                found = [entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True)]
                if equal:
                    error = max(error, *(abs(a - b) for a, b in zip(found, logprobs, strict=True)))
    elif case.what == "beams":
        found = vllm.generate_items(llm, trie, prompts, num_beams=10)
        for i, prompt in enumerate(prompts):
            expected = generate_items(model, trie, {"input_ids": torch.tensor([prompt])}, num_beams=10)
            same += torch.equal(expected.sids[0], found.sids[i]) and expected.items[0] == found.items[i]
            real = expected.scores[0] > -torch.inf
            error = max(error, float((expected.scores[0] - found.scores[i])[real].abs().max()))
    else:
        params = SamplingParams(max_tokens=trie.depth + 3, n=8, temperature=1.0, detokenize=False)
        for prompt, output in zip(prompts, llm.generate(asked, params, use_tqdm=False), strict=True):
            begun = trie.enter(torch.tensor([prompt]))
            nodes = [trie.follow(begun, torch.tensor([one.token_ids])) for one in output.outputs]
            same += all(
                bool(trie.is_leaf(node)) and one.token_ids[-1] == 1
                for node, one in zip(nodes, output.outputs, strict=True)
            )
    metrics = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    return {
        "same": same,
        "of": len(prompts),
        "error": error,
        "preemptions": metrics.get("vllm:num_preemptions"),
        "cache_hits": metrics.get("vllm:prefix_cache_hits"),
        **done,
    }


def _refusals(folder: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """Engines that must not start, and what says why."""
    from vllm import LLM

    from prefixmem_fast.serving.vllm import engine_arguments

    transfer = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    given = engine_arguments(folder, **arguments)
    same = 0
    for options, words in (
        ({"enable_prompt_embeds": True}, "enable_prompt_embeds does not go with a PrefixMem encoder"),
        ({"kv_transfer_config": transfer}, "kv_transfer_config does not go with a PrefixMem encoder"),
    ):
        try:
            LLM(**{**given, **options})
        except Exception as error:
            same += words in _chain(error)
            print(_chain(error)[-2000:], file=sys.stderr)
    try:
        engine_arguments(folder, enable_prompt_embeds=True)
    except ValueError as error:
        same += "prompt embeddings have no tokens" in str(error)
    return {"same": same, "of": 3}


def _chain(error: BaseException | None) -> str:
    return "" if error is None else f"{error}\n{_chain(error.__cause__ or error.__context__)}"


def _count(done: dict[str, int], token_windows) -> None:
    """Which runner's windows are read, counted in this process."""
    step, store = token_windows.windows_of_step, token_windows.TokenStore.windows

    def windows_of_step(*arguments):
        done["windows_of_step"] += 1
        return step(*arguments)

    def windows(self, *arguments):
        done["store"] += 1
        return store(self, *arguments)

    token_windows.windows_of_step, token_windows.TokenStore.windows = windows_of_step, windows


def _greedy(model, prompt: list[int]) -> tuple[list[int], list[float]]:
    import torch

    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(torch.tensor([prompt]), **options, return_dict_in_generate=True, output_logits=True)
    tokens = found.sequences[0, len(prompt) :]
    logprobs = torch.stack(found.logits, 1)[0].log_softmax(-1)
    return tokens.tolist(), logprobs.gather(1, tokens[:, None])[:, 0].tolist()


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
