"""Flickr captions in their four published forms, and the spoken ones."""

import pytest

from feature_extract.sources.flickr_audio import Source
from feature_extract.sources.item import BadRow, Item, NarrationItem
from opt.config import UserError

DOG, GIRL = "1000268201_693b08cb0e.jpg", "1001773457_577c3a7d70.jpg"


def test_flickr8k_with_speech_and_lists(tmp_path):
    texts = tmp_path / "Flickr8k_text"
    texts.mkdir()
    (tmp_path / "Flicker8k_Dataset").mkdir()
    (texts / "Flickr8k.token.txt").write_text(
        f'{DOG}#0\tA dog , "running" .\n{DOG}#1\tA dog runs .\n{GIRL}#0\tA girl .\n'
        "2258277193_586949ec62.jpg.1#0\tLost .\n")
    (texts / "Flickr_8k.trainImages.txt").write_text(f"{DOG}\n2258277193_586949ec62.jpg.1\n")
    (texts / "Flickr_8k.devImages.txt").write_text(f"{GIRL}\n")
    (tmp_path / "flickr_audio").mkdir()
    (tmp_path / "flickr_audio" / "wav2capt.txt").write_text(
        f"{DOG[:-4]}_1.wav {DOG} #1\n{GIRL[:-4]}_0.wav {GIRL} #0\nno line of theirs\n")
    source = Source(tmp_path)
    assert [path.name for path in source.files()] == ["Flickr8k.token.txt", "Flickr_8k.trainImages.txt", "wav2capt.txt"]
    assert list(source.rows()) == [
        Item(DOG[:-4], (f"Flicker8k_Dataset/{DOG}",), (NarrationItem("0", 'A dog , "running" .'),)),
        Item(DOG[:-4], (f"Flicker8k_Dataset/{DOG}",),
             (NarrationItem("1", "A dog runs .", f"flickr_audio/wavs/{DOG[:-4]}_1.wav"),)),
        Item("2258277193_586949ec62-jpg", ("Flicker8k_Dataset/2258277193_586949ec62.jpg.1",),
             (NarrationItem("0", "Lost ."),)),
    ]  # fmt: skip
    (girl,) = Source(tmp_path, "val", pictures="elsewhere").rows()
    assert girl.pictures == (f"elsewhere/{GIRL}",) and girl.narrations[0].recording.endswith(f"/{GIRL[:-4]}_0.wav")
    for split in ("test", "dev", "*"):
        with pytest.raises(UserError, match="no split"):
            Source(tmp_path, split).files()


def test_a_csv_numbers_captions_by_their_order(tmp_path):
    (tmp_path / "Images").mkdir()
    (tmp_path / "captions.txt").write_text(
        f'image,caption\n{DOG},"A dog , running ."\n{GIRL},A girl .\n{DOG},"He said ""wuff"""\n')
    rows = list(Source(tmp_path).rows())
    assert [(row.key, row.narrations[0].narration_id) for row in rows] == [
        (DOG[:-4], "0"), (GIRL[:-4], "0"), (DOG[:-4], "1")]
    assert rows[2].narrations[0].caption == 'He said "wuff"' and rows[0].pictures == (f"Images/{DOG}",)


def test_flickr30k_between_bars_and_its_broken_line(tmp_path):
    (tmp_path / "flickr30k_images").mkdir()
    (tmp_path / "results.csv").write_text("image_name| comment_number| comment\n1000092795.jpg| 0| Two | men .\n"
                                          "2199200615.jpg| 4   A dog runs .\n1000092795.jpg| 1| A bush .\n")
    first, broken, last = Source(tmp_path).rows()
    assert first == Item("1000092795", ("flickr30k_images/1000092795.jpg",), (NarrationItem("0", "Two | men ."),))
    assert isinstance(broken, BadRow) and broken.key == "results.csv:3"
    assert last.narrations == (NarrationItem("1", "A bush ."),)


def test_flickr30k_token_file_and_malformed_lines(tmp_path):
    (tmp_path / "flickr30k-images").mkdir()
    (tmp_path / "results_20130124.token").write_bytes(
        b"1.jpg#0\tTwo .\n2.jpg\tno number\n3.jpg#x\tno number\n4.jpg#0 no tab\n5.jpg#0\t\xff\xfe\n#0\tno name\n"
        b"6.jpg#0\tok\n")
    first, *broken, last = Source(tmp_path).rows()
    assert first.key == "1" and last.key == "6"
    assert [row.key for row in broken] == [f"results_20130124.token:{number}" for number in range(2, 7)]


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(UserError, match=r"none of Flickr8k\.token\.txt"):
        Source(tmp_path).files()
    (tmp_path / "captions.csv").write_text("image,caption\n")
    with pytest.raises(UserError, match="--pictures"):
        list(Source(tmp_path).rows())
