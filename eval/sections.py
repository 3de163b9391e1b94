"""The sections of the report that show results: one function each, from a run to markup.

A section gives None when its result is missing, and the page leaves it out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.markup import Markup, difference, element, joined, picture, whisker
from eval.metrics import align, normalise
from eval.result import Metric, Result, percent, percent_range

TITLES = {
    "retrieval": "Retrieval",
    "transcribe": "Transcription",
    "caption": "Captions",
    "text_to_image": "Pictures from text",
    "classify": "Linear probe",
    "vqa": "Questions",
}
WORDS = {
    "transcribe.wer": "word error rate, from speech alone",
    "transcribe.wer_image_audio": "word error rate, from speech and picture",
    "caption.object_hit": "captions that name an object that is there",
    "caption.object_precision": "named objects that are there",
    "caption.word_f1": "words shared with the reference captions (F1)",
    "text_to_image.object_found": "a named object is found in the generated picture",
    "text_to_image.object_found_true_codes": "the same in the true picture, decoded from its codes",
    "text_to_image.object_found_real": "the same in the true picture",
    "vqa.accuracy": "questions answered rightly (VQA accuracy)",
    "vqa.accuracy.yes_no": "those answered by yes or no",
    "vqa.accuracy.number": "those answered by a number",
    "vqa.accuracy.other": "all others",
}
GAINS = {
    "retrieval.gain.text_audio_over_text.r1": "R@1 of the picture, by text + audio − by text",
    "retrieval.gain.text_audio_over_text.r5": "R@5",
    "retrieval.gain.text_audio_over_text.r10": "R@10",
    "transcribe.wer_gain.image": "speech alone − speech and picture",
    **{f"classify.gain_over.{name}": f"all three − {name} alone" for name in ("text", "image", "audio")},
}
"""Paired differences, in words."""
RAW = {"text": "word counts", "image": "mean region", "audio": "mean frame"}
"""Raw features that are probed without any model."""
SAMPLES = 12
"""Cards in the gallery; the result files hold more."""


@dataclass(frozen=True)
class Run:
    """Everything the page shows. `pictures` is the results folder that example pictures are relative to."""

    name: str
    pictures: Path
    results: Mapping[str, Result]
    training: Sequence[Mapping[str, Any]] = ()
    validation: Sequence[Mapping[str, Any]] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


def table(heads: Sequence[Any], rows: Sequence[Markup]) -> Markup:
    """A table that scrolls sideways on narrow screens."""
    head = element("thead", element("tr", [element("th", cell, scope="col") for cell in heads]))
    return element("div", element("table", head, element("tbody", rows)), class_="scroll")


def _score(metric: Metric) -> list[Markup]:
    return [
        element("td", element("b", percent(metric.value))),
        element("td", whisker(metric.value, metric.interval, metric.chance, max(1.0, metric.value))),
        element("td", percent_range(metric.interval)),
        element("td", percent(metric.chance), title=metric.chance_method),
        element("td", f"{metric.n:,}"),
    ]


def figures(metrics: Sequence[Metric], labels: Mapping[str, str] = WORDS) -> Markup:
    """One row a metric: words, value, bar, interval, chance, n."""
    rows = [element("tr", element("td", labels.get(m.name, m.name)), _score(m)) for m in metrics]
    return table(["", "", "", "95 % interval", "chance", "n"], rows)


def gains(metrics: Sequence[Metric], labels: Mapping[str, str]) -> Markup:
    """One row a paired difference, in points: words, value, dot on a line with nought in the middle, interval."""
    reach = max([abs(end) for gain in metrics for end in gain.interval or ()], default=1.0) or 1.0
    rows = [
        element(
            "tr",
            element("td", labels.get(gain.name, gain.name)),
            element("td", element("b", points(gain.value))),
            element("td", difference(gain.value, gain.interval or (gain.value, gain.value), reach)),
            element("td", percent_range(gain.interval)),
        )
        for gain in metrics
    ]
    return table(["", "", "", "95 % interval, paired"], rows)


def points(share: float) -> str:
    """A difference of shares in points, with its sign."""
    return f"{100 * share:+.1f}"


def retrieval(run: Run) -> Markup | None:
    """Recall by direction, by alignment and re-ranked, then a few searches as pictures."""
    result = run.results.get("retrieval")
    if result is None:
        return None
    rows = []
    found = {metric.name: metric for metric in result.metrics if metric.name not in GAINS}
    more = [metric for metric in result.metrics if metric.name in GAINS]
    for first in (metric for metric in found.values() if metric.name.endswith((".r1", ".r1_reranked"))):
        reranked = first.name.endswith("_reranked")
        base, suffix = first.name.rsplit(".", 1)[0], "_reranked" if reranked else ""
        deeper = [found[f"{base}.r{depth}{suffix}"] for depth in (5, 10)]
        label = f"best {first.rerank_k} re-ranked by matching" if reranked else first.direction.replace("->", "→")
        cells = [element("td", element("b", percent(first.value))),
                 element("td", whisker(first.value, first.interval, first.chance)),
                 element("td", percent_range(first.interval))]  # fmt: skip
        cells += [element("td", percent(metric.value)) for metric in deeper]
        cells.append(element("td", percent(first.chance), title=first.chance_method))
        cells.append(element("td", f"{first.n} in {first.candidates.split()[0]}", title=first.candidates))
        rows.append(element("tr", element("td", label), cells, class_="second" if reranked else None))
    searches = [
        element(
            "div",
            element("p", f"“{example['text']}”"),
            element("div", [
                picture(run.pictures, hit["picture"], class_="hit" if hit["right"] else "") for hit in example["found"]
            ], class_="row"),
            class_="query",
        )
        for example in result.examples
    ]  # fmt: skip
    shown = [
        element("h3", "The first captions of the split and the pictures found for them, best first"),
        element("div", searches, class_="queries"),
    ]
    coinciding = result.metrics[0].candidates.partition("; ")[2]
    return joined([
        element("h2", TITLES["retrieval"]),
        element("p", "A caption, a recording or a picture is the query. R@k is the share of queries with a right "
                "candidate among the first k; equal scores share their rank.", class_="hint"),
        table(["", "R@1", "", "95 % interval", "R@5", "R@10", "chance", "queries"], rows),
        element("p", f"{coinciding}, so that nobody could tell them apart.", class_="hint") if coinciding else None,
        [element("h3", "What the recording adds to the caption, in points"), gains(more, GAINS)] if more else None,
        shown if searches else None,
    ])  # fmt: skip


def transcription(run: Run) -> Markup | None:
    """Word error rates."""
    section = _plain(run, "transcribe", "Lower is better. The text is written by the decoder; chance is handing each "
                     "recording the caption of another picture.")  # fmt: skip
    if section is None:
        return None
    more = [metric for metric in run.results["transcribe"].metrics if metric.name in GAINS]
    heading = element("h3", "What the picture spares, in points of word error rate")
    return joined([section, heading, gains(more, GAINS)]) if more else section


def captions(run: Run) -> Markup | None:
    """Captions by the objects and the words in them."""
    return _plain(run, "caption", "Written from the picture alone. Chance: the same captions dealt to other pictures.")


def questions(run: Run) -> Markup | None:
    """VQA accuracy, and the first questions with the model's answers."""
    section = _plain(run, "vqa", "Chance: always the most frequent answer.")
    if section is None:
        return None
    shown = [_question(run, example) for example in run.results["vqa"].examples[:SAMPLES]]
    return joined([section, element("div", shown, class_="gallery")])


