"""Visual Genome's regions and NLVR2's pairs, in miniature under their published names."""

import json
import tracemalloc

import pytest

from feature_extract.sources import nlvr2, reading, visual_genome
from feature_extract.sources.item import Item, NarrationItem
from opt.config import UserError
from opt.data.questions import Question, read_questions


def write_genome(folder, descriptions):
    (folder / "region_descriptions.json").write_text(json.dumps(descriptions))
    (folder / "image_data.json").write_text(json.dumps([
        {"width": 800, "url": "https://cs.stanford.edu/people/rak248/VG_100K_2/1.jpg", "height": 600, "image_id": 1,
         "coco_id": None, "flickr_id": None},
        {"width": 800, "url": "https://cs.stanford.edu/people/rak248/VG_100K/2.jpg", "height": 600, "image_id": 2,
         "coco_id": 17, "flickr_id": 3},
        {"width": 800, "image_id": 3},
    ]))  # fmt: skip


def regions(image_id, *phrases):
    return {"id": image_id, "regions": [{"region_id": 1382 + number, "width": 82, "height": 139, "image_id": image_id,
                                         "phrase": phrase, "y": 57, "x": 421}
                                        for number, phrase in enumerate(phrases)]}  # fmt: skip


def test_visual_genome_takes_the_longest_phrases(tmp_path):
    write_genome(tmp_path, [regions(1, "a clock", "the clock is green in colour", "shade along the street ", "cars"),
                            regions(2)])  # fmt: skip
    first, second = visual_genome.Source(tmp_path, phrases=2).rows()
    assert first == Item("1", ("VG_100K_2/1.jpg",), (NarrationItem("1383", "the clock is green in colour"),
                                                     NarrationItem("1384", "shade along the street")))  # fmt: skip
    assert second == Item("2", ("VG_100K/2.jpg",))
    in_order, _ = visual_genome.Source(tmp_path, phrases=2, order="first", pictures="vg").rows()
    assert [one.narration_id for one in in_order.narrations] == ["1382", "1383"]
    assert in_order.pictures == ("vg/VG_100K_2/1.jpg",)
    everything, _ = visual_genome.Source(tmp_path, phrases=0).rows()
    assert len(everything.narrations) == 4


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_a_long_list_is_read_in_pieces(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(reading, "CHUNK_CHARACTERS", chunk)
    content = [regions(number, f"pi\u00e8ce [{number}], {{x}}") for number in range(20)]
    for indent, ensure_ascii in ((None, True), (1, False)):
        (tmp_path / "list.json").write_text(json.dumps(content, indent=indent, ensure_ascii=ensure_ascii) + "\n")
        assert list(reading.stream_json(tmp_path / "list.json")) == content


def test_visual_genome_streams_its_regions(tmp_path):
    write_genome(tmp_path, [regions(1, *["a phrase of a region"] * 50)] * 2000)
    tracemalloc.start()
    assert sum(1 for _ in visual_genome.Source(tmp_path).rows()) == 2000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "region_descriptions.json").stat().st_size > 10 << 20 and peak < 6 << 20


def test_visual_genome_names_what_it_cannot_use(tmp_path):
    bad = [regions(3, "no address"), regions(4, "unknown"), regions(1, None), {"id": 1}, 5]
    write_genome(tmp_path, [*bad, regions(2, "fine")])
    *broken, last = visual_genome.Source(tmp_path).rows()
    assert [row.key for row in broken] == [f"region_descriptions.json[{number}]" for number in range(5)]
    assert "picture 3 is not in image_data.json" in broken[0].reason and last.key == "2"
    for source in (visual_genome.Source(tmp_path, "val"), visual_genome.Source(tmp_path, phrases=-1),
                   visual_genome.Source(tmp_path / "absent")):  # fmt: skip
        with pytest.raises(UserError):
            source.files()


@pytest.mark.parametrize("content", ['[{"id": 1, "regions": []}', "", "{}", '[{"id": 1} {'])
def test_visual_genome_cut_short_is_a_sentence(tmp_path, content):
    write_genome(tmp_path, [])
    (tmp_path / "region_descriptions.json").write_text(content)
    with pytest.raises(UserError, match=r"region_descriptions\.json: (not JSON|expected a list)"):
        list(visual_genome.Source(tmp_path).rows())


def pair(identifier="train-10171-0-0", sentence="Two dogs.", label="True", **more):
    return json.dumps({"validation": {"77": "True"}, "sentence": sentence, "left_url": "https://a.b/left.jpg",
                       "writer": "103", "label": label, "right_url": "https://a.b/right.jpg", "synset": "dog",
                       "query": "dogs2", "identifier": identifier, **more}) + "\n"  # fmt: skip


def test_nlvr2_sentences_of_one_pair_share_its_two_pictures(tmp_path):
    second = pair("train-10171-0-1", "Three cats.", "False", directory=77)
    (tmp_path / "train.json").write_text(pair(directory=77) + second)
    source = nlvr2.Source(tmp_path, sentences="all")
    pictures = tuple(f"images/train/77/train-10171-0-img{number}.png" for number in (0, 1))
    assert list(source.rows()) == [Item("train-10171-0", pictures, (NarrationItem("0", "Two dogs."),)),
                                   Item("train-10171-0", pictures, (NarrationItem("1", "Three cats."),))]  # fmt: skip
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in source.questions()))
    keys = ("train-10171-0",)
    assert read_questions(path) == [Question(keys, "Two dogs.", ("true",), "train-10171-0"),
                                    Question(keys, "Three cats.", ("false",), "train-10171-1")]  # fmt: skip


def test_nlvr2_options(tmp_path):
    (tmp_path / "dev.json").write_text(pair("dev-850-0-0") + pair("dev-850-0-1", label="False"))
    (row,) = nlvr2.Source(tmp_path, "dev", pictures="pngs").rows()
    assert row.pictures == ("pngs/dev/dev-850-0-img0.png", "pngs/dev/dev-850-0-img1.png")
    assert row.narrations == (NarrationItem("0", "Two dogs."),)
    (row,) = nlvr2.Source(tmp_path, "dev", sentences="none", pictures="url").rows()
    assert row.pictures == ("https://a.b/left.jpg", "https://a.b/right.jpg") and not row.narrations
    with pytest.raises(UserError, match=r"train\.json does not exist"):
        nlvr2.Source(tmp_path).files()


def test_nlvr2_malformed_lines_keep_their_place(tmp_path):
    bad = [pair("dev"), pair("dev-850-0-x"), pair(sentence=None), pair(label="maybe"), "{\n", "5\n"]
    bad.append(pair(sentence="half \ud800"))
    (tmp_path / "dev.json").write_text(pair() + "".join(bad) + pair())
    source = nlvr2.Source(tmp_path, "dev")
    first, *broken, last = source.rows()
    assert [row.key for row in broken] == [f"dev.json:{number}" for number in range(2, 9)]
    assert isinstance(first, Item) and isinstance(last, Item)
    assert len(list(source.questions())) == 2
