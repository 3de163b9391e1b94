"""What results call the corpus that records come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from feature_extract.origin import origin_of
from feature_extract.sources import coco_captions, flickr_audio, folder, karpathy, localized_narratives, vqa_v2
from opt.data.manifest import Origin


@pytest.mark.parametrize(
    ("dataset_id", "name"),
    [("open_images_train", "open_images"), ("mscoco_val2017", "coco"), ("Flick30k_test", "flickr30k"),
     ("ADE20k_validation", "ade20k"), ("spoken_scenes_train", "spoken_scenes"), ("OVIS_train", "ovis"),
     ("mine", "localized_narratives pets"), (7, "localized_narratives pets")],
)
def test_narrations_say_which_corpus_they_tell_of(tmp_path: Path, dataset_id: object, name: str) -> None:
    (tmp_path / "pets").mkdir()
    lines = ["torn {", json.dumps({"dataset_id": dataset_id, "image_id": "1", "caption": "a"})]
    (tmp_path / "pets" / "train_localized_narratives.jsonl").write_text("\n".join(lines) + "\n")
    source = localized_narratives.Source(tmp_path / "pets", "train")
    assert origin_of("localized_narratives", source) == Origin(name, "train")


def test_one_corpus_has_one_name_whatever_reads_it(tmp_path: Path) -> None:
    assert origin_of("karpathy", karpathy.Source(tmp_path, "test")) == Origin("coco", "test")
    assert origin_of("karpathy", karpathy.Source(tmp_path, "val", "flickr30k")) == Origin("flickr30k", "val")
    assert origin_of("coco_captions", coco_captions.Source(tmp_path, "train2017")) == Origin("coco", "train2017")
    assert origin_of("vqa_v2", vqa_v2.Source(tmp_path, "val2014")).name == "coco"
    (tmp_path / "Flickr8k.token.txt").write_text("a.jpg#0\tA dog .\n")
    assert origin_of("flickr_audio", flickr_audio.Source(tmp_path)) == Origin("flickr8k", "train")
    (tmp_path / "pets").mkdir()
    assert origin_of("folder", folder.Source(tmp_path / "pets")) == Origin("folder pets", "train")
