"""The page: complete with everything, honest with little, and deaf to markup in captions."""

import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from eval.page.cards import marked
from eval.page.dots import whisker
from eval.page.lines import Line, curve, short
from eval.page.markup import Markup, element, picture
from eval.report import ReportConfig, report
from eval.result import Metric, Provenance, Result, measured, write_result
from opt.config import UserError

EVIL = '<script>alert("x")</script> & "quotes" <img src=x onerror=y>'
AUDIO = {"audio": {"weights": "tiny"}}
PROVENANCE = Provenance("opt", "a" * 64, "b" * 64, 200, 0, "opt eval X", "0.1.0", ("audio",), AUDIO)


def results():
    hits = (np.arange(200) % 4 > 0).astype(float)
    about = {
        "direction": "text -> image",
        "candidates": "200 distinct pictures; 4 of 200 captions also belong to another",
    }
    recalls = [
        measured(f"retrieval.text_to_image.r{depth}", hits, 0, chance=depth / 200, **about) for depth in (1, 5, 10)
    ]
    found = [{"picture": "pictures/k.jpg", "right": True}, {"picture": None, "right": False}]
    yield "retrieval", recalls, [{"key": "k", "text": EVIL, "rank": 1.0, "found": found}]
    wer = measured("transcribe.wer", hits, 0, sizes=hits + 9, chance=1.1, better="lower")
    spoken = {"key": "k", "picture": "pictures/k.jpg", "reference": EVIL, "hypotheses": {"audio": EVIL + " more"}}
    yield "transcribe", [wer], [spoken]
    described = {"key": "k", "picture": "pictures/k.jpg", "references": [EVIL], "caption": EVIL, "labels": [EVIL]}
    yield "caption", [measured("caption.object_hit", hits, 0, chance=0.3)], [described]
    drawn = {"key": "k", "text": EVIL, "picture": "pictures/k.jpg", "generated": "../../secret.png"}
    yield "text_to_image", [measured("text_to_image.object_found", hits, 0, chance=0.2)], [drawn]
    maps = [Metric(f"classify.map.{name}", 0.7, 200, (0.6, 0.8), 0.1, modalities=(name,)) for name in ("text", "audio")]
    asked = {"key": "k", "picture": "pictures/k.jpg", "question": EVIL, "answer": EVIL, "answers": [EVIL]}
    yield "vqa", [measured("vqa.accuracy", hits, 0, chance=0.3)], [asked]
    yield "classify", [*maps, Metric("classify.gain_over.text", 0.1, 200, (-0.05, 0.2))], []


def make_run(folder, tasks=None):
    (folder / "results" / "pictures").mkdir(parents=True)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    (folder / "results" / "pictures" / "k.jpg").write_bytes(buffer.getvalue())
    for task, metrics, examples in results():
        if tasks is None or task in tasks:
            absent = {f"{task}.more": EVIL}
            write_result(Result(task, tuple(metrics), PROVENANCE, 1.5, absent, examples), folder / "results")
    return folder


def write_training(folder, lines=30):
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(lines):
            losses = {"masked <b>words</b>": 3 / (step + 1), "flat": 1.0}
            line = {"step": step, "loss": 5 - step / 10, "losses": losses, "tokens_per_second": 9e3, "wait_share": 0.1}
            file.write(json.dumps(line | {"seconds": step}) + "\n")
        file.write('{"step": 30, "loss"')  # a kill cut this line short


