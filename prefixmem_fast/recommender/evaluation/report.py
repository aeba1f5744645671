"""Everything that is known of a trained model on one part of the split, as one JSON object and as tables."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..._choices import PARTS, SEARCHES
from ...sid import Catalogue, SIDTrie, SIDVocabulary
from ..data import Split, Tokens
from .baselines import (
    COUNTS,
    count_table_accuracy,
    item_counts,
    popularity_ranks,
    prefix_thirds,
    seen_transitions,
    transition_ranks,
)
from .retrieval import ranking_metrics, recall, retrieve
from .teacher_forcing import teacher_forced

THIRDS = ("rare", "medium", "popular")


def evaluate(
    model: nn.Module,
    catalogue: Catalogue,
    vocabulary: SIDVocabulary,
    tokens: Tokens,
    split: Split,
    *,
    part: str = "test",
    max_items: int = 20,
    num_beams: int = 20,
    cutoffs: Sequence[int] = (5, 10, 20, 50, 100),
    examples: int | None = None,
    searches: Sequence[str] = SEARCHES,
    reachable: np.ndarray | None = None,
    progress: Callable[[str, int], Callable[[int], object]] | None = None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Every metric of the paper, and the floors beside them.

    Args:
        part: "validation" or "test".
        examples: how many, chosen once for all models; all of them with None.
        searches: "constrained", beams among the prefixes of the catalogue, and "unconstrained".
        reachable: bool ``[N]`` from a baseline's `TeacherForced.reachable` on the same examples.
        progress: given the name of a search and its examples, returns what is told how many are done.

    Returns:
        the report, and for each example what it is made of: target, rank and loss of each level, rank of each search.
    """
    if part not in PARTS:
        raise ValueError(f"part = {part!r}; allowed are {', '.join(PARTS)}")
    unknown = [name for name in searches if name not in SEARCHES]
    if unknown:
        raise ValueError(f"searches names {unknown[0]!r}; allowed are {', '.join(SEARCHES)}")
    chosen = (split.test if part == "test" else split.validation).sample(examples)
    seen = chosen.last(max_items)
    codes, train = catalogue.codes.numpy(), split.train
    popularity = item_counts(train, len(catalogue))
    thirds = prefix_thirds(train, chosen, codes)
    seen_before = seen_transitions(train, chosen)
    transitions = {"seen": seen_before, "new": ~seen_before}
    cutoffs = [k for k in cutoffs if k <= num_beams]

    scored = teacher_forced(model, seen, tokens)
    correct = scored.rank == 0
    report: dict[str, Any] = {
        "part": part,
        "examples": len(chosen),
        "teacher_forcing": {
            "accuracy": scored.accuracy,
            "loss": scored.loss.mean(0).tolist(),
            "accuracy_by_popularity": {n: _means(correct[thirds == i]) for i, n in enumerate(THIRDS)},
        },
        "count_table_accuracy": count_table_accuracy(train, chosen, codes),
        "beams": num_beams,
        "searches": {},
    }
    arrays = {"target": chosen.targets, "level_rank": scored.rank, "level_loss": scored.loss}
    if reachable is not None:
        groups = {"reachable": reachable, "unreachable": ~reachable}
        report["reachable"] = {
            name: {"examples": int(group.sum()), "accuracy": _means(correct[group])} for name, group in groups.items()
        }
    trie = SIDTrie(catalogue, vocabulary)
    for search in searches:
        retrieval = retrieve(
            model,
            seen,
            tokens,
            trie,
            num_beams=num_beams,
            constrained=search == "constrained",
            popularity=popularity,
            progress=progress(search, len(seen)) if progress else None,
        )
        result: dict[str, Any] = ranking_metrics(retrieval.rank, cutoffs)
        result["hit_rate"] = retrieval.hits.mean(0).tolist()
        result["first_codes"] = float(retrieval.first_codes.mean())
        at = min(10, num_beams)
        result[f"recall@{at}_by_popularity"] = {
            n: recall(retrieval.rank[thirds == i], at) for i, n in enumerate(THIRDS)
        }
        result["by_transition"] = {
            n: ranking_metrics(retrieval.rank[group], cutoffs) for n, group in transitions.items()
        }
        if len(np.unique(codes, axis=0)) < len(codes):
            result |= {f"sid_recall@{k}": recall(retrieval.sid_rank, k) for k in cutoffs}
        if reachable is not None:
            for name, group in groups.items():
                report["reachable"][name][f"{search}_recall@{at}"] = recall(retrieval.rank[group], at)
        report["searches"][search] = result
        arrays[f"{search}_rank"] = retrieval.rank
    floors = {name: transition_ranks(train, seen, len(catalogue), counts) for name, counts in COUNTS.items()}
    floors["popularity"] = popularity_ranks(train, chosen, len(catalogue))
    report["floors"] = {name: ranking_metrics(ranks, cutoffs) for name, ranks in floors.items()}
    report["transitions"] = {
        name: {
            "examples": int(group.sum()),
            **{f"{floor}_recall@{k}": recall(ranks[group], k) for floor, ranks in floors.items() for k in cutoffs},
        }
        for name, group in transitions.items()
    }
    return report, arrays


