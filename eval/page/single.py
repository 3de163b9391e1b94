"""The page of one run: header, headlines, the sections of the results, training, what is absent, provenance."""

from __future__ import annotations

from eval.page.cards import statement
from eval.page.dots import whisker
from eval.page.markup import Markup, document, element, joined
from eval.page.probe import probe
from eval.page.provenance import not_measured, provenance
from eval.page.retrieval import retrieval
from eval.page.run import Run
from eval.page.sections import captions, drawings, others, plain, samples, transcription
from eval.page.training import training

HEADLINES = {
    "retrieval.text_to_image.r1": "text → image, right picture first",
    "retrieval.audio_to_text.r1": "audio → text, right caption first",
    "transcribe.wer": "word error rate of transcripts",
    "caption.object_hit": "captions that name a right object",
    "classify.map.text_image_audio": "mean average precision, all three",
    "text_to_image.object_found": "generated pictures with a named object",
    "vqa.accuracy": "questions answered rightly",
    "nlvr2.accuracy": "statements of two pictures judged rightly",
}


def page(run: Run) -> str:
    """The whole HTML document."""
    sections = [
        header(run), headlines(run), retrieval(run), transcription(run), captions(run), samples(run), drawings(run),
        plain(run, "vqa"), plain(run, "nlvr2", statement), plain(run, "zero_shot"), probe(run), *others(run),
        training(run), not_measured(run), provenance(run),
    ]  # fmt: skip
    return document(f"{run.name}: report", sections)


def header(run: Run) -> Markup:
    """Name, what was trained and on how much, and a plain word where networks were tiny."""
    provenances = [result.provenance for result in run.results.values()]
    facts = [str(run.config.get("system", provenances[0].system if provenances else "a run"))]
    if run.training:
        facts.append(f"{run.training[-1]['step']:,} training steps")
    if provenances:
        own = any(provenance.seen for provenance in provenances)
        facts.append(
            f"judged on {max(p.samples for p in provenances):,} samples" + (" it was trained on" if own else "")
        )
        facts += sorted({p.regime for p in provenances} - {"unknown"})
        facts += sorted({f"{p.split} {p.part}".strip() for p in provenances} - {""})
    return joined([element("h1", run.name), element("p", " · ".join(facts), class_="lead"), tiny(run)])


def tiny(*runs: Run) -> Markup | None:
    """A plain word where the features come from tiny networks."""
    networks = {word for run in runs for result in run.results.values() for word in result.provenance.tiny_networks}
    if not networks:
        return None
    return element(
        "p",
        element("b", "Tiny networks. "),
        f"The features ({', '.join(sorted(networks))}) come from small networks that ship with this project. The "
        "figures say how well the whole line works, not what full-sized extractors reach.",
        class_="note",
    )


def headlines(run: Run) -> Markup | None:
    """The figures that say most, at a glance."""
    found = run.found()
    cards = []
    for name, words in HEADLINES.items():
        if name not in found:
            continue
        metric = found[name]
        chance = None if metric.chance is None else element("span", f"chance {metric.shown(metric.chance)}",
                                                            class_="what")  # fmt: skip
        cards.append(element("div", element("b", metric.shown(metric.value)), element("span", words, class_="what"),
                             whisker(metric.value, metric.interval, metric.chance), chance, class_="card"))  # fmt: skip
    legend = element(
        "p",
        "Bars run from 0 to 100 %. The thin line is the 95 % bootstrap interval, the mark ",
        element("span", class_="key"),
        " is chance: the same figure of a method that looks at nothing.",
        class_="hint",
    )
    return joined([element("div", cards, class_="cards"), legend]) if cards else None
