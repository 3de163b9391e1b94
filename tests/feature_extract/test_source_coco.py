"""COCO captions, Karpathy's splits and VQA v2, each in miniature under its published names."""

import json

import pytest

from feature_extract.sources import coco_captions, karpathy, vqa_v2
from feature_extract.sources.item import BadRow, Item, NarrationItem
from opt.config import UserError
from opt.data.questions import Question, read_questions


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_captions(path, prefix=""):
    write_json(path, {
        "info": {}, "licenses": [],
        "images": [{"id": 318556, "file_name": f"{prefix}000000318556.jpg"}, {"id": 9, "file_name": f"{prefix}9.jpg"}],
        "annotations": [{"id": 48, "image_id": 318556, "caption": "A very clean bathroom."},
                        {"id": 50, "image_id": 318556, "caption": " Two sinks"}],
    })  # fmt: skip


def test_coco_2017_pictures_carry_all_their_captions(tmp_path):
    write_captions(tmp_path / "annotations" / "captions_val2017.json")
    source = coco_captions.Source(tmp_path, "val2017")
    assert source.files() == [tmp_path / "annotations" / "captions_val2017.json"] and source.root == tmp_path
    assert list(source.rows()) == [
        Item("318556", ("val2017/000000318556.jpg",),
             (NarrationItem("48", "A very clean bathroom."), NarrationItem("50", " Two sinks"))),
        Item("9", ("val2017/9.jpg",)),
    ]  # fmt: skip
    first, _ = coco_captions.Source(tmp_path, "val", pictures="https://a.b/val2017").rows()
    assert first.pictures == ("https://a.b/val2017/000000318556.jpg",)


def test_coco_2014_names_and_a_corpus_of_two_years(tmp_path):
    write_captions(tmp_path / "annotations" / "captions_train2014.json", "COCO_train2014_")
    first, _ = coco_captions.Source(tmp_path).rows()
    assert first.pictures == ("train2014/COCO_train2014_000000318556.jpg",)
    write_captions(tmp_path / "annotations" / "captions_train2017.json")
    with pytest.raises(UserError, match="choose --split from train2014, train2017"):
        coco_captions.Source(tmp_path).files()
    with pytest.raises(UserError, match="no split 'test2014'"):
        coco_captions.Source(tmp_path, "test2014").files()
    with pytest.raises(UserError, match="--split"):
        coco_captions.Source(tmp_path, "../train2014").files()


def test_coco_rows_that_are_broken_are_named(tmp_path):
    path = tmp_path / "captions.json"
    write_json(path, {"images": [{"id": 1}, 5, {"id": 2, "file_name": "2.jpg"}, {"id": True, "file_name": "t.jpg"}],
                      "annotations": [{"id": 7, "image_id": 2, "caption": None},
                                      {"id": 8, "image_id": 2, "caption": "half \ud800"},
                                      {"id": 9, "image_id": 2, "caption": "whole"}]})  # fmt: skip
    rows = list(coco_captions.Source(tmp_path).rows())
    assert [row.key for row in rows] == ["captions.json:images[0]", "captions.json:images[1]", "2",
                                         "captions.json:images[3]", "captions.json:annotations[0]",
                                         "captions.json:annotations[1]"]  # fmt: skip
    assert rows[2] == Item("2", ("images/2.jpg",), (NarrationItem("9", "whole"),))
    assert "no 'file_name'" in rows[0].reason
    with pytest.raises(UserError, match="captions.json is all there is"):
        coco_captions.Source(tmp_path, "val").files()


@pytest.mark.parametrize("content", [b"", b'{"images": [', b"[]", b'{"images": [], "annotations": 5}', b"[" * 200_000])
def test_a_file_that_is_not_whole_is_a_sentence(tmp_path, content):
    (tmp_path / "captions.json").write_bytes(content)
    with pytest.raises(UserError, match=r"captions\.json: (not JSON|expected)"):
        list(coco_captions.Source(tmp_path).rows())


def test_karpathy_coco_joins_train_and_restval(tmp_path):
    write_json(tmp_path / "dataset_coco.json", {"dataset": "coco", "images": [
        {"filepath": folder, "sentids": [770337], "filename": f"COCO_{folder}_{number:012}.jpg", "imgid": 0,
         "split": split, "cocoid": number,
         "sentences": [{"tokens": ["a", "man"], "raw": "A man.", "imgid": 0, "sentid": 770337}]}
        for number, split, folder in [(391895, "test", "val2014"), (5, "train", "train2014"), (6, "restval", "val2014")]
    ] + [{"split": "train", "filename": "x.jpg"}]})  # fmt: skip
    usual = list(karpathy.Source(tmp_path, "train+restval").rows())
    assert [row.key for row in usual] == ["5", "6", "dataset_coco.json:images[3]"]
    assert [row.key for row in karpathy.Source(tmp_path).rows()] == ["5", "dataset_coco.json:images[3]"]
    assert list(karpathy.Source(tmp_path, "test").rows()) == [
        Item("391895", ("val2014/COCO_val2014_000000391895.jpg",), (NarrationItem("770337", "A man."),))
    ]
    with pytest.raises(UserError, match="'dev' is none of"):
        karpathy.Source(tmp_path, "train+dev").files()


