"""Retrieval on a system whose answers are known."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from eval import matching, searches
from eval.result import read_result
from eval.retrieval import DIRECTIONS, RetrievalConfig, measure, retrieval
from opt.config import UserError
from opt.systems.system import System


def config(**options):
    return RetrievalConfig(Path("model"), Path("shards"), **options)


def values(metrics):
    return {metric.name: metric.value for metric in metrics}


def test_a_perfect_system_finds_everything_in_every_direction(make_task):
    metrics, absent, examples, worst = measure(make_task((12, 1)), config(rerank=3))
    assert not absent and len(DIRECTIONS) == 12 and len(metrics) == 3 * (12 + 2 + 1) + 2
    assert {value for name, value in values(metrics).items() if ".gain." not in name} == {1.0}
    assert examples[0]["found"][0]["right"] and examples[0]["rank"] == 1.0 and worst == []
    first = metrics[0]
    assert (first.name, first.n, first.direction) == ("retrieval.text_to_image.r1", 12, "text -> image")
    assert first.chance == pytest.approx(1 / 12) and first.interval == (1.0, 1.0)
    assert first.candidates == "12 distinct pictures; 0 of 12 captions also belong to another picture"


def test_any_narration_of_the_picture_is_a_hit_and_pictures_are_searched_once(make_task):
    metrics = {metric.name: metric for metric in measure(make_task((6, 3)), config(by=("alignment",)))[0]}
    to_image, to_text = metrics["retrieval.text_to_image.r1"], metrics["retrieval.image_to_text.r1"]
    assert (to_image.n, to_text.n) == (18, 6)
    assert to_image.candidates.startswith("6 distinct pictures") and to_text.candidates.startswith("18 captions")
    assert to_image.value == to_text.value == 1.0
    assert to_text.chance == pytest.approx(3 / 18)


def test_a_system_that_sees_nothing_gets_no_luck_from_ties(make_task):
    found = values(measure(make_task((12, 1), blurred=("image",)), config(rerank=5))[0])
    assert found["retrieval.text_to_image.r1"] == 0.0 and found["retrieval.text_to_image.r1_two_stage"] == 0.0
    assert found["retrieval.text_to_image.r10"] == 1.0  # 1 + 11 / 2 is within ten
    assert found["retrieval.text_to_audio.r1"] == 1.0


def test_matching_orders_only_the_first_candidates(make_task):
    task = make_task((20, 1))
    embed = task.system.embed

    def reversed_embed(samples, modalities):
        vectors = embed(samples, modalities)
        return -vectors if modalities == ("image",) else vectors  # the right picture comes last

    task.system.embed = reversed_embed
    found = values(measure(task, config(rerank=19))[0])
    assert found["retrieval.text_to_image.r1_two_stage"] == 0.0
    found = values(measure(task, config(rerank=20))[0])
    assert found["retrieval.text_to_image.r1"] == 0.0 and found["retrieval.text_to_image.r1_two_stage"] == 1.0


def test_a_pair_is_matched_once_for_both_directions(make_task):
    task = make_task((8, 1))
    measure(task, config(rerank=8))
    assert task.system.calls["fuse"] == 8 * 8 + 1, "one to see that it can"
    assert task.system.calls["alone"] == 8 + 8 + 2


def test_all_pairs_and_two_stage_with_every_candidate_are_the_same(make_task):
    task = make_task((9, 2), blurred=("audio",))
    ways = ("two-stage", "all-pairs")
    directions = tuple(DIRECTIONS)
    found = values(measure(task, config(by=ways, rerank=18, matched_directions=directions))[0])
    for direction in directions:
        for depth in (1, 5, 10):
            name = f"retrieval.{direction}.r{depth}"
            assert found[f"{name}_two_stage"] == found[f"{name}_all_pairs"], name
    assert found["retrieval.text_to_image.r1_all_pairs"] == 1.0 > found["retrieval.audio_to_image.r1_all_pairs"]


def test_faiss_that_looks_at_everything_finds_the_same_first(make_task):
    pytest.importorskip("faiss")
    metrics = measure(make_task((9, 2)), config(rerank=4, faiss="Flat"))[0]
    exact = measure(make_task((9, 2)), config(rerank=4))[0]
    assert values(metrics) == values(exact)
    notes = {metric.name: metric.note for metric in metrics}
    assert notes["retrieval.text_to_image.r1_two_stage"].startswith("first stage by FAISS, Flat; ")


def test_cosines_count_beside_matching_as_far_as_the_system_weighs_them(make_task, monkeypatch):
    task = make_task((8, 1))
    monkeypatch.setattr(type(task.system), "fuse", lambda self, parts, rows: torch.zeros(len(rows["text"])))
    options = dict(by=("two-stage", "all-pairs"), rerank=8)
    found = values(measure(task, config(**options))[0])
    assert found["retrieval.text_to_image.r1_two_stage"] == found["retrieval.text_to_image.r1_all_pairs"] == 0.0
    monkeypatch.setattr(type(task.system), "cosine_weight", 2.5)
    metrics = {metric.name: metric for metric in measure(task, config(**options))[0]}
    for way in ("two_stage", "all_pairs"):
        assert metrics[f"retrieval.text_to_image.r1_{way}"].value == 1.0
        assert "pairs by log-odds of matching + 2.5 x cosine" in metrics[f"retrieval.text_to_image.r1_{way}"].note


def test_what_the_first_stage_leaves_out_is_no_hit(make_task, monkeypatch):
    def blind(query_QE, candidate_CE, k, factory):
        return np.tile(np.arange(len(candidate_CE))[-k:], (len(query_QE), 1))  # whatever is asked, the last ones

    monkeypatch.setattr(searches, "first_k", blind)
    found = values(measure(make_task((12, 1)), config(rerank=5, faiss="Flat"))[0])
    assert found["retrieval.text_to_image.r1"] == 1.0
    for depth in (1, 5):
        assert found[f"retrieval.text_to_image.r{depth}_two_stage"] == pytest.approx(5 / 12)


def test_three_modalities_are_fused_when_two_are_given(make_task):
    task = make_task((6, 1), blurred=("text",))
    direction = "text_audio_to_image"
    options = dict(by=("all-pairs",), directions=(direction,), matched_directions=(direction,))
    assert values(measure(task, config(**options))[0])[f"retrieval.{direction}.r1_all_pairs"] == pytest.approx(1 / 6)
    assert task.system.calls == {"embed": 0, "alone": 18 + 3, "fuse": 36 + 1}


def test_the_mean_is_of_the_six_recalls_both_ways(make_task):
    task = make_task((12, 2), blurred=("image",))
    metrics = {metric.name: metric for metric in measure(task, config(by=("alignment",)))[0]}
    ways = ("text_to_image", "image_to_text")
    six = [metrics[f"retrieval.{way}.r{depth}"].value for way in ways for depth in (1, 5, 10)]
    mean = metrics["retrieval.image_text.mean"]
    assert mean.value == pytest.approx(np.mean(six)) and mean.interval[0] <= mean.value <= mean.interval[1]


def test_the_worst_searches_come_first_with_the_picture_they_meant(make_task):
    task = make_task((8, 1))
    embed = task.system.embed

    def confused(samples, modalities):  # caption 5 looks like picture 2
        vectors = embed(samples, modalities)
        if modalities == ("text",):
            vectors[[task.system.number(sample, "text") == 5 for sample in samples]] = torch.eye(64)[2]
        return vectors

    task.system.embed = confused
    findings = measure(task, config(by=("alignment",)))
    [worst] = findings.worst
    assert worst["key"] == "scene-5" and worst["failure"] == "the right picture at rank 5 of 8"
    assert worst["picture"].endswith("scene-5.jpg") and worst["found"][0]["picture"].endswith("scene-2.jpg")


def test_too_many_pairs_are_refused_before_any_work(make_task, monkeypatch):
    monkeypatch.setattr(matching, "MOST_PAIRS", 63)
    task = make_task((8, 1))
    with pytest.raises(UserError, match="would fuse 64 pairs"):
        measure(task, config(by=("all-pairs",)))
    assert task.system.calls["fuse"] == 1, "to see that it can"


def test_coinciding_captions_are_ties_and_are_counted(make_task):
    samples = make_task((4, 1)).split.reader.samples
    samples[1] = dataclasses.replace(samples[1], caption=samples[0].caption)
    metrics = {metric.name: metric for metric in measure(make_task(samples), config(by=("alignment",)))[0]}
    assert metrics["retrieval.text_to_audio.r1"].value == 0.75  # the changed caption now means another picture
    assert "2 of 4 captions also belong to another picture" in metrics["retrieval.image_to_text.r1"].candidates
    assert metrics["retrieval.image_to_text.r1"].value == 0.5  # the second's own caption is gone, the first's is a tie


def test_missing_modalities_are_absent_with_a_reason(make_task):
    samples = [dataclasses.replace(sample, speech=None) for sample in make_task((4, 1)).split.reader.samples]
    metrics, absent, *_ = measure(make_task(samples), config())
    assert {metric.name.split(".")[1] for metric in metrics} == {"text_to_image", "image_to_text", "image_text"}
    assert absent["retrieval.text_to_audio"] == "the shards hold no caption with a recording"
    alone = [dataclasses.replace(sample, pictures=()) for sample in samples]
    with pytest.raises(UserError, match="nothing to search"):
        measure(make_task(alone), config())


def lacks(*abilities):
    """Replaces abilities by what a system says that has none of them."""
    return lambda task, patch: [patch.setattr(task.system, name, getattr(System, name).__get__(task.system))
                                for name in abilities]


def test_a_system_that_cannot_match_is_searched_by_its_vectors(make_task, monkeypatch):
    task = make_task((4, 1))
    lacks("alone", "fuse")(task, monkeypatch)
    metrics, absent, *_ = measure(task, config())
    assert {metric.rerank_k for metric in metrics} == {None} and len(metrics) == 3 * (12 + 1) + 1
    assert absent["retrieval.text_to_image.r1_two_stage"].startswith("system 'fake' cannot match")
    assert set(absent) == {f"retrieval.{way}.r{k}_two_stage" for way in ("text_to_image", "image_to_text")
                           for k in (1, 5, 10)}
    with pytest.raises(UserError, match="cannot match; .*; nor is there what 1 other direction needs"):
        measure(task, config(by=("all-pairs",)))


def test_a_system_that_cannot_embed_is_searched_by_all_pairs(make_task, monkeypatch):
    task = make_task((4, 1))
    lacks("embed")(task, monkeypatch)
    with pytest.raises(UserError, match=r"nothing to search: system 'fake' cannot embed.*--by all-pairs asks"):
        measure(task, config())
    with pytest.raises(UserError, match=r"cannot embed[^-]*docs/systems.md\); nor is there what 11 "):
        measure(task, config(by=("alignment",)))
    metrics, absent, *_ = measure(task, config(by=("alignment", "all-pairs")))
    assert values(metrics)["retrieval.text_to_image.r1_all_pairs"] == 1.0 and len(metrics) == 3 * 2 + 1
    assert absent["retrieval.text_to_image.r1"].startswith("system 'fake' cannot embed")
    assert absent["retrieval.text_to_audio"] == absent["retrieval.gain.text_audio_over_text"]


def test_wrong_options_are_sentences():
    for options, words in (
        ({"directions": ("image_to_smell",)}, "image_to_smell is no direction"),
        ({"matched_directions": ("smell_to_image",)}, "smell_to_image is no direction"),
        ({"rerank": 0}, "--rerank 0 must be at least 1"),
        ({"by": ()}, "--by is empty"),
        ({"by": ("alignment",), "rerank": 5}, "--rerank is of two-stage search"),
        ({"by": ("all-pairs",), "faiss": "Flat"}, "--faiss is of two-stage search"),
        ({"protocol": "coco"}, "--protocol coco is unknown; there are coco-5k"),
    ):
        with pytest.raises(UserError, match=words):
            retrieval(config(**options))


def test_an_empty_split_is_a_sentence(make_task):
    with pytest.raises(UserError, match="shards holds no samples"):
        make_task([])


def test_the_file_holds_the_whole_protocol(make_task, capsys):
    task = make_task((6, 2))
    result = task.finish(measure(task, config(rerank=3)))
    assert read_result(task.folder / "fake.json") == result
    assert "retrieval.text_to_image.r1_two_stage" in capsys.readouterr().out
    assert np.isclose(result.metrics[0].chance, 1 / 6) and result.metrics[3].rerank_k == 3
    assert (task.folder / result.examples[0]["found"][0]["picture"]).is_file()
