"""Measures of captions against pycocoevalcap: its stored answers, its Python, and its Java where that runs."""

import csv
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from eval.captions import java as java_captions
from eval.captions.coco import CiderD, bleu, bleu_counts, bleu_intervals, rouge_l
from eval.captions.ptb import ptb_words
from opt.config import UserError

DATA = Path(os.environ.get("OPT_TEST_DATA", Path(__file__).resolve().parents[2] / "../shared/data"))
GOLDEN = json.loads(Path(__file__).with_name("golden_captions.json").read_bytes())
PICTURES = GOLDEN["pictures"]
CAPTIONS = [picture["caption_words"].split() for picture in PICTURES]
REFERENCES = [[text.split() for text in picture["reference_words"]] for picture in PICTURES]
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs java")


@pytest.fixture(scope="module")
def real_pictures():
    """Real captions by picture: the first judged against the others."""
    files = DATA / "flickr-speech" / "captions.csv", DATA / "coco-cc" / "captions.json"
    if not all(file.is_file() for file in files):
        pytest.skip("needs the real captions of OPT_TEST_DATA")
    pictures = {}
    with files[0].open() as lines:
        for row in csv.DictReader(lines):
            pictures.setdefault(row["image"], []).append(row["caption"])
    for entry in json.loads(files[1].read_bytes())["annotations"]:
        pictures.setdefault(entry["image_id"], []).append(entry["caption"])
    return list(pictures.values())


def java_words(texts):
    """Words by Stanford's tokenizer and coco-caption's list, as pycocoevalcap runs them."""
    cut = PTBTokenizer().tokenize({number: [{"caption": text}] for number, text in enumerate(texts)})
    return [cut[number][0].split() for number in range(len(texts))]


def theirs(captions, references):
    """BLEU-1..4, ROUGE-L and CIDEr-D of pycocoevalcap, of the set and of each picture."""
    given = {number: [" ".join(words)] for number, words in enumerate(captions)}
    truth = {number: [" ".join(words) for words in others] for number, others in enumerate(references)}
    return (
        np.array(Bleu(4).compute_score(truth, given, verbose=0)[0]),
        Rouge().compute_score(truth, given)[1],
        Cider().compute_score(truth, given)[1],
    )


def ours(captions, references):
    return bleu(bleu_counts(captions, references)), rouge_l(captions, references), CiderD(references)(captions)


def close(found, truth, tolerance):
    return all(np.allclose(*pair, rtol=0, atol=tolerance) for pair in zip(found, truth, strict=True))


# ---- words ----------------------------------------------------------------------------------------------------------


def test_words_are_those_of_the_java_tokenizer_as_stored():
    for picture in PICTURES:
        assert " ".join(ptb_words(picture["caption"])) == picture["caption_words"]
        assert [" ".join(ptb_words(text)) for text in picture["references"]] == picture["reference_words"]


@needs_java
def test_no_word_of_5595_real_captions_differs_from_the_java_tokenizers(real_pictures):
    texts = [text for captions in real_pictures for text in captions]
    assert len(texts) == 5595
    assert [ptb_words(text) for text in texts] == java_words(texts)


@needs_java
def test_hard_places_are_cut_as_the_java_tokenizer_cuts_them():
    hard = [
        "O'Neil's 'em '70s don't-walk men's/women's couldn't've y'all 'tis DON'T WE'RE gimme ol' ma'am",
        "Inc., U.S.-made a.m., p.m. No. 5 no. e.g. Ph.D. Jr.'s J. R. Smith and I. The end etc.",
        "$5.00 £10 50¢ 20% #1 #tag @user 1,000.50 .5 8:25pm 10:30-11:00 -5 1.5-2.5 C++ R2-D2",
        "a_b __c__ a--b (c) [d] {e} a/b/c/d http://a.com/b?c=1 me@foo.com :) ;-D <3 ?! !! ** café 北京",
        "tri-colored- -tri x–y x—y “so” ‘it’ it’s … .... AT&T a&w &amp; <b>bold</b> 30°C ½ 5'10\" 6' 1/2",
    ]
    assert [ptb_words(text) for text in hard] == java_words(hard)


def test_what_is_no_text_has_no_words():
    assert ptb_words("") == ptb_words(" \n\t ") == ptb_words("... -- , ;") == ptb_words("\U0001f600\x00") == []


# ---- scores ---------------------------------------------------------------------------------------------------------


def test_scores_equal_the_stored_ones():
    stored = GOLDEN["bleu"], *([picture[name] for picture in PICTURES] for name in ("rouge_l", "cider_d"))
    assert close(ours(CAPTIONS, REFERENCES), stored, 1e-9)
    assert np.mean(stored[2]) == pytest.approx(GOLDEN["cider_d"])


