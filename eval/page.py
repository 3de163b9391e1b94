"""The report's page: header, headlines, the sections of the results, training, what is absent, provenance.

Nothing here reads anything but the style sheet and pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.curves import training
from eval.markup import Markup, element, joined, whisker
from eval.result import percent
from eval.sections import TITLES, Run, captions, drawings, gallery, probe, questions, retrieval, table, transcription

HEADLINES = {
    "retrieval.text_to_image.r1": "text → image, right picture first",
    "retrieval.audio_to_text.r1": "audio → text, right caption first",
    "transcribe.wer": "word error rate of transcripts",
    "caption.object_hit": "captions that name a right object",
    "classify.map.text_image_audio": "mean average precision, all three",
    "text_to_image.object_found": "generated pictures with a named object",
}


def page(run: Run) -> str:
    """The whole HTML document."""
    sections = [
        header(run), headlines(run), retrieval(run), transcription(run), captions(run), gallery(run), drawings(run),
        questions(run), probe(run), training(run), absent(run), provenance(run),
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
        own = any(p.split_sha256 == run.config.get("data") for p in provenances)
        facts.append(
            f"judged on {max(p.samples for p in provenances):,} samples" + (" it was trained on" if own else "")
        )
    tiny = sorted({word for provenance in provenances for word in provenance.tiny_networks})
    note = tiny and element(
        "p",
        element("b", "Tiny networks. "),
        f"The features ({', '.join(tiny)}) come from small networks that ship with this project. The figures say how "
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


def absent(run: Run) -> Markup | None:
    """What could not be measured, and why. (Only a model tuned for questions has answers.)"""
    missing = [(name, reason) for result in run.results.values() for name, reason in result.absent.items()]
    missing += [(task, "this evaluation was not run") for task in TITLES if task not in run.results and task != "vqa"]
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
