"""Errors between texts against jiwer and against a search of all edits; normalisers; overlap of words."""

import csv
import functools
import json
import os
from pathlib import Path

import jiwer
import numpy as np
import pytest

from eval import words
from opt.config import UserError

DATA = Path(os.environ.get("OPT_TEST_DATA", Path(__file__).resolve().parents[2] / "../shared/data"))


def random_sentences(random, count):
    return [" ".join(random.choice(list("abcd"), random.integers(1, 9))) for _ in range(count)]


def fewest_edits(reference, hypothesis):
    """Every way to edit, tried out."""

    @functools.cache
    def rest(row, column):
        if row == len(reference) or column == len(hypothesis):
            return len(reference) - row + len(hypothesis) - column
        changed = reference[row] != hypothesis[column]
        return min(rest(row + 1, column + 1) + changed, rest(row + 1, column) + 1, rest(row, column + 1) + 1)

    return rest(0, 0)


def test_word_errors_equal_jiwer_and_the_alignment_explains_them():
    random = np.random.default_rng(1)
    references, hypotheses = random_sentences(random, 100), random_sentences(random, 100)
    errors = [words.word_errors(*pair) for pair in zip(references, hypotheses, strict=True)]
    lengths = [len(reference.split()) for reference in references]
    assert sum(errors) / sum(lengths) == pytest.approx(jiwer.wer(references, hypotheses))
    for reference, hypothesis, count in zip(references, hypotheses, errors, strict=True):
        cut = reference.split(), hypothesis.split()
        assert count == fewest_edits(*cut) == words.edit_kinds(*cut).total()
        edits = words.align(*cut)
        assert sum(edit.kind != "equal" for edit in edits) == count
        assert all((edit.reference == edit.hypothesis) == (edit.kind == "equal") for edit in edits)
        assert " ".join(edit.reference for edit in edits if edit.reference) == reference
        assert " ".join(edit.hypothesis for edit in edits if edit.hypothesis) == hypothesis
    assert words.word_errors("", "a b") == 2 and words.word_errors("a b", "") == 2


def test_alignment_names_what_was_left_out_and_put_in():
    assert words.align(["a", "red", "dog", "ran", "off"], ["a", "dog", "ran", "off", "again"]) == [
        ("equal", "a", "a"), ("delete", "red", ""), ("equal", "dog", "dog"), ("equal", "ran", "ran"),
        ("equal", "off", "off"), ("insert", "", "again"),
    ]  # fmt: skip


def test_errors_on_real_captions_equal_jiwer_by_word_and_by_letter():
    files = DATA / "flickr-speech" / "captions.csv", DATA / "coco-cc" / "captions.json"
    if not all(file.is_file() for file in files):
        pytest.skip("needs the real captions of OPT_TEST_DATA")
    with files[0].open() as lines:
        texts = [row["caption"] for row in csv.DictReader(lines)]
    texts += [entry["caption"] for entry in json.loads(files[1].read_bytes())["annotations"]]
    for normalised in (words.normalise, words.as_written, words.whisper_normaliser()[1]):
        kept = [text for text in map(normalised, texts) if text]
        references, hypotheses = kept[:-1], kept[1:]
        assert len(references) > 5000
        for cut, rate in ((str.split, jiwer.wer), (str, jiwer.cer)):
            counted = [
                words.edit_kinds(cut(pair[0]), cut(pair[1])) for pair in zip(references, hypotheses, strict=True)
            ]
            errors = sum(kinds.total() for kinds in counted)
            assert errors / sum(len(cut(text)) for text in references) == pytest.approx(rate(references, hypotheses))


def test_normaliser():
    assert words.normalise("  The dog's WELL-kept ball , “red” .") == "the dogs well kept ball red"
    assert words.as_written("  The dog's\tball , ") == "The dog's ball ,"


def test_whispers_normaliser_is_openai_s():
    label, normalised = words.whisper_normaliser()
    assert normalised("Mr. Neil can't see the grey theatre (really), um, twenty-one dogs.") == (
        "mister neil can not see the gray theater 21 dogs"
    )
    assert normalised("um, a dog %") == "a dog"
    assert normalised("dunno, 'cause") == "dunno cause"  # the package's own rules would rewrite both
    assert "1,739 spellings" in label and "transformers" in label and words.WHISPER_PACKAGE in label


def test_without_its_table_whispers_normaliser_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(words.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="whisper-normalizer, which is not here: pip install"):
        words.whisper_normaliser()


def test_word_f1_counts_words_once_and_takes_the_best_reference():
    assert words.word_f1("a red red dog", ["a red cat", "blue"]) == pytest.approx(2 * 2 / 7)
    assert words.word_f1("", ["a"]) == 0.0


def test_numbers_too_long_to_convert_end_no_evaluation():
    rules = words.whisper_normaliser()[1]
    for text in ("1" * 9000, "12," * 5000, "1" * 5000 + "." + "1" * 5000):
        assert rules(text).replace(" ", "").startswith(text[:1])
    assert rules("1" * 1900) == "1" * 1900
