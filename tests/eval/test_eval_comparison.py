"""Runs side by side: what is bold, what is compared with what, and that nothing given breaks the page."""

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image

from eval.page.compared import SIGNS, compare, reason
from eval.page.dots import Dot, Row, dot_plot, nice_top
from eval.page.figures import measured_by, shared_notes
from eval.page.reported import MARK, reported
from eval.page.run import Run
from eval.page.words import DIRECTIONS, PAPER, in_order, is_gain, words
from eval.report import ReportConfig, names, report
from eval.result import Metric, Provenance, Result, write_result
from opt.config import UserError

EVIL = '<script>alert("x")</script><img src=x onerror=y>'
PROVENANCE = Provenance("opt", "a" * 64, "b" * 64, 200, 0, "opt eval X", "0.1.0")
WER = Metric("transcribe.wer", 0.1, 200, (0.08, 0.12), 0.9, better="lower", protocol="wer/corpus")
HIT = Metric("caption.bleu4", 0.5, 200, (0.4, 0.6), 0.1, protocol="bleu/coco")


def run(metric, folder, name="run", **provenance):
    result = Result(metric.name.split(".")[0], (metric,), replace(PROVENANCE, **provenance), 1.0)
    return Run(name, folder, {result.task: result})


def row(tmp_path, *metrics, splits=()):
    runs = [run(metric, tmp_path, split_sha256=(splits[place] if splits else "b") * 64)
            for place, metric in enumerate(metrics)]
    (found,) = compare(runs, metrics[0].name.split(".")[0])
    return found


def measured(metric, value, low, high, **more):
    return replace(metric, value=value, interval=(low, high), **more)


@pytest.mark.parametrize(
    ("metric", "scores", "best"),
    [
        (HIT, [(0.5, 0.4, 0.6), (0.7, 0.61, 0.8)], 1),
        (HIT, [(0.5, 0.4, 0.6), (0.7, 0.6, 0.8)], None),  # touching is no distance
        (HIT, [(0.5, 0.4, 0.55), (0.7, 0.6, 0.8), (0.2, 0.0, 0.65)], None),  # the third is too uncertain
        (HIT, [(0.5, 0.4, 0.55), (0.7, 0.6, 0.8), (0.2, 0.0, 0.59)], 1),
        (WER, [(0.1, 0.08, 0.12), (0.2, 0.15, 0.25)], 0),
        (WER, [(0.1, 0.08, 0.16), (0.2, 0.15, 0.25)], None),
        (HIT, [(0.9, 0.8, 1.0)], None),  # nobody beside it
        (replace(HIT, name="caption.gain.x"), [(0.1, 0.0, 0.2), (0.9, 0.8, 1.0)], None),
    ],
)
def test_the_best_is_bold_only_beyond_all_other_intervals(tmp_path, metric, scores, best):
    assert row(tmp_path, *(measured(metric, *score) for score in scores)).best == best


def test_without_an_interval_nothing_is_bold(tmp_path):
    assert row(tmp_path, measured(HIT, 0.9, 0.8, 1.0), replace(HIT, value=0.1, interval=None)).best is None


@pytest.mark.parametrize(
    ("other", "sign"),
    [({"protocol": "bleu/own"}, "b"), ({"normaliser": "none"}, "b"), ({"rerank_k": 5}, "b"),
     ({"candidates": "5 pictures"}, "c"), ({"n": 199}, "d")],
)
def test_what_was_measured_in_another_way_is_marked_and_compared_with_nothing(tmp_path, other, sign):
    high = measured(HIT, 0.9, 0.88, 0.92, **other)
    found = row(tmp_path, measured(HIT, 0.5, 0.4, 0.6), high)
    assert found.signs == ("", sign) and found.best is None
    found = row(tmp_path, measured(HIT, 0.5, 0.4, 0.6), measured(HIT, 0.2, 0.1, 0.3), high)
    assert found.signs == ("", "", sign) and found.best == 0 and high not in found.equals