class Balance(HTMLParser):
    """Every element that opens closes, in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_holds_everything_and_loads_nothing(tmp_path, capsys):
    run = make_run(tmp_path / "first")
    write_training(run)
    (run / "config.json").write_text(json.dumps({"system": "opt.tiny", "loop": {"steps": 30}}))
    (run / "seconds.json").write_text(json.dumps({"pretrain": 60, "total": 100.5}))
    report(ReportConfig((run,)))
    page = (run / "report.html").read_text()
    balance = Balance()
    balance.feed(page)
    assert not balance.open
    assert not any(tag in ("script", "link", "iframe") for tag, _ in balance.seen)
    sources = [attributes["src"] for tag, attributes in balance.seen if tag == "img"]
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"""(href|src|url)\s*[=(]\s*["']?(https?:|//|\.|/)""", page)
    for words in (
        "Retrieval",
        "Transcription",
        "Captions",
        "Samples",
        "Pictures from text",
        "Questions",
        "Probes",
        "Training",
    ):
        assert f"<h2>{words}</h2>" in page
    assert "Tiny networks" in page and "opt.tiny" in page and "b" * 64 in page and "29 training steps" in page
    summary = json.loads((run / "summary.json").read_text())
    assert summary["retrieval.text_to_image.r1"] == 0.75 and summary["classify.map.audio"] == 0.7
    assert summary["seconds.total"] == 100.5 and all(isinstance(value, float) for value in summary.values())
    assert "report: " in capsys.readouterr().out


def test_markup_in_captions_stays_text(tmp_path):
    run = make_run(tmp_path / "evil")
    report(ReportConfig((run,)))
    page = (run / "report.html").read_text()
    assert "<script" not in page and "<img src=x" not in page and "&lt;script&gt;" in page


@pytest.mark.parametrize("tasks", [["caption"], ["transcribe"], ["retrieval"], ["text_to_image"], ["classify"]])
def test_missing_results_are_named_and_left_out(tmp_path, tasks):
    run = make_run(tmp_path / "some", tasks)
    report(ReportConfig((run,)))
    page = (run / "report.html").read_text()
    assert page.count("this evaluation was not run") == 4 and "<h2>Training</h2>" not in page


def test_training_alone_makes_a_page(tmp_path):
    write_training(tmp_path)
    report(ReportConfig((tmp_path,)))
    assert "<h2>Training</h2>" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "summary.json").read_text()) == {}


def test_wrong_folders_are_sentences(tmp_path):
    with pytest.raises(UserError, match="holds neither"):
        report(ReportConfig((tmp_path / "nowhere",)))
    run = make_run(tmp_path / "run", ["caption"])
    (run / "seconds.json").write_text("[1]")
    with pytest.raises(UserError, match=r"seconds.json must hold a JSON object"):
        report(ReportConfig((run,)))
    (run / "results" / "other.json").write_text("[]")
    with pytest.raises(UserError, match=r"other.json is not a result"):
        report(ReportConfig((run,)))


def test_elements_escape_and_pictures_stay_inside_their_folder(tmp_path):
    assert element("p", "<b>", ["&", None], title='"') == '<p title="&quot;">&lt;b&gt;&amp;</p>'
    assert isinstance(element("p", element("b", "x")), Markup) and "<b>x</b>" in element("p", element("b", "x"))
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    assert "no picture" in picture(tmp_path / "inside", "../secret.png")


def test_transcripts_mark_what_is_wrong():
    text = marked("A red, small dog", "a red cat dog now")
    assert text == "a red <del>small</del><ins>cat</ins> dog <ins>now</ins> "


def test_charts_keep_to_their_frame():
    level = Line("flat", [(0, 1.0), (1, 1.0), (2, 1.0)])
    nought = Line("nought", [(0, 0.0), (1, 0.0)])
    for flat in (curve("flat", level), curve("flat", level, nought, (1, 0.0)), curve("flat", nought, zero=True),
                 curve("flat", level, log=True)):
        assert "nan" not in flat and "inf" not in flat
        places = [float(number) for pair in re.findall(r'points="([^"]*)"', flat) for number in re.split("[ ,]", pair)]
        assert all(0 <= x <= 300 and 0 <= y <= 132 for x, y in zip(places[::2], places[1::2], strict=True))
    assert 'width="156"' in whisker(3.0, (2.0, 4.0), 1.2) and "nan" not in whisker(0.0, None, None)


@pytest.mark.parametrize(
    "line",
    [b"3", b"[]", b"{}", b'{"step": 1, "loss": null}', b'{"step": 1, "loss": "x"}', b"\xff\xfe", b'{"loss": 1.0}',
     b'{"step": 2, "loss": 1.0, "losses": [1]}'],
)
def test_lines_of_training_that_are_none_are_left_out(tmp_path, line):
    write_training(tmp_path)
    report(ReportConfig((tmp_path,)))
    page = (tmp_path / "report.html").read_bytes()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b"\n" + line + b"\n")
    report(ReportConfig((tmp_path,)))
    assert (tmp_path / "report.html").read_bytes() == page


