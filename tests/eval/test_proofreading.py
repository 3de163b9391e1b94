"""Proofreading by a system whose answers are known, and by one that knows nothing."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from eval.proofreading import NAMES, Judged, measure
from opt.config import UserError
from opt.systems.shared.proofreading import Edit, Word, as_words


def knowing(make_task, samples, blurred=()):
    """A task whose system changes the second word to "many", and finds it where the picture or speech is that of the
    caption's number; captions of numbers that 5 divides are left as they are."""
    task = make_task(samples, blurred)
    system, seeds = task.system, []

    def edited_captions(samples, seed):
        seeds.append(seed)
        return [Edit(" ".join([first, "many", *rest]), 1, second, "many") if system.number(sample, "text") % 5 else None
                for sample in samples for first, second, *rest in [sample.caption.split()]]

    def wrong_words(samples, modalities):
        (context,), said = modalities, []
        for sample in samples:
            knows = system.number(sample, context) == system.number(sample, "text")
            said.append([Word(word, 0.9 if place == knows else 0.1, "0" if knows else "of")
                         for place, word in enumerate(sample.caption.split())])
        return said

    system.edited_captions, system.wrong_words = edited_captions, wrong_words
    system.tokenizer, system.seeds = SimpleNamespace(size=50), seeds
    return task


def made(make_task, pictures):
    return make_task((pictures, 1)).split.reader.samples


def test_it_is_found_by_what_is_seen_and_heard_and_not_by_words(make_task) -> None:
    task = knowing(make_task, (10, 1))
    metrics, absent, examples, worst = measure(task)
    found = {metric.name.removeprefix("proofread."): metric for metric in metrics}
    assert {*found} == {f"{context}.{name}" for context in ("image", "audio") for name in NAMES} and not absent
    for context in ("image", "audio"):
        assert found[f"{context}.found"].value == 1.0 and found[f"{context}.found"].n == 8
        assert found[f"{context}.found"].chance == pytest.approx(1 / 5)
        assert found[f"{context}.found_by_words"].value == 0.0
        assert found[f"{context}.detection_ap"].value == 1.0
        assert found[f"{context}.detection_ap"].chance == pytest.approx(1 / 5)
        assert found[f"{context}.corrected"].value == 1.0 and found[f"{context}.corrected_by_words"].value == 0.0
        assert "'0'" in found[f"{context}.corrected"].chance_method
    assert {*task.system.seeds} == {task.provenance.seed}
    assert examples[0]["edited"] == "telling many of number 1" and examples[0]["found"] == "many"
    assert examples[0]["caption"] == "telling 0 of number 1" and worst == []


def test_chance_is_that_of_each_caption_and_the_worst_are_named(make_task) -> None:
    samples = [dataclasses.replace(sample, caption=sample.caption if number % 2 else f"so it is {sample.caption}")
               for number, sample in enumerate(made(make_task, 10))]
    task = knowing(make_task, samples, blurred=("image",))
    metrics, _, _, worst = measure(task)
    found = {metric.name: metric for metric in metrics}
    assert found["proofread.image.found"].chance == pytest.approx((1 / 5 + 1 / 8) / 2)
    assert found["proofread.image.found"].value == 0.0 and found["proofread.audio.found"].value == 1.0
    assert found["proofread.image.detection_ap"].value < 0.5
    assert len(worst) == 8 and worst[0]["by"] == "image" and worst[0]["failure"] == "thought wrong with 0.100"


def test_average_precision_is_over_all_words() -> None:
    edits = [Edit("a x", 1, "b", "x"), Edit("x b c", 0, "a", "x")]
    said = [[Word("a", 0.8, ""), Word("x", 0.9, "b")], [Word("x", 0.7, "q"), Word("b", 0.2, ""), Word("c", 0.1, "")]]
    judged = Judged.of(said, edits)
    assert judged.found.tolist() == [True, True] and judged.corrected.tolist() == [True, False]
    assert judged.words.sum() == 5 and judged.labels.sum() == 2
    with pytest.raises(ValueError, match="is read as 'b'"):
        Judged.of(said, [edits[0], dataclasses.replace(edits[1], place=1)])


def test_who_does_not_proofread_is_told_so(make_task) -> None:
    with pytest.raises(UserError, match="'fake' cannot find wrong words"):
        measure(make_task((4, 1)))


def test_without_a_recording_the_picture_is_enough_and_without_both_it_says_so(make_task) -> None:
    samples = [dataclasses.replace(sample, speech=None) for sample in made(make_task, 6)]
    metrics, absent, *_ = measure(knowing(make_task, samples))
    assert len(metrics) == 5 and {*absent} == {f"proofread.audio.{name}" for name in NAMES}
    with pytest.raises(UserError, match="nothing to proofread: no caption has a word"):
        measure(knowing(make_task, (1, 1)))


def test_a_word_is_as_wrong_as_the_worst_of_its_pieces() -> None:
    class Pieces:
        names = ("star", "##s", "red", "##es")

        def words_of(self, ids):
            return np.cumsum([not self.names[number].startswith("##") for number in ids]) - 1

        def decode(self, ids):
            return " ".join(self.names[number] for number in ids).replace(" ##", "")

    words = as_words(Pieces(), np.array([2, 0, 1]), np.array([0.1, 0.2, 0.6]), np.array([0, 2, 3]))
    assert words == [Word("red", 0.1, "star"), Word("stars", 0.6, "stares")]