def _question(run: Run, example: Mapping[str, Any]) -> Markup:
    rows = [("question", example["question"]), ("answer", example["answer"]), ("true", ", ".join(example["answers"]))]
    terms = [[element("dt", term), element("dd", text)] for term, text in rows]
    return element("div", picture(run.pictures, example.get("picture")), element("dl", terms), class_="sample")


def _plain(run: Run, task: str, hint: str) -> Markup | None:
    result = run.results.get(task)
    if result is None or not result.metrics:
        return None
    levels = [metric for metric in result.metrics if metric.name not in GAINS]
    return joined([element("h2", TITLES[task]), element("p", hint, class_="hint"), figures(levels)])


def gallery(run: Run) -> Markup | None:
    """Pictures with true caption, generated caption and transcript, its errors marked."""
    entries: dict[str, dict[str, Any]] = {}
    for task in ("caption", "transcribe"):
        result = run.results.get(task)
        for example in result.examples if result else ():
            entries.setdefault(example["key"], {}).update(example)
    if not entries:
        return None
    samples = [_sample(run, entry) for entry in list(entries.values())[:SAMPLES]]
    hint = element("p", "The first of the split, not chosen. In transcripts, ", element("ins", "these words"),
                   " were written wrongly and ", element("del", "these"), " were said instead or left out.",
                   class_="hint")  # fmt: skip
    return joined([element("h2", "Samples"), hint, element("div", samples, class_="gallery")])