def reachable_by(file: str | Path, targets: np.ndarray, top: int = 10) -> np.ndarray:
    """Which examples a baseline run reaches, from the arrays that its evaluation saved.

    Raises:
        FileNotFoundError, ValueError: there are none, or they are of other examples.
    """
    from .teacher_forcing import TeacherForced

    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"baseline {file} is not there; evaluate the baseline run first, on the same part")
    try:
        with np.load(file) as stored:
            arrays = {name: stored[name] for name in ("target", "level_rank", "level_loss")}
    except (EOFError, KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"baseline {file} is damaged, or not what prefixmem evaluate wrote: {error}") from None
    if not np.array_equal(arrays["target"], targets):
        raise ValueError(f"baseline {file} is of other examples; evaluate it on the same part, data and number of them")
    return TeacherForced(arrays["level_rank"], arrays["level_loss"]).reachable(top)


def table(report: dict[str, Any]) -> str:
    """A report as text: TF-L by level, recall and NDCG beside the floors, and the groups."""
    scored = report["teacher_forcing"]
    levels = range(1, len(scored["accuracy"]) + 1)
    data = [report["data"]] if "data" in report else []
    lines = [", ".join([*data, report["part"], f"{report['examples']} examples", f"beams of {report['beams']}"]), ""]
    lines.append(_row("teacher-forced accuracy", [f"level {l}" for l in levels]))
    lines.append(_row(report.get("name", "model"), scored["accuracy"]))
    lines.append(_row("count table", report["count_table_accuracy"]))
    for name, accuracy in scored["accuracy_by_popularity"].items():
        lines.append(_row(f"  {name} prefixes", accuracy))
    for name, group in report.get("reachable", {}).items():
        lines.append(_row(f"  {name}, {group['examples']} examples", group["accuracy"]))
    lines.append(_row("cross-entropy, nats", scored["loss"]))
    metrics = list(next(iter(report["floors"].values())))
    lines += ["", _row("next item", metrics)]
    for name, row in (*report["searches"].items(), *report["floors"].items()):
        lines.append(_row(name, [row[metric] for metric in metrics], 4))
    for name, row in report["searches"].items():
        for group, found in row["by_transition"].items():
            lines.append(_row(f"  {name}, {group} transitions", list(found.values()), 4))
    for name, row in report["searches"].items():
        if "sid_recall@10" in row:
            shown = [row[f"sid_{m}"] if m.startswith("recall") else "" for m in metrics]
            lines.append(_row(f"  {name}, of SIDs", shown, 4))
    lines += ["", _row("SIDs in the beams", [f"hit {l}" for l in levels] + ["L1 codes"])]
    for name, row in report["searches"].items():
        lines.append(_row(name, [*row["hit_rate"], row["first_codes"]]))
    if "bleu" in report:
        lines += ["", _row("BLEU, SID to text", [report["bleu"]])]
    return "\n".join(lines)


def as_json(report: Any) -> str:
    """A report as JSON; figures of empty groups are null."""
    return json.dumps(_finite(report), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _row(name: str, values: Sequence[Any], digits: int = 3) -> str:
    return f"{name:<34}" + "".join(f"{v if isinstance(v, str) else f'{v:.{digits}f}':>11}" for v in values)


def _means(rows: np.ndarray) -> list[float]:
    return rows.mean(0).tolist() if len(rows) else [float("nan")] * rows.shape[1]
