"""Captions of a system whose answers are known: named objects, likeness to the references, and the worst."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from eval import captioning
from eval.captions.coco import CiderD
from eval.captions.ptb import ptb_words
from opt.config import UserError
from opt.systems.system import Sampling

HERE = (Path("model"), Path("shards"))


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    """METEOR takes seconds to start: here it is as if Java were missing."""

    def missing(sets, references):
        raise UserError("no Java here")

    for name in ("meteor", "spice"):
        monkeypatch.setattr(captioning.java, name, missing)


def by_name(metrics):
    return {metric.name: metric for metric in metrics}


def write_labels(path, count, label):
    path.write_text("".join(json.dumps({"image_id": f"scene-{n}", "labels": label(n)}) + "\n" for n in range(count)))
    return path


def test_captions_are_judged_by_the_objects_they_name(make_task, tmp_path):
    colors = ["red", "blue", "green", "white"]
    labels = write_labels(tmp_path / "labels.jsonl", 8, lambda n: [f"{colors[n % 4]} circle"])
    task = make_task((8, 2))
    task.system.generate_text = lambda samples, modalities, sampling: [
        f"a big {'green' if sample.key == 'scene-0' else colors[int(sample.key[6:]) % 4]} dotted circle"
        for sample in samples
    ]
    metrics, absent, examples, _ = captioning.measure(task, captioning.CaptionConfig(*HERE, labels=labels))
    found = by_name(metrics)
    assert found["caption.object_hit"].value == found["caption.object_precision"].value == 7 / 8
    assert found["caption.object_hit"].n == 8 and found["caption.object_hit"].chance < 0.6
    assert absent == {"caption.meteor": "no Java here", "caption.spice": "no Java here"}
    assert len(examples[0]["references"]) == 2 and (task.folder / examples[0]["picture"]).is_file()


def test_captions_without_labels_still_have_figures(make_task, tmp_path):
    metrics, absent, *_ = captioning.measure(make_task((4, 1)), captioning.CaptionConfig(*HERE))
    found = by_name(metrics)
    assert list(found) == [*(name for name in captioning.REFERENCE_METRICS if name not in absent)]
    assert found["caption.word_f1"].value == pytest.approx(2 * 2 / 8)
    assert all(metric.chance < metric.value and metric.protocol for metric in metrics if metric.value > 1e-3)
    assert set(absent) == {*captioning.OBJECT_METRICS, "caption.meteor", "caption.spice"}
    foreign = write_labels(tmp_path / "labels.jsonl", 0, str)
    foreign.write_text('{"image_id": "elsewhere", "labels": ["cat"]}\n')
    with pytest.raises(UserError, match="labels for none"):
        captioning.measure(make_task((4, 1)), captioning.CaptionConfig(*HERE, labels=foreign))


def test_a_labels_file_without_labels_is_not_taken_for_none_given(make_task, tmp_path):
    empty = write_labels(tmp_path / "labels.jsonl", 0, str)
    with pytest.raises(UserError, match="holds no labels"):
        captioning.measure(make_task((4, 1)), captioning.CaptionConfig(*HERE, labels=empty))


def test_a_figure_says_how_its_text_was_searched_for(make_task, tmp_path):
    labels = write_labels(tmp_path / "labels", 3, lambda n: ["cat"])
    config = captioning.CaptionConfig(*HERE, sampling=Sampling(beams=4, length_penalty=0.5), labels=labels)
    for name, metric in by_name(captioning.measure(make_task((3, 1)), config)[0]).items():
        assert "beam search, 4 beams" in metric.note, name


def test_captions_are_held_against_all_references_of_their_picture(make_task):
    task = make_task((6, 3))
    said = {"scene-2": "nothing of the kind", "scene-4": "Telling 0 of number four!"}
    task.system.generate_text = lambda samples, modalities, sampling: [
        said.get(sample.key, f"Telling 1 of number {sample.key[6:]}.") for sample in samples
    ]
    metrics, _, _, worst = captioning.measure(task, captioning.CaptionConfig(*HERE))
    found = by_name(metrics)
    references = [[ptb_words(f"telling {n} of number {picture}") for n in range(3)] for picture in range(6)]
    captions = [ptb_words(said.get(f"scene-{picture}", f"telling 1 of number {picture}")) for picture in range(6)]
    cider = CiderD(references)(captions)
    assert found["caption.cider_d"].value == pytest.approx(np.mean(cider))
    low, high = found["caption.cider_d"].interval
    assert low < found["caption.cider_d"].value < high and found["caption.cider_d"].protocol == "cider-d/coco"
    precision, brevity = (4 * 5 + 1 + 4) / (4 * 5 + 4 + 5), np.exp(1 - 30 / 29)  # "of"; "four" is amiss
    assert found["caption.bleu1"].value == pytest.approx(precision * brevity)
    assert found["caption.bleu4"].n == 6 and "3 references a picture" in found["caption.bleu4"].note
    assert found["caption.rouge_l"].chance < found["caption.rouge_l"].value
    assert [entry["key"] for entry in worst][:2] == ["scene-2", "scene-4"] and len(worst) == 6
    assert worst[0]["caption"] == "nothing of the kind" and len(worst[0]["references"]) == 3
    assert worst[0]["failure"].startswith(f"CIDEr-D {100 * cider[2]:.1f}, ROUGE-L ")


def test_pictures_without_captions_have_reasons(make_task, tmp_path):
    samples = [dataclasses.replace(sample, caption=None) for sample in make_task((3, 1)).split.reader.samples]
    task = make_task(samples)
    metrics, absent, _, worst = captioning.measure(task, captioning.CaptionConfig(*HERE))
    assert not metrics and not worst and set(absent) == {*captioning.OBJECT_METRICS, *captioning.REFERENCE_METRICS}


def test_java_figures_stand_beside_the_others_where_java_runs(make_task, monkeypatch):
    def meteor(sets, references):
        assert [len(words) for words in sets] == [4, 4] and sets[0] != sets[1]
        return [(0.3, np.array([0.2, 0.3, 0.2, 0.3])), (0.1, np.zeros(4))]

    monkeypatch.setattr(captioning.java, "meteor", meteor)
    monkeypatch.setattr(captioning.java, "spice", lambda sets, references: np.array([[0.5] * 4, [0.1] * 4]))
    metrics, absent, *_ = captioning.measure(make_task((4, 1)), captioning.CaptionConfig(*HERE))
    found = by_name(metrics)
    assert set(absent) == set(captioning.OBJECT_METRICS)
    assert (found["caption.meteor"].value, found["caption.meteor"].chance) == (0.3, 0.1)
    low, high = found["caption.meteor"].interval
    assert 0.24 < low < 0.3 < high < 0.36 and found["caption.meteor"].protocol == "meteor-1.5/java"
    assert (found["caption.spice"].value, found["caption.spice"].protocol) == (0.5, "spice/java")
    assert found["caption.spice"].chance == pytest.approx(0.1)