def _sample(run: Run, entry: Mapping[str, Any]) -> Markup:
    references = [entry["reference"]] if "reference" in entry else entry.get("references", [])[:1]
    rows = [("true caption", text) for text in references]
    if "caption" in entry:
        rows.append(("caption from the picture", entry["caption"]))
    for given, hypothesis in entry.get("hypotheses", {}).items():
        rows.append((f"transcript from {given}", marked(entry["reference"], hypothesis)))
    if entry.get("labels"):
        rows.append(("objects in the picture", ", ".join(entry["labels"])))
    terms = [[element("dt", term), element("dd", text)] for term, text in rows]
    return element("div", picture(run.pictures, entry.get("picture")), element("dl", terms), class_="sample")


def marked(reference: str, hypothesis: str) -> Markup:
    """The normalised transcript with wrong words in <ins> and what was said instead in <del>."""
    pieces: list[Any] = []
    for edit in align(normalise(reference).split(), normalise(hypothesis).split()):
        if edit.kind == "equal":
            pieces.append(edit.hypothesis)
        else:
            pieces += [element("del", edit.reference)] if edit.reference else []
            pieces += [element("ins", edit.hypothesis)] if edit.hypothesis else []
        pieces.append(" ")
    return joined(pieces)


def drawings(run: Run) -> Markup | None:
    """Generated pictures beside the true ones."""
    result = run.results.get("text_to_image")
    if result is None:
        return None
    kinds = {"generated": "generated", "true_codes": "true codes", "picture": "true"}
    pairs = [
        element(
            "div",
            element("div", [
                element("div", picture(run.pictures, example.get(kind)), element("div", words, class_="names"))
                for kind, words in kinds.items()
            ], class_="row"),
            element("p", example["text"]),
            class_="pair",
        )
        for example in result.examples
    ]  # fmt: skip
    hint = "Codes are drawn from the caption alone and decoded to 64 × 64 pixels; the region detector looks at them. "
    return joined([
        element("h2", TITLES["text_to_image"]),
        element("p", f"{hint}Chance: the same pictures judged by the captions of others.", class_="hint"),
        figures(result.metrics) if result.metrics else None,
        element("div", pairs, class_="pairs"),
    ])  # fmt: skip


def probe(run: Run) -> Markup | None:
    """mAP of every subset of modalities, and what all three gain over each one."""
    result = run.results.get("classify")
    if result is None or not result.metrics:
        return None
    scores, raw, over, added = (
        [metric for metric in result.metrics if metric.name.startswith(f"classify.{kind}.")]
        for kind in ("map", "baseline", "gain_over", "gain")
    )
    labels = {metric.name: " + ".join(metric.modalities) for metric in scores}
    labels |= {metric.name: f"no model: {_raw(metric)}" for metric in raw}
    return joined([
        element("h2", TITLES["classify"]),
        element("p", "Mean average precision of a linear classifier on frozen features: which objects are in the "
                f"picture? {scores[0].candidates}.", class_="hint"),
        figures([*scores, *raw], labels),
        [element("h3", "What all three know beyond one, in points"), gains(over, GAINS)] if over else None,
        _added(added) if added else None,
    ])  # fmt: skip


def _raw(metric: Metric) -> str:
    """The raw features of a baseline in words."""
    return " + ".join(RAW[modality] for modality in metric.modalities)


def _added(metrics: Sequence[Metric]) -> Markup:
    """What each modality adds to each choice of the others, one row a modality; the model over raw features below."""
    models: list[Metric] = []
    cells: dict[str, list[Markup]] = {}
    for metric in metrics:
        less = metric.name.partition("_over_")[2].split("_")
        if not set(less) < set(metric.modalities):
            models.append(metric)
            continue
        (new,) = set(metric.modalities).difference(less)
        value = element("b", points(metric.value))
        ends = element("span", percent_range(metric.interval), class_="range")
        cells.setdefault(new, []).append(element("td", f"to {' + '.join(less)}: ", value, ends))
    rows = [element("tr", element("td", f"+ {name}"), row) for name, row in cells.items()]
    labels = {metric.name: f"{' + '.join(metric.modalities)}, over {_raw(metric)}" for metric in models}
    more = element("h3", "What the model adds to its raw features, in points")
    return joined([
        [element("h3", "What each modality adds, in points"), table(["", "", "", ""], rows)] if rows else None,
        [more, gains(models, labels)] if models else None,
    ])  # fmt: skip
