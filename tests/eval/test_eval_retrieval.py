"""Retrieval on a system whose answers are known."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from eval.result import read_result
from eval.retrieval import DIRECTIONS, RetrievalConfig, measure, retrieval
from opt.config import UserError


def config(**options):
    return RetrievalConfig(Path("model"), Path("shards"), **options)


def values(metrics):
    return {metric.name: metric.value for metric in metrics}


def test_a_perfect_system_finds_everything_in_every_direction(make_task):
    metrics, absent, examples, _ = measure(make_task((12, 1)), config(rerank=3))
    assert not absent and len(metrics) == 3 * (len(DIRECTIONS) + 2 + 1)
    assert {value for name, value in values(metrics).items() if ".gain." not in name} == {1.0}
    assert examples[0]["found"][0]["right"] and examples[0]["rank"] == 1.0
    first = metrics[0]
    assert (first.name, first.n, first.direction) == ("retrieval.text_to_image.r1", 12, "text -> image")
    assert first.chance == pytest.approx(1 / 12) and first.interval == (1.0, 1.0)
    assert first.candidates == "12 distinct pictures; 0 of 12 captions also belong to another picture"


def test_any_narration_of_the_picture_is_a_hit_and_pictures_are_searched_once(make_task):
    metrics = {metric.name: metric for metric in measure(make_task((6, 3)), config(rerank=0))[0]}
    to_image, to_text = metrics["retrieval.text_to_image.r1"], metrics["retrieval.image_to_text.r1"]
    assert (to_image.n, to_text.n) == (18, 6)
    assert to_image.candidates.startswith("6 distinct pictures") and to_text.candidates.startswith("18 captions")
    assert to_image.value == to_text.value == 1.0
    assert to_text.chance == pytest.approx(3 / 18)


def test_a_system_that_sees_nothing_gets_no_luck_from_ties(make_task):
    found = values(measure(make_task((12, 1), blurred=("image",)), config(rerank=5))[0])
    assert found["retrieval.text_to_image.r1"] == 0.0 and found["retrieval.text_to_image.r1_reranked"] == 0.0
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
    assert found["retrieval.text_to_image.r1_reranked"] == 0.0
    found = values(measure(task, config(rerank=20))[0])
    assert found["retrieval.text_to_image.r1"] == 0.0 and found["retrieval.text_to_image.r1_reranked"] == 1.0


def test_a_pair_is_matched_once_for_both_directions(make_task):
    task = make_task((8, 1))
    measure(task, config(rerank=8))
    assert task.system.calls["score"] == 8 * 8


def test_coinciding_captions_are_ties_and_are_counted(make_task):
    samples = make_task((4, 1)).split.reader.samples
    samples[1] = dataclasses.replace(samples[1], caption=samples[0].caption)
    metrics = {metric.name: metric for metric in measure(make_task(samples), config(rerank=0))[0]}
    assert metrics["retrieval.text_to_audio.r1"].value == 0.75  # the changed caption now means another picture
    assert "2 of 4 captions also belong to another picture" in metrics["retrieval.image_to_text.r1"].candidates
    assert metrics["retrieval.image_to_text.r1"].value == 0.5  # the second's own caption is gone, the first's is a tie


def test_missing_modalities_are_absent_with_a_reason(make_task):
    samples = [dataclasses.replace(sample, speech=None) for sample in make_task((4, 1)).split.reader.samples]
    metrics, absent, *_ = measure(make_task(samples), config())
    assert {metric.name.split(".")[1] for metric in metrics} == {"text_to_image", "image_to_text"}
    assert absent["retrieval.text_to_audio"] == "the shards hold no text with audio"
    alone = [dataclasses.replace(sample, pictures=()) for sample in samples]
    with pytest.raises(UserError, match="nothing to search"):
        measure(make_task(alone), config())


def test_wrong_options_are_sentences():
    with pytest.raises(UserError, match="image_to_smell is no direction"):
        retrieval(config(rerank_directions=("image_to_smell",)))
    with pytest.raises(UserError, match="must not be negative"):
        retrieval(config(rerank=-1))


def test_an_empty_split_is_a_sentence(make_task):
    with pytest.raises(UserError, match="no samples to evaluate"):
        make_task([])


def test_the_file_holds_the_whole_protocol(make_task, capsys):
    task = make_task((6, 2))
    result = task.finish(measure(task, config(rerank=3)))
    assert read_result(task.folder / "fake.json") == result
    assert "retrieval.text_to_image.r1_reranked" in capsys.readouterr().out
    assert np.isclose(result.metrics[0].chance, 1 / 6) and result.metrics[3].rerank_k == 3
    assert (task.folder / result.examples[0]["found"][0]["picture"]).is_file()
