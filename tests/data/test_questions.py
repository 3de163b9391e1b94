"""Questions beside shards: one sample a question, found by key; what cannot be used is counted, what is wrong named."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from fixtures import fake_sample, fake_shards

from opt.config import UserError
from opt.data.questions import Questions, frequent_answers, normalise, read_questions, written_answers
from opt.data.shards import ShardReader
from opt.data.subset import Subset


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardReader:
    samples = [fake_sample(number, regions=number != 5) for number in range(20)]
    return fake_shards(tmp_path_factory.mktemp("shards"), samples)


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def line(image_id: object, question: str = "what color?", *answers: str) -> dict[str, object]:
    return {"image_id": image_id, "question": question, "answers": list(answers)}


def test_a_question_is_a_sample_with_its_records_picture(shards: ShardReader, tmp_path: Path) -> None:
    path = write(tmp_path / "q", line("sample18", "which, one?", "A Red."),
                 line("sample3", "how many", "two", "2", "3"), {"image_id": "sample3", "question": "never answered"})
    questions = Questions(shards, path, answered=False)
    assert len(questions) == 3 and not questions.left_out
    samples = [questions.sample(number) for number in range(3)]
    assert [(sample.key, sample.caption, sample.answers) for sample in samples] == [
        ("sample3", "how many", ("two", "2", "3")), ("sample3", "never answered", ()),
        ("sample18", "which, one?", ("A Red.",)),
    ]
    assert all(sample.speech is None for sample in samples)
    regions = shards.sample(18).pictures[0].regions
    assert samples[2].pictures[0].regions is not None and np.array_equal(samples[2].pictures[0].regions, regions)
    assert questions.lengths.words.tolist() == [2, 2, 4] and not questions.lengths.frames.any()
    assert questions.lengths.regions[2] == len(regions)
    assert list(questions.captions()) == ["how many", "never answered", "which, one?"]
    assert list(questions.keys()) == ["sample3", "sample3", "sample18"]
    again = pickle.loads(pickle.dumps(questions))
    assert again.fingerprint == questions.fingerprint != shards.fingerprint
    assert again.sample(2).answers == ("A Red.",)
    with pytest.raises(IndexError):
        questions.sample(3)


def test_what_cannot_be_used_is_counted_and_named(shards: ShardReader, tmp_path: Path) -> None:
    path = write(tmp_path / "q", line("nowhere", "a?", "b"), line("sample5", "a?", "b"), line("sample6", "a?"),
                 line("sample7", "a?", "b"))
    questions = Questions(shards, path, answered=True)
    assert len(questions) == 1 and questions.sample(0).key == "sample7"
    assert "of 4 questions" in questions.left_out
    assert "1 ask about pictures that these shards do not hold, such as 'nowhere'" in questions.left_out
    assert "1 ask about a record without a picture" in questions.left_out and "1 have no answer" in questions.left_out
    with pytest.raises(UserError, match="no question can be used.*such as 'nowhere'"):
        Questions(shards, write(tmp_path / "q", line("nowhere")), answered=False)


def test_a_question_about_several_records_has_all_their_pictures_in_order(shards: ShardReader, tmp_path: Path) -> None:
    def pair(left: str, right: str, **more: object) -> dict[str, object]:
        return {"image_ids": [left, right], "question": "both red", "answers": ["true"], **more}

    path = write(tmp_path / "q", pair("sample9", "sample2", set="one"), line("sample4", "alone?", "yes"),
                 pair("sample2", "sample9", set="one"), pair("sample3", "nowhere"), pair("sample5", "sample3"),
                 {"image_ids": ["sample1", "sample1", "sample0"], "question": "three?"})
    questions = Questions(shards, path, answered=False)
    assert "1 ask about pictures that these shards do not hold, such as 'nowhere'" in questions.left_out
    assert "1 ask about a record without a picture" in questions.left_out
    samples = [questions.sample(number) for number in range(len(questions))]
    regions = {number: shards.sample(number).pictures[0].regions for number in (0, 1, 2, 4, 9)}
    wanted = [("sample1", [1, 1, 0]), ("sample2", [2, 9]), ("sample4", [4]), ("sample9", [9, 2])]
    for place, (sample, (key, numbers)) in enumerate(zip(samples, wanted, strict=True)):
        assert sample.key == key and sample.speech is None
        for picture, number in zip(sample.pictures, numbers, strict=True):
            assert np.array_equal(picture.regions, regions[number])
        assert questions.lengths.regions[place] == sum(len(regions[number]) for number in numbers)
    assert [question.set for question in questions.questions] == ["", "one", "", "one"]
    questions.prefetch([0, 3])  # nothing to fetch from a local folder
    again = pickle.loads(pickle.dumps(questions))
    assert [len(again.sample(number).pictures) for number in range(4)] == [3, 2, 1, 2]


def test_ids_become_keys_as_extraction_makes_them(tmp_path: Path) -> None:
    path = write(tmp_path / "q", line(262148, "a?"), line("train/000.jpg", "a?"))
    assert [question.keys for question in read_questions(path)] == [("262148",), ("train-000-jpg",)]


@pytest.mark.parametrize("bad", ['{"image_id": "a"}', "nonsense", '{"image_id": "a", "question": " "}', "[]",
                                 '{"image_id": "a", "question": "b", "answers": "red"}',
                                 '{"image_id": null, "question": "b"}',
                                 '{"image_ids": ["a"], "question": "b"}', '{"image_ids": "ab", "question": "b"}',
                                 '{"image_ids": ["a", null], "question": "b"}',
                                 '{"image_ids": ["a", "b"], "image_id": "a", "question": "b"}',
                                 '{"image_id": "a", "question": "b", "set": 3}',
                                 "[" * 100_000, r'{"image_id": "a", "question": "half of a pair: \ud800"}',
                                 r'{"image_id": "a", "question": "b", "answers": ["\udc80"]}'])
def test_a_bad_line_is_named(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(line("a", "b", "c")) + f"\n\n{bad}\n")
    with pytest.raises(UserError, match="line 3"):
        read_questions(path)


def test_no_file_and_no_questions_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_questions(tmp_path / "none")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UserError, match="holds no questions"):
        read_questions(tmp_path / "empty")


@pytest.mark.parametrize(("answer", "plain"), [
    ("The Red Circle.", "red circle"), ("Two", "2"), ("none", "0"), ("2.5", "2.5"), ("don't know", "dont know"),
    ("yes!", "yes"), ("a", "a"), ("black-and-white", "black and white"), ("ten, or 11", "10 or 11"),
    # by hand from the official rules: 1,000 takes all marks away, a space beside a mark takes that mark away
    ("1,000", "1000"), ("1,000-2,000 men", "10002000 men"), ("red,white", "red white"),
    ("red, white,blue", "red whiteblue"), ("t-shirt", "t shirt"), ("left - right", "left right"), ("and/or", "and or"),
    ("(a bus)", "bus"),
    ("10:30", "10:30"), ("$5", "$5"), ("50%", "50%"), (".5 mile", ".5 mile"), ("st. john", "st john"), ("6.", "6"),
    ("don\u2019t", "dont"), ("an_apple", "apple"), ("zero", "0"), ("eleven", "eleven"), ("The", "the"), ("?", "?"),
])
def test_answers_are_normalised(answer: str, plain: str) -> None:
    assert normalise(answer) == plain


def test_the_most_frequent_answers_come_first_and_equals_by_the_alphabet(tmp_path: Path) -> None:
    path = write(tmp_path / "q", line("a", "?", "red", "red", "blue"), line("a", "?", "green", "a red"))
    questions = read_questions(path)
    assert frequent_answers(questions, 9) == ("red", "blue", "green")
    assert frequent_answers(questions, 2) == ("red", "blue")


def test_candidates_are_spelled_as_they_were_written_most_often(tmp_path: Path) -> None:
    path = write(tmp_path / "q", line("a", "?", "two", "2", "two "), line("a", "?", "a red", "red", "red"),
                 line("a", "?", "Blue", "blue"))
    assert written_answers(read_questions(path), 9) == ("two", "red", "Blue")


def test_a_subset_reads_as_the_whole_does(shards: ShardReader) -> None:
    subset = Subset(shards, np.array([17, 2, 2]))
    assert [subset.sample(number).key for number in range(len(subset))] == ["sample2", "sample2", "sample17"]
    assert list(subset.keys()) == ["sample2", "sample2", "sample17"]
    assert list(subset.captions()) == [shards.sample(number).caption for number in (2, 2, 17)]
    assert np.array_equal(subset.key_hash, shards.key_hash[[2, 2, 17]])
    assert np.array_equal(subset.lengths.words, shards.lengths.words[[2, 2, 17]])
    assert pickle.loads(pickle.dumps(subset)).sample(2).key == "sample17"
