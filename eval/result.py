"""A result: figures that carry their protocol, as one JSON file a task.

Metric      one figure: value, n, 95 % interval, chance level, direction, candidates, normaliser, re-rank k
Provenance  what it was measured with: model and split by hash, code version, seed, command, tiny or random networks
Findings    the metrics of one task, what is absent and why, examples for the report
Result      findings with their provenance -> <results>/<task>.json, as result.schema.json describes it
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

import opt
from eval.metrics import bootstrap
from opt.config import UserError, from_dict, read_json
from opt.data.manifest import UNKNOWN, Origin
from opt.files import write_atomic
from opt.history import History, Regime

SCHEMA = 2


@dataclass(frozen=True)
class Metric:
    """One figure. Shares lie in [0, 1]; an error rate may pass 1."""

    name: str
    """Dotted and stable: what `summary.json` calls it, such as retrieval.text_to_image.r1."""
    value: float
    n: int
    """Queries, recordings, pictures or samples that the value is a mean over."""
    interval: tuple[float, float] | None = None
    """95 % bootstrap interval."""
    chance: float | None = None
    """The same figure of a method that looks at nothing; None where that means nothing."""
    chance_method: str = ""
    unit: Literal["share", "score"] = "share"
    """share: a part of a whole, shown in per cent. score: a number on a scale of its own, such as FID."""
    better: Literal["higher", "lower"] = "higher"
    modalities: tuple[str, ...] = ()
    """What the system was given."""
    direction: str = ""
    """query -> candidates, such as text -> image."""
    candidates: str = ""
    """What was searched, and how many of them."""
    rerank_k: int | None = None
    protocol: str = ""
    """Id of the way of measuring, as docs/evaluation.md explains it, such as recall/ties-shared or wer/corpus."""
    normaliser: str = ""
    note: str = ""

    def shown(self, value: float | None) -> str:
        """A value of this metric for people: a share in per cent, a score as a number, nothing as nothing."""
        return percent(value) if self.unit == "share" or value is None else f"{value:.4g}"

    @property
    def shown_interval(self) -> str:
        """The interval for people, such as 61.0 to 72.5."""
        if self.unit == "share" or self.interval is None:
            return percent_range(self.interval)
        return f"{self.interval[0]:.3g} to {self.interval[1]:.3g}"


@dataclass(frozen=True)
class Provenance:
    """What a result was measured with; enough to measure it again."""

    system: str
    model_sha256: str
    split_sha256: str
    samples: int
    seed: int
    command: str
    code_version: str
    tiny_networks: tuple[str, ...] = ()
    """Features that come from tiny networks: regions, audio, codes."""
    extractors: Mapping[str, Any] = field(default_factory=dict)
    split: str = ""
    """Name of the frozen split that the shards are a part of; `part` says which one."""
    part: str = ""
    split_keys_sha256: str = ""
    """Over the sorted keys that were evaluated: the same pictures in another extraction have the same."""
    origins: tuple[Origin, ...] = (UNKNOWN,)
    """Corpora that the records come from."""
    trained_on: History = ()
    """What the model saw, stage by stage."""
    regime: Regime = "unknown"
    precision: str = "float32"
    """Numbers that the model computes in."""
    text_limit: int | None = None
    """Longest text in tokens, [CLS] and [SEP] included."""
    packages: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"

    @property
    def seen(self) -> bool:
        """Whether the model was trained on this very folder."""
        return any(corpus.fingerprint == self.split_sha256 for stage in self.trained_on for corpus in stage.corpora)


class Findings(NamedTuple):
    """What an evaluation's `measure` returns. `absent` maps a metric that could not be measured to the reason.

    Examples are for the report: what went in and what came out, by key; pictures are paths relative to the results
    folder. `examples` are the first of the split, never chosen; `worst` those that failed worst, the worst one first.
    """

    metrics: Sequence[Metric]
    absent: Mapping[str, str] = {}
    examples: Sequence[Mapping[str, Any]] = ()
    worst: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Result:
    """The findings of one task with what they were measured with: the content of a file."""

    task: str
    metrics: tuple[Metric, ...]
    provenance: Provenance
    seconds: float
    absent: Mapping[str, str] = field(default_factory=dict)
    examples: Sequence[Mapping[str, Any]] = ()
    worst: Sequence[Mapping[str, Any]] = ()


def measured(
    name: str,
    values: np.ndarray,
    seed: int,
    sizes: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    **fields: Any,
) -> Metric:
    """The metric sum(values) / sum(sizes) (without sizes, the mean) with its interval; see `metrics.bootstrap`."""
    total = float(len(values) if sizes is None else np.sum(sizes))
    value = float(np.sum(values)) / total
    return Metric(name, value, len(values), bootstrap(values, seed, sizes, groups), **fields)


def write_result(result: Result, folder: Path) -> Path:
    """Write `<folder>/<task>.json`, complete or not at all, and return its path.

    Raises ValueError where it would not be what result.schema.json describes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.task}.json"
    text = json.dumps({"schema": SCHEMA, **dataclasses.asdict(result)}, indent=1, ensure_ascii=False, allow_nan=False)
    if wrong := _against_schema(json.loads(text)):
        raise ValueError(f"{path}: {wrong}")
    write_atomic(path, f"{text}\n".encode())
    return path