def test_another_split_is_never_the_best_and_most_runs_decide_which_it_is(tmp_path):
    scores = [measured(HIT, 0.9, 0.88, 0.92), measured(HIT, 0.5, 0.4, 0.6), measured(HIT, 0.2, 0.1, 0.3)]
    assert row(tmp_path, *scores, splits="bcc").signs == ("a", "", "")
    assert row(tmp_path, *scores, splits="bcc").best == 1
    assert row(tmp_path, *scores[:2], splits="bc").signs == ("", "a")


def test_other_features_of_the_same_samples_are_the_same_split(tmp_path):
    runs = [run(measured(HIT, value, value - 0.1, value + 0.1), tmp_path, split_sha256=shards * 64,
                split_keys_sha256="d" * 64) for value, shards in ((0.2, "b"), (0.8, "c"))]
    (found,) = compare(runs, "caption")
    assert found.signs == ("", "") and found.best == 1


def test_a_gap_says_its_reason(tmp_path):
    result = Result("caption", (HIT,), PROVENANCE, 1.0, {"caption.meteor": "no java", "caption": "no captions"})
    one = Run("one", tmp_path, {"caption": result})
    assert reason(one, "caption", "caption.meteor") == "no java"
    assert reason(one, "caption", "caption.spice") == "no captions"
    assert reason(one, "classify", "classify.map.text") == "this evaluation was not run"
    assert "no such figure" in reason(replace(one, results={"caption": replace(result, absent={})}), "caption", "x")