def random_texts(random, count):
    words = list("abcdefgh")
    return [list(random.choice(words, random.integers(0, 12))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(4))
def test_scores_equal_pycocoevalcap_on_cut_text(seed):
    random = np.random.default_rng(seed)
    captions = [[str(word) for word in words] for words in random_texts(random, 60)]
    references = [
        [[str(word) for word in words] for words in random_texts(random, random.integers(1, 6))] for _ in captions
    ]
    assert close(ours(captions, references), theirs(captions, references), 1e-9)


@needs_java
def test_scores_of_500_real_captions_equal_pycocoevalcap_with_its_java_tokenizer(real_pictures):
    pictures = real_pictures[-500:]
    texts = iter(java_words([text for captions in pictures for text in captions]))
    cut = [[next(texts) for _ in captions] for captions in pictures]
    truth = theirs([first for first, *_ in cut], [others for _, *others in cut])
    mine = [[ptb_words(text) for text in captions] for captions in pictures]
    assert close(ours([first for first, *_ in mine], [others for _, *others in mine]), truth, 1e-6)


def test_bleu_intervals_are_those_of_drawn_pictures():
    random, counts = np.random.default_rng(0), bleu_counts(CAPTIONS, REFERENCES)
    draws = [bleu(counts[random.integers(len(counts), size=len(counts))]) for _ in range(2000)]
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    for length, (begin, end) in enumerate(bleu_intervals(counts, seed=1)):
        assert begin == pytest.approx(low[length], abs=0.03) and end == pytest.approx(high[length], abs=0.03)
    assert bleu_intervals(counts, seed=1) == bleu_intervals(counts, seed=1)


# ---- Java -----------------------------------------------------------------------------------------------------------


@needs_java
def test_meteor_equals_pycocoevalcap():
    (value, scores), (other, _) = java_captions.meteor((CAPTIONS, CAPTIONS[::-1]), REFERENCES)
    assert value == pytest.approx(GOLDEN["meteor"], abs=1e-9) and other < value
    assert scores == pytest.approx([picture["meteor"] for picture in PICTURES], abs=1e-9)


@pytest.fixture
def java(tmp_path, monkeypatch):
    """java(program) puts a stand-in for Java first in the path, and every file that it needs where it belongs."""
    folder = tmp_path / "pycocoevalcap"
    for file in (java_captions.METEOR_JAR, java_captions.METEOR_PARAPHRASES, java_captions.SPICE_JAR):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    (folder / "spice" / "lib").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(java_captions.importlib.util, "find_spec", lambda name: _Found([str(folder)]))

    def stand_in(program, models=True):
        for file in java_captions.CORENLP_JARS if models else ():
            (folder / file).touch()
        (tmp_path / "java").write_text(f"#!/usr/bin/env python3\nimport json, sys, time\n{program}\n")
        (tmp_path / "java").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return stand_in


class _Found:
    def __init__(self, folders):
        self.submodule_search_locations = folders


SPICE_STAND_IN = """
given, out = [word for word in sys.argv if word.endswith(".json")]
answers = [{"image_id": entry["image_id"], "scores": {"All": {"f": len(entry["test"].split()) / 10}}}
           for entry in reversed(json.load(open(given)))]
assert "-cache" not in sys.argv
json.dump(answers, open(out, "w"))
"""


def test_spice_is_asked_for_all_sets_at_once_and_answers_are_put_in_order(java):
    java(SPICE_STAND_IN)
    sets = [["a"], ["a", "b"]], [["c"] * 3, []]
    assert java_captions.spice(sets, [[["x"]], [["y"], ["z"]]]).tolist() == [[0.1, 0.2], [0.3, 0.0]]


def test_a_java_program_that_fails_is_a_sentence_with_its_words(java, monkeypatch):
    java("sys.exit('Exception in thread main: OutOfMemoryError')")
    with pytest.raises(UserError, match="SPICE's Java program failed.*OutOfMemoryError"):
        java_captions.spice([[["a"]]], [[["a"]]])
    with pytest.raises(UserError, match="METEOR's Java program failed.*OutOfMemoryError"):
        java_captions.meteor([[["a"]]], [[["a"]]])
    java("open(sys.argv[-2], 'w').write('[]')")
    with pytest.raises(UserError, match="no scores that can be read"):
        java_captions.spice([[["a"]]], [[["a"]]])
    java("time.sleep(60)")
    monkeypatch.setattr(java_captions, "SECONDS_TO_START", 0.3)
    monkeypatch.setattr(java_captions, "SECONDS_A_PICTURE", 0)
    with pytest.raises(UserError, match="SPICE took longer than 0 s"):
        java_captions.spice([[["a"]]], [[["a"]]])
    began = time.monotonic()
    with pytest.raises(UserError, match="METEOR's Java program failed or was ended"):
        java_captions.meteor([[["a"]]], [[["a"]]])
    assert time.monotonic() - began < 30


def test_what_java_lacks_is_named(java, monkeypatch):
    java("", models=False)
    with pytest.raises(UserError, match=r"stanford-corenlp-3.6.0.jar and stanford-corenlp-3.6.0-models.jar in .*lib"):
        java_captions.spice([[["a"]]], [[["a"]]])
    monkeypatch.setattr(java_captions.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pycocoevalcap, which is not here: pip install"):
        java_captions.meteor([[["a"]]], [[["a"]]])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="METEOR runs in Java and there is no `java`"):
        java_captions.meteor([[["a"]]], [[["a"]]])
