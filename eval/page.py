"""The report's page: one function a section, each from results to markup. Nothing here reads anything but pictures.

A section gives None when its result is missing, and the page leaves it out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.markup import Markup, curve, difference, element, joined, picture, whisker
from eval.metrics import align, normalise
from eval.result import Metric, Result, percent, percent_range

TITLES = {
    "retrieval": "Retrieval",
    "transcribe": "Transcription",
    "caption": "Captions",
    "text_to_image": "Pictures from text",
    "classify": "Linear probe",
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
}
HEADLINES = {
    "retrieval.text_to_image.r1_reranked": "text → image, right picture first",
    "retrieval.audio_to_text.r1": "audio → text, right caption first",
    "transcribe.wer": "word error rate of transcripts",
    "caption.object_hit": "captions that name a right object",
    "classify.map.text_image_audio": "mean average precision, all three",
    "text_to_image.object_found": "generated pictures with a named object",
}

SAMPLES = 12
"""Cards in the gallery; the result files hold more."""


@dataclass(frozen=True)
class Run:
    """Everything the page shows. `pictures` is the results folder that example pictures are relative to."""

    name: str
    pictures: Path
    results: Mapping[str, Result]
    training: Sequence[Mapping[str, Any]] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


def page(run: Run) -> str:
    """The whole HTML document."""
    sections = [
        header(run), headlines(run), retrieval(run), transcription(run), captions(run), gallery(run), drawings(run),
        probe(run), training(run), absent(run), provenance(run),
    ]  # fmt: skip
    style = Markup((Path(__file__).with_name("page.css")).read_text(encoding="utf-8"))
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{run.name}: report"),
        element("style", style),
    )
    return f"<!doctype html>\n{element('html', head, element('body', sections), lang='en')}\n"


def header(run: Run) -> Markup:
    """Name, what was trained and on how much, and a plain word where networks were tiny."""
    provenances = [result.provenance for result in run.results.values()]
    facts = [str(run.config.get("system", provenances[0].system if provenances else "a run"))]
    if run.training:
        facts.append(f"{run.training[-1]['step']:,} training steps")
    if provenances:
        facts.append(f"judged on {max(p.samples for p in provenances):,} samples it has not seen")
    tiny = sorted({word for provenance in provenances for word in provenance.tiny_networks})
    note = tiny and element(
        "p",
        element("b", "Tiny networks. "),
        f"The features come from small networks that ship with this project ({', '.join(tiny)}). The figures say how "
        "well the whole line works, not what full-sized extractors reach.",
        class_="note",
    )
    return joined([element("h1", run.name), element("p", " · ".join(facts), class_="lead"), note or None])


def headlines(run: Run) -> Markup | None:
    """Six figures at a glance."""
    found = {metric.name: metric for result in run.results.values() for metric in result.metrics}
    cards = [
        element(
            "div",
            element("b", percent(found[name].value)),
            element("span", words, class_="what"),
            whisker(found[name].value, found[name].interval, found[name].chance),
            element("span", f"chance {percent(found[name].chance)}", class_="what"),
            class_="card",
        )
        for name, words in HEADLINES.items()
        if name in found
    ]
    legend = element(
        "p",
        "Bars run from 0 to 100 %. The thin line is the 95 % bootstrap interval, the mark ",
        element("span", class_="key"),
        " is chance: the same figure of a method that looks at nothing.",
        class_="hint",
    )
    return joined([element("div", cards, class_="cards"), legend]) if cards else None


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


def retrieval(run: Run) -> Markup | None:
    """Recall by direction, by alignment and re-ranked, then a few searches as pictures."""
    result = run.results.get("retrieval")
    if result is None:
        return None
    rows = []
    found = {metric.name: metric for metric in result.metrics}
    for first in (metric for metric in result.metrics if metric.name.endswith((".r1", ".r1_reranked"))):
        reranked = first.name.endswith("_reranked")
        base, suffix = first.name.rsplit(".", 1)[0], "_reranked" if reranked else ""
        deeper = [found[f"{base}.r{depth}{suffix}"] for depth in (5, 10)]
        label = f"best {first.rerank_k} re-ranked by matching" if reranked else first.direction.replace("->", "→")
        cells = [element("td", element("b", percent(first.value))),
                 element("td", whisker(first.value, first.interval, first.chance)),
                 element("td", percent_range(first.interval))]  # fmt: skip
        cells += [element("td", percent(metric.value)) for metric in deeper]
        cells.append(element("td", percent(first.chance), title=first.chance_method))
        cells.append(element("td", f"{first.n} / {first.candidates.split()[0]}", title=first.candidates))
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
        table(["", "R@1", "", "95 % interval", "R@5", "R@10", "chance R@1", "queries / candidates"], rows),
        element("p", f"{coinciding}, so that nobody could tell them apart.", class_="hint") if coinciding else None,
        shown if searches else None,
    ])  # fmt: skip


def transcription(run: Run) -> Markup | None:
    """Word error rates."""
    return _plain(run, "transcribe", "Lower is better. The text is written by the decoder; chance is handing each "
                  "recording the caption of another picture.")  # fmt: skip


def captions(run: Run) -> Markup | None:
    """Captions by the objects and the words in them."""
    return _plain(run, "caption", "Written from the picture alone. Chance: the same captions dealt to other pictures.")


def _plain(run: Run, task: str, hint: str) -> Markup | None:
    result = run.results.get(task)
    if result is None or not result.metrics:
        return None
    return joined([element("h2", TITLES[task]), element("p", hint, class_="hint"), figures(result.metrics)])


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
    hint = "Codes are drawn from the caption alone and decoded to 64 × 64 pixels; the region detector looks at them. Chance: the "
    return joined([
        element("h2", TITLES["text_to_image"]),
        element("p", f"{hint}same pictures judged by the captions of others.", class_="hint"),
        figures(result.metrics) if result.metrics else None,
        element("div", pairs, class_="pairs"),
    ])  # fmt: skip


def probe(run: Run) -> Markup | None:
    """mAP of every subset of modalities, and what all three gain over each one."""
    result = run.results.get("classify")
    if result is None or not result.metrics:
        return None
    scores = [metric for metric in result.metrics if metric.name.startswith("classify.map.")]
    gains = [metric for metric in result.metrics if metric.name.startswith("classify.gain_over.")]
    reach = max([abs(end) for gain in gains for end in gain.interval or ()], default=1.0) or 1.0
    rows = [
        element(
            "tr",
            element("td", f"all three − {gain.name.rpartition('.')[2]} alone"),
            element("td", element("b", f"{100 * gain.value:+.1f}")),
            element("td", difference(gain.value, gain.interval or (gain.value, gain.value), reach)),
            element("td", percent_range(gain.interval)),
        )
        for gain in gains
    ]
    return joined([
        element("h2", TITLES["classify"]),
        element("p", "Mean average precision of a linear classifier on frozen features: which objects are in the "
                f"picture? {scores[0].candidates}.", class_="hint"),
        figures(scores, {metric.name: " + ".join(metric.modalities) for metric in scores}),
        [element("h3", "What all three know beyond one, in points"),
         table(["", "", "", "95 % interval, paired"], rows)] if gains else None,
    ])  # fmt: skip


def training(run: Run) -> Markup | None:
    """One curve an objective."""
    if len(run.training) < 2:
        return None
    names = dict.fromkeys(name for line in run.training for name in line.get("losses", {}))
    series = {"loss, all objectives": [(line["step"], line["loss"]) for line in run.training]}
    for name in names:
        series[name] = [(line["step"], line["losses"][name]) for line in run.training if name in line["losses"]]
    charts = [curve(name, *zip(*points, strict=True)) for name, points in series.items() if len(points) > 1]
    last = run.training[-1]
    rates = sorted(line["tokens_per_second"] for line in run.training if "tokens_per_second" in line)
    facts = [f"{last['step']:,} steps"]
    facts += [f"{last['seconds'] / 60:.1f} minutes"] if "seconds" in last else []
    facts += [f"{rates[len(rates) // 2]:,.0f} tokens a second (median)"] if rates else []
    if "wait_share" in last:
        facts.append(
            f"{100 * sum(line['wait_share'] for line in run.training) / len(run.training):.1f} % waiting for data"
        )
    return joined([
        element("h2", "Training"),
        element("p", " · ".join(facts), class_="hint"),
        element("div", charts, class_="curves"),
    ])  # fmt: skip


def absent(run: Run) -> Markup | None:
    """What could not be measured, and why."""
    missing = [(name, reason) for result in run.results.values() for name, reason in result.absent.items()]
    missing += [(task, "this evaluation was not run") for task in TITLES if task not in run.results]
    entries = [element("li", element("code", name), f": {reason}") for name, reason in missing]
    return joined([element("h2", "Not measured"), element("ul", entries, class_="absent")]) if entries else None


def provenance(run: Run) -> Markup:
    """How to get these figures again: commands, versions, hashes, settings; where the time went."""
    rows = [
        element(
            "tr",
            element("td", TITLES.get(task, task)),
            element("td", element("code", result.provenance.command), class_="words"),
            element("td", f"{result.seconds:.1f} s"),
            element("td", str(result.provenance.seed)),
            element("td", element("code", result.provenance.model_sha256[:12]), title=result.provenance.model_sha256),
            element("td", element("code", result.provenance.split_sha256[:12]), title=result.provenance.split_sha256),
            element("td", element("code", result.provenance.code_version)),
        )
        for task, result in run.results.items()
    ]
    extractors = next((dict(result.provenance.extractors) for result in run.results.values()), {})
    blocks = {"Settings of the run": run.config, "Extractors of the features": extractors}
    times = [
        element("tr", element("td", name), element("td", f"{value:,.0f} s")) for name, value in run.seconds.items()
    ]
    return joined([
        element("h2", "How to get these figures again"),
        table(["", "command", "took", "seed", "model", "split", "code"], rows) if rows else None,
        [element("details", element("summary", title), element("pre", element("code", _pretty(values))))
         for title, values in blocks.items() if values],
        element("details", element("summary", "Where the time went"), table(["", "seconds"], times)) if times else None,
    ])  # fmt: skip


def _pretty(values: Mapping[str, Any], indent: str = "") -> str:
    """Nested settings, one a line."""
    lines = []
    for key, value in values.items():
        inner = isinstance(value, Mapping)
        lines.append(f"{indent}{key}:" if inner else f"{indent}{key}: {value}")
        if inner:
            lines.append(_pretty(value, indent + "  "))
    return "\n".join(lines)