def read_result(path: Path) -> Result:
    """Read what `write_result` wrote. Raises UserError naming the place where it is not what the schema describes."""
    if not path.is_file():
        raise UserError(f"{path} is not there; expected a result, as `opt eval` writes it")
    content = read_json(path)
    if wrong := _against_schema(content) or _not_finite(content):
        raise UserError(f"{path} is not a result of this version ({wrong}); run the evaluation again")
    del content["schema"]
    return from_dict(Result, content, str(path))


def _against_schema(content: Any) -> str:
    """Where JSON's `content` is not what result.schema.json describes, and why: "metrics[3].value: ..."; else ""."""
    from jsonschema import Draft202012Validator  # a tenth of a second, for those who read or write a result
    from jsonschema.exceptions import best_match

    schema = json.loads(Path(__file__).with_name("result.schema.json").read_bytes())
    error = best_match(Draft202012Validator(schema).iter_errors(content))
    if error is None:
        return ""
    return f"{error.json_path.removeprefix('$').removeprefix('.') or 'the whole'}: {_short(error.message)}"


def _not_finite(content: Any) -> str:
    """That there is a NaN or an infinity in it, which Python's reader takes and JSON does not know; else ""."""
    try:
        json.dumps(content, allow_nan=False)
    except ValueError:
        return "it holds NaN or infinity"
    return ""


def _short(message: str) -> str:
    return message if len(message) <= 160 else f"{message[:80]} ... {message[-60:]}"


def results_table(results: Sequence[Result]) -> str:
    """A plain table of all figures: value, interval, chance, n; absent ones with their reason."""
    rows = [("", "value", "95 % interval", "chance", "n")]
    rows += [
        (metric.name, metric.shown(metric.value), metric.shown_interval, metric.shown(metric.chance), str(metric.n))
        for result in results
        for metric in result.metrics
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(cells))
        for cells in ([*zip(row, widths, strict=True)] for row in rows)
    ]
    lines += [f"{name}: absent, {reason}" for result in results for name, reason in result.absent.items()]
    return "\n".join(line.rstrip() for line in lines)


def percent(share: float | None) -> str:
    """A share in per cent with one digit, or nothing."""
    return "" if share is None else f"{100 * share:.1f} %"


def percent_range(interval: tuple[float, float] | None) -> str:
    """An interval in per cent, such as 61.0 to 72.5, or nothing."""
    return "" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def code_version() -> str:
    """The package's version, and the commit when it runs from a git work tree (`+` when files were changed)."""
    folder = Path(opt.__file__).parent
    if not (folder.parent / ".git").exists():
        return opt.__version__
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--match="]
    described = subprocess.run(command, capture_output=True, text=True)
    return f"{opt.__version__} ({described.stdout.strip()})" if described.returncode == 0 else opt.__version__


def command_line(verb: str, config: Any) -> str:
    """The command that repeats this evaluation: folders first, then every option that is not its default."""
    words, options = ["opt", "eval", verb], []
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        default = entry.default_factory() if entry.default_factory is not dataclasses.MISSING else entry.default
        if default is dataclasses.MISSING:
            words.append(str(value))
        elif value != default:
            values = value if isinstance(value, tuple) else (value,)
            options += [f"--{entry.name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words + options)