@pytest.mark.parametrize("content", ['{"a": "b"}', '{"a": null}', '{"a": NaN}'])
def test_times_that_are_none_are_named(tmp_path, content):
    run = make_run(tmp_path / "run", ["caption"])
    (run / "seconds.json").write_text(content)
    with pytest.raises(UserError, match="seconds.json"):
        report(ReportConfig((run,)))


def health(step):
    """What a line says besides losses."""
    return {"gradient_norm": 0.5 + (100 if step == 3 else 0), "skipped_steps": int(step == 4), "mfu": 0.31,
            "padded_tokens_per_second": 9.5e3, "memory_gib": 1.5, "learning_rate": 1e-3}


def figures(page):
    return {re.sub("<.*?>", "", title): chart for title, chart in re.findall(
        r"<figcaption>(.*?)<span class=.ends.*?</figcaption>(.*?)</figure>", page)}


def test_old_lines_draw_what_they_hold_and_new_ones_speed_gradient_and_memory(tmp_path):
    write_training(tmp_path)
    report(ReportConfig((tmp_path,)))
    old = figures((tmp_path / "report.html").read_text())
    assert set(old) == {"loss, all objectives", "masked &lt;b&gt;words&lt;/b&gt;", "flat", "real tokens a second",
                        "waiting for data"}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()[:-1]]
    new = [json.dumps(line | health(line["step"])) + "\n" for line in lines]
    skipped = {**lines[-1], "step": 31, "loss": None, "losses": {}, "gradient_norm": None, "skipped_steps": 10}
    (tmp_path / "metrics.jsonl").write_text("".join([*new, json.dumps(skipped)]))
    report(ReportConfig((tmp_path,)))
    page = (tmp_path / "report.html").read_text()
    assert set(figures(page)) == set(old) | {"gradient norm", "share of peak FLOP/s (MFU)", "memory, GiB",
                                             "learning rate", "steps skipped, so far"}
    assert "31.0 % of peak" in page and "11 steps skipped" in page and "padded 9,500" in page
    assert ">1,000<" in figures(page)["gradient norm"] and "polyline" in figures(page)["memory, GiB"]


def test_the_best_validation_is_marked(tmp_path):
    write_training(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()[:-1]
    for step, loss in ((10, 4.0), (20, 3.25), (29, 3.5)):
        lines.insert(step, json.dumps({"step": step, "validation": {"loss": loss, "losses": {"flat": loss}}}))
    lines += ['{"step": 30, "validation": {"loss": NaN}}', '{"step": 31, "validation": 3}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    report(ReportConfig((tmp_path,)))
    page = (tmp_path / "report.html").read_text()
    assert "best validation 3.250 at step 20" in page and "best 3.25 at step 20" in page
    assert page.count('class="best"') == 2 and "validation 3.5<" in page


def test_long_runs_make_no_long_page(tmp_path):
    write_training(tmp_path, 200)
    report(ReportConfig((tmp_path,)))
    size = len((tmp_path / "report.html").read_text())
    write_training(tmp_path, 20_000)
    report(ReportConfig((tmp_path,)))
    assert len((tmp_path / "report.html").read_text()) < 6 * size


@pytest.mark.parametrize(("value", "said"), [(0.01234, "0.0123"), (3.456, "3.46"), (1234.5, "1,234"), (0, "0"),
                                             (12_345, "12.3k"), (4.1e6, "4.1M"), (-2e4, "-20k")])
def test_numbers_are_said_shortly(value, said):
    assert short(value) == said


def test_a_page_may_go_to_a_folder_that_is_not_there(tmp_path):
    runs = tuple(make_run(tmp_path / name, ["caption"]) for name in ("one", "two"))
    for given in (runs[:1], runs):
        page = tmp_path / f"new{len(given)}" / "deep" / "page.html"
        report(ReportConfig(given, page))
        assert page.is_file()