def test_karpathy_flickr_is_called_after_its_files(tmp_path):
    write_json(tmp_path / "dataset_flickr8k.json", {"images": [{
        "sentids": [0], "imgid": 0, "filename": "2513260012_03d33305cf.jpg", "split": "train",
        "sentences": [{"raw": "A dog .", "tokens": ["a", "dog"], "imgid": 0, "sentid": 0}]}]})  # fmt: skip
    assert list(karpathy.Source(tmp_path, dataset="flickr8k").rows()) == [
        Item("2513260012_03d33305cf", ("Flicker8k_Dataset/2513260012_03d33305cf.jpg",),
             (NarrationItem("0", "A dog ."),))
    ]
    with pytest.raises(UserError, match=r"dataset_flickr30k\.json does not exist"):
        karpathy.Source(tmp_path, dataset="flickr30k").files()


def write_vqa(folder, questions, answers=None):
    path = folder / "v2_OpenEnded_mscoco_val2014_questions.json"
    write_json(path, {"task_type": "Open-Ended", "questions": questions})
    if answers is not None:
        write_json(folder / "v2_mscoco_val2014_annotations.json", {"annotations": answers})


def vqa_answer(question_id, *words):
    return {"question_id": question_id, "image_id": 0, "multiple_choice_answer": words[0], "question_type": "is",
            "answer_type": "other", "answers": [{"answer": word, "answer_confidence": "yes", "answer_id": number}
                                                for number, word in enumerate(words, start=1)]}  # fmt: skip


def test_vqa_lists_each_picture_once_and_all_questions(tmp_path):
    write_vqa(tmp_path, [{"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000},
                         {"image_id": 393225, "question": "Is it hot?", "question_id": 393225000},
                         {"image_id": 262148, "question": "Is he wearing shoes?", "question_id": 262148001}],
              [vqa_answer(262148001, "yes", "no"), vqa_answer(262148000, *["down"] * 10)])  # fmt: skip
    source = vqa_v2.Source(tmp_path, "val")
    assert [path.name[:8] for path in source.files()] == ["v2_OpenE", "v2_mscoc"]
    assert list(source.rows()) == [Item("262148", ("val2014/COCO_val2014_000000262148.jpg",)),
                                   Item("393225", ("val2014/COCO_val2014_000000393225.jpg",))]  # fmt: skip
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in source.questions()))
    assert read_questions(path) == [Question(("262148",), "Where is he looking?", ("down",) * 10),
                                    Question(("393225",), "Is it hot?"),
                                    Question(("262148",), "Is he wearing shoes?", ("yes", "no"))]  # fmt: skip


def test_vqa_test_questions_have_no_answers_and_broken_ones_are_named(tmp_path):
    write_vqa(tmp_path, [{"image_id": 1, "question": "Why?", "question_id": 10}, {"image_id": 2, "question_id": 11}, 7,
                         {"image_id": 3, "question": " ", "question_id": 12}])  # fmt: skip
    source = vqa_v2.Source(tmp_path, "val2014")
    assert len(source.files()) == 1
    name = "v2_OpenEnded_mscoco_val2014_questions.json"
    assert [row.key for row in source.rows()] == ["1", f"{name}:questions[1]", f"{name}:questions[2]", "3"]
    assert list(source.questions()) == [{"image_id": "1", "question": "Why?", "answers": []}]
    write_vqa(tmp_path, [{"image_id": 1, "question": "Why?", "question_id": 10}], [{"question_id": 10, "answers": [5]}])
    assert list(source.questions()) == [{"image_id": "1", "question": "Why?", "answers": []}]


def test_vqa_test_dev_asks_about_pictures_of_the_test_split(tmp_path):
    write_json(tmp_path / "v2_OpenEnded_mscoco_test-dev2015_questions.json",
               {"questions": [{"image_id": 262144, "question": "Is the ball flying?", "question_id": 262144000}]})
    (item,) = vqa_v2.Source(tmp_path, "test-dev2015").rows()
    assert isinstance(item, Item) and item.pictures == ("test2015/COCO_test2015_000000262144.jpg",)
    assert not isinstance(item, BadRow)
