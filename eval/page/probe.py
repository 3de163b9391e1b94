"""The section on probes: what can be read off frozen features of every subset of modalities."""

from __future__ import annotations

from collections.abc import Sequence

from eval.page.cards import sample, worst
from eval.page.figures import figures, gains, points, section
from eval.page.markup import Markup, element, joined, table
from eval.page.run import Run
from eval.page.words import HINTS, TITLES, less
from eval.result import Metric, percent_range


def probe(run: Run) -> Markup | None:
    """mAP of every subset of modalities, and what all three gain over each one."""
    result = run.results.get("classify")
    if result is None or not result.metrics:
        return None
    over = [metric for metric in result.metrics if metric.name.startswith("classify.gain_over.")]
    added = [metric for metric in result.metrics if metric.name.startswith("classify.gain.")]
    looked = [metric for metric in result.metrics if metric.name.startswith("classify.attention.gain.")]
    levels = [metric for metric in result.metrics if metric not in (*over, *added, *looked)]
    judged = f"{levels[0].candidates}." if levels and levels[0].candidates else ""
    return section(
        TITLES["classify"], f"{HINTS['classify']} {judged}",
        figures(levels) if levels else None,
        [element("h3", "What all three know beyond one, in points"), gains(over)] if over else None,
        _added(added) if added else None,
        [element("h3", "What a pooler that learned to look adds, in points"), gains(looked)] if looked else None,
        worst(run.pictures, result, sample),
    )  # fmt: skip


def _added(metrics: Sequence[Metric]) -> Markup:
    """What each modality adds to each choice of the others, one row a modality; the model over raw features below."""
    models: list[Metric] = []
    cells: dict[str, list[Markup]] = {}
    for metric in metrics:
        over = less(metric)
        if over is None:
            models.append(metric)
            continue
        new = " + ".join(modality for modality in metric.modalities if modality not in over)
        value = element("span", points(metric.value), class_="value")
        ends = element("span", percent_range(metric.interval), class_="range")
        cells.setdefault(new, []).append(element("td", f"to {' + '.join(over)}: ", value, ends))
    rows = [element("tr", element("td", f"+ {name}"), row) for name, row in cells.items()]
    more = element("h3", "What the model adds to its raw features, in points")
    return joined([
        [element("h3", "What each modality adds, in points"), table(["", "", "", ""], rows)] if rows else None,
        [more, gains(models)] if models else None,
    ])  # fmt: skip