# ---- the page -------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Elements that open and close in order; every table lies in a box that scrolls."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.bold, self.names = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "table":
            assert self.open[-1] == ("div", "scroll") or self.open[-1][1].startswith("scroll ")
        if tag not in ("meta", "img"):
            self.open.append((tag, dict(attrs).get("class", "")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if any(tag == "b" for tag, _ in self.open) and any(tag == "td" for tag, _ in self.open):
            self.bold.append(data)


def write(folder, *metrics, training=0, absent=None, examples=(), worst=(), **provenance):
    for task in dict.fromkeys(metric.name.split(".")[0] for metric in metrics):
        some = tuple(metric for metric in metrics if metric.name.startswith(f"{task}."))
        about = replace(PROVENANCE, **provenance)
        write_result(Result(task, some, about, 1.0, absent or {}, examples, worst), folder / "results")
    folder.mkdir(exist_ok=True)
    if training:
        lines = [{"step": step, "loss": 5 / step, "losses": {"mlm": 3 / step}} for step in range(1, training)]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def page_of(folders, tmp_path):
    report(ReportConfig(tuple(folders), tmp_path / "out.html"))
    return (tmp_path / "out.html").read_text()


def test_runs_side_by_side_make_one_page_that_needs_nothing(tmp_path, monkeypatch, capsys):
    score = Metric("text_to_image.fid_tiny", 23.4, 200, (22.0, 24.0), unit="score", better="lower")
    first = write(tmp_path / "first", HIT, WER, score, training=30)
    better = [measured(HIT, 0.81, 0.75, 0.85), WER, replace(score, value=30.5, interval=(29.0, 31.0))]
    second = write(tmp_path / "second", *better, training=20, absent={"caption.meteor": "no java"})
    third = write(tmp_path / "third", measured(HIT, 0.97, 0.95, 0.99), split_sha256="c" * 64)
    monkeypatch.chdir(tmp_path)
    report(ReportConfig((first, second, third)))
    text = (tmp_path / "comparison.html").read_text()
    page = Page(text)
    assert page.bold == ["81.0 %", "23.4"]
    assert "97.0 %<sup>a</sup>" in text and SIGNS["split"][1] in text and "overlaps that of no other run" in text
    assert "this evaluation was not run" in text and f"OPT, Table 4: {MARK}" in text and "31.4 %" in text
    assert text.count("polyline") > 3 and "<figcaption>mlm</figcaption>" in text
    assert not re.search(r"""(href|src|url)\s*[=(]\s*["']?(https?:|//|\.|/)""", text) and "script" not in page.tags
    said = capsys.readouterr().out
    assert "first: 3 figures of 3 evaluations, 29 lines of training" in said and "comparison.html" in said


def test_plots_share_an_axis_where_figures_have_one(tmp_path):
    fid, cider = (Metric(name, value, 9, (value, value), unit=unit, protocol="p", better=better)
                  for name, value, unit, better in (("caption.fid_tiny", 3.0, "score", "lower"),
                                                    ("caption.cider_d", 1.3, "share", "higher")))
    metrics = [HIT, replace(HIT, name="caption.bleu3"), cider, fid, replace(fid, name="caption.fid_tiny_real")]
    text = page_of([write(tmp_path / "one", *metrics), write(tmp_path / "two", *metrics)], tmp_path)
    axes = re.findall(r'<div class="axis"><span>([^<]*)</span><span>([^<]*)</span>', text)
    assert axes == [("0", "60 %"), ("0", "150 %"), ("0", "3")]


def test_the_papers_figures_are_grey_even_where_they_are_better(tmp_path):
    low = [measured(HIT, 0.01, 0.0, 0.02, note="greedy"), measured(HIT, 0.1, 0.09, 0.11, note="4 beams; 7 errors")]
    text = page_of([write(tmp_path / str(place), metric) for place, metric in enumerate(low)], tmp_path)
    assert re.search(r'<td class="reported"[^>]*>39.1 %</td>', text) and Page(text).bold == ["10.0 %"]
    assert "greedy (1) · 4 beams (2)" in text


def test_a_run_without_anything_is_named_beside_others(tmp_path):
    (tmp_path / "empty").mkdir()
    text = page_of([write(tmp_path / "full", HIT), tmp_path / "empty"], tmp_path)
    assert "empty: neither result nor training is in its folder" in text
    with pytest.raises(UserError, match="none of the folders holds"):
        page_of([tmp_path / "empty", write(tmp_path / "more")], tmp_path)


def test_wrong_runs_are_sentences(tmp_path):
    full = write(tmp_path / "full", HIT)
    with pytest.raises(UserError, match="nowhere is no folder"):
        page_of([full, tmp_path / "nowhere"], tmp_path)
    with pytest.raises(UserError, match="given twice"):
        page_of([full, tmp_path / "full" / ".." / "full"], tmp_path)
    with pytest.raises(UserError, match="no RUN given"):
        report(ReportConfig())
    broken = write(tmp_path / "broken", HIT)
    (broken / "results" / "caption.json").write_text('{"schema": 2, "task"')
    with pytest.raises(UserError, match=r"broken/results/caption.json is damaged"):
        page_of([full, broken], tmp_path)


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    ends = names([tmp_path / "a" / "model", tmp_path / "b" / "model", tmp_path / "c"])
    assert ends == ["a/model", "b/model", "c"]
    assert names([tmp_path / "x" / "r", tmp_path / "r"])[0] == "x/r"


def test_thirty_runs_with_hostile_names_make_a_page(tmp_path):
    folders = []
    for place in range(30):
        metric = measured(HIT, place / 40, place / 40 - 0.01, place / 40 + 0.01, note=EVIL, candidates=EVIL)
        folder = tmp_path / f"{place} <b>{'long' * 20}&"
        folders.append(write(folder, metric, replace(metric, name=f"caption.{EVIL}"), training=5,
                             absent={EVIL: EVIL}, command=EVIL, system=EVIL))
    text = page_of(folders, tmp_path)
    page = Page(text)
    assert "<script" not in text and "<img" not in text and "&lt;script&gt;" in text
    assert page.bold == ["72.5 %"] * 2 and "The same as a plot" in text and "dash-3" in text


def test_one_run_can_be_written_elsewhere(tmp_path):
    report(ReportConfig((write(tmp_path / "one", HIT),), tmp_path / "page.html"))
    assert "<h2>Captions</h2>" in (tmp_path / "page.html").read_text()
    assert not (tmp_path / "one" / "report.html").exists() and (tmp_path / "one" / "summary.json").exists()


# ---- the page of one run: what is new on it -------------------------------------------------------------------------


def single(folder):
    report(ReportConfig((folder,)))
    text = (folder / "report.html").read_text()
    Page(text)
    return text


def recalls(direction, way="", value=0.5):
    about = {"candidates": "200 captions; 0 of 200", "rerank_k": 20 if way == "_two_stage" else None}
    return [Metric(f"retrieval.{direction}.r{depth}{way}", value, 200, (value - 0.1, value + 0.1), 0.1, **about)
            for depth in (1, 5, 10)]


def test_all_directions_stand_in_order_with_all_ways_of_searching(tmp_path):
    metrics = [metric for name in reversed(DIRECTIONS) for metric in recalls(name)]
    metrics += recalls("image_to_text", "_two_stage", 0.612) + recalls("image_to_text", "_all_pairs", 0.634)
    metrics.append(Metric("retrieval.image_text.mean", 0.4321, 200, (0.4, 0.5)))
    text = single(write(tmp_path / "run", *metrics))
    table = text[text.index('class="scroll recalls"'):]
    table = table[: table.index("</table>")]
    found = re.findall(r"<tr><td>([^<]*→[^<]*)</td>", table)
    assert found == [" → ".join(side.replace("_", " + ") for side in name.split("_to_")) for name in DIRECTIONS]
    assert table.index("text + audio → image") < table.index("does not have") < table.index(">image → audio<")
    (line,) = re.findall(r"<tr><td>image → text</td>.*?</tr>", table)
    assert re.findall(r"(\d+\.\d %)<", line)[:9] == ["50.0 %"] * 3 + ["61.2 %"] * 3 + ["63.4 %"] * 3
    assert "the best 20 by alignment" in text and "43.2 %" in text and "in two stages" in text
    assert re.search(r'class="reported"[^>]*><td>OPT, Table 3.*?39.4 %', table)


def test_what_failed_worst_is_shown_with_its_failure(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    run = write(
        tmp_path / "run", Metric("nlvr2.accuracy", 0.6, 50, (0.5, 0.7), 0.5), Metric("odd.new_thing", 0.25, 50),
        examples=[{"key": "k", "pictures": ["k.jpg", "k.jpg"], "question": EVIL, "answer": True, "answers": [1, {}]}],
        worst=[{"key": "k", "picture": 3, "failure": f"all wrong {EVIL}", "text": ["x"]}],
    )
    (run / "results" / "k.jpg").write_bytes(buffer.getvalue())
    text = single(run)
    assert text.count("<h3>Failed worst</h3>") == 2 and "all wrong &lt;script" in text and "<script" not in text
    assert '<div class="two"><img' in text and "<h2>odd</h2>" in text and "odd.new_thing" in text
    assert "<h2>True or false of two pictures</h2>" in text and "<dd>true</dd>" in text
    judged = text[text.index("<h2>True or false") : text.index("<h2>odd</h2>")]
    assert "<dt>statement</dt>" in judged and "<dt>question</dt>" not in judged


@pytest.mark.parametrize("odd", [None, 3, "text", True, [], [1], {}, [{"a": None}], {"a": ["b"]}])
def test_examples_of_odd_shapes_make_a_page(tmp_path, odd):
    fields = ("key", "text", "picture", "pictures", "found", "references", "reference", "hypotheses", "caption",
              "labels", "question", "answer", "answers", "generated")
    examples = [dict.fromkeys(fields, odd), *({field: odd} for field in fields)]
    worst = [one | {"failure": "bad"} for one in examples]
    for task in ("retrieval", "transcribe", "caption", "text_to_image", "vqa", "nlvr2", "classify", "unknown"):
        write(tmp_path / "run", Metric(f"{task}.figure", 0.5, 9), examples=examples, worst=worst)
    assert single(tmp_path / "run").count("Failed worst") == 8


def test_words_taken_for_others_are_shown(tmp_path):
    run = write(tmp_path / "run", WER)
    counts = {"words": 1200, "substitutions": 27, "deletions": 13, "insertions": 5}
    path = run / "results" / "confusions.json"
    path.write_text(json.dumps({"audio": counts | {"confusions": [["orange", EVIL, 2], ["", "the", 1]]}}))
    text = single(run)
    assert "of 1,200 words: 27 taken for others" in text and "<del>orange</del><ins>&lt;script" in text
    assert "<li><ins>the</ins> 1 ×</li>" in text
    for wrong in ({"audio": counts}, {"audio": counts | {"confusions": [["a", "b"]]}}, {"audio": 3}, {"audio": None}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=r"confusions.json is not what `opt eval transcribe` writes"):
            single(run)


# ---- words, the paper's figures, plots ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("retrieval.text_audio_to_image.r5_two_stage", "text + audio → image, R@5, in two stages"),
        ("retrieval.image_to_text_audio.r1", "image → text + audio, R@1"),
        ("transcribe.cer_image_audio_whisper", "character error rate, from speech and picture, Whisper's normaliser"),
        ("transcribe.wer_raw", "word error rate, from speech alone, as written"),
        ("text_to_image.fid_tiny", "FID by the tiny network"),
        ("text_to_image.kid_tiny_true_codes", "KID by the tiny network, true pictures from their codes"),
        ("text_to_image.object_found_real", "a named object is found, true pictures"),
        ("text_to_image.new_thing", "text_to_image.new_thing"),
        ("retrieval.image_text.mean_two_stage", "mean recall at 1, 5 and 10 of image and text, in two stages"),
        ("classify.map_micro.text_audio", "text + audio, micro average"),
        ("caption.cider_d", "CIDEr-D"),
        ("caption.never_heard_of", "caption.never_heard_of"),
        ("retrieval.text_to_image.median_rank", "retrieval.text_to_image.median_rank"),
    ],
)
def test_figures_are_said_in_words_and_unknown_ones_by_their_name(name, said):
    assert words(Metric(name, 0.5, 1)) == said


def test_notes_that_half_of_the_figures_share_are_said_beneath_the_table():
    metrics = [replace(HIT, note=note) for note in ("greedy; 7 errors", "greedy; 8 errors", "", "9 errors")]
    assert shared_notes(metrics) == ["greedy"]
    said = measured_by([HIT, replace(HIT, normaliser="lower-case"), WER], ["greedy"])
    assert re.sub("<.*?>", "", said) == (
        "Protocol bleu/coco · wer/corpus. Normalised lower-case. Notes greedy. ")
    assert measured_by([replace(HIT, protocol="")], []) is None


def test_recalls_are_ordered_and_gains_known():
    shuffled = ["retrieval.text_to_image_audio.r1", "retrieval.other", "retrieval.text_to_image.r10",
                "retrieval.text_to_image.r5_two_stage", "retrieval.text_to_image.r1"]
    ordered = [metric.name for metric in in_order(Metric(name, 0.5, 1) for name in shuffled)]
    assert ordered == [shuffled[4], shuffled[2], shuffled[3], shuffled[0], shuffled[1]]
    assert is_gain(Metric("transcribe.wer_gain.image", 0.1, 1)) and not is_gain(Metric("caption.again", 0.1, 1))


def test_the_papers_figures_are_those_of_its_tables():
    (table,) = reported(["transcribe.wer"])
    assert table.figures == {"transcribe.wer": 0.3135, "transcribe.wer_image_audio": 0.3024}
    five = reported([f"retrieval.{name}.r1" for name in PAPER])
    assert [one.figures.get("retrieval.text_to_image.r1") for one in five] == [0.4196, 0.6406, 0.7358]
    assert five[0].figures["retrieval.text_audio_to_image.r10"] == 0.8578 and len(five[0].figures) == 15
    assert max(reported(["classify.map.text"])[0].figures.values()) == 0.5811
    assert reported(["caption.word_f1", "retrieval.text_to_image.r1_two_stage"]) == []


def test_plots_stay_in_their_frame():
    far = Dot(3.0, (-1.0, 9.0), "run-0", "far")
    plot = dot_plot([Row("<b>", [("1", [far])], chance=0.5), Row("none", [], chance=2.0)], 1.0, ("0", "1"))
    places = [float(number) for number in re.findall(r'(?:x1|x2|cx)="([-\d.]+)%"', plot)]
    assert places and all(0 <= place <= 100 for place in places) and "&lt;b&gt;" in plot
    assert plot.count('class="chance"') == 1  # one lies beyond the end
    below = dot_plot([Row("KID", [("1", [Dot(-0.5, (-1.0, 0.5), "run-0", "")])])], 1.0, ("-1", "1"), low=-1.0)
    assert 'cx="25.00%"' in below and 'x1="0.00%" x2="75.00%"' in below
    tops = [nice_top([value]) for value in (0.0, 0.13, 1.0, 1.26, 23.4, 0.011)]
    assert tops == pytest.approx([1.0, 0.15, 1.0, 1.5, 25, 0.015])
