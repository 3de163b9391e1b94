"""Sources of one file: Conceptual Captions, tables of columns, text; and transcripts of speech."""

import tracemalloc

import pytest

from feature_extract.sources import conceptual_captions, table, text, transcripts
from feature_extract.sources.item import BadRow, Item, NarrationItem
from opt.config import UserError


@pytest.mark.parametrize("header", ["", "caption\turl\n"])
def test_conceptual_captions_of_either_order(tmp_path, header):
    path = tmp_path / "Train_GCC-training.tsv"
    path.write_text(header + 'a "very" typical bus\thttp://a.b/c.jpg\nhttps://d.e/f?x=1,2\tsierra looked\n')
    assert list(conceptual_captions.Source(path).rows()) == [
        Item("Train_GCC-training-00000000", ("http://a.b/c.jpg",), (NarrationItem("0", 'a "very" typical bus'),)),
        Item("Train_GCC-training-00000001", ("https://d.e/f?x=1,2",), (NarrationItem("0", "sierra looked"),)),
    ]


def test_conceptual_captions_as_downloaded(tmp_path):
    path = tmp_path / "cc12m.tsv"
    path.write_text("".join(f"http://a.b/{row}\tcaption {row}\n" for row in range(10_002)))
    source = conceptual_captions.Source(path, pictures="images/{shard:05}/{shard:05}{index:04}.jpg")
    assert source.root == tmp_path
    *_, last = source.rows()
    assert last.key == "cc12m-00010001" and last.pictures == ("images/00001/000010001.jpg",)
    for pictures in ("images/all.jpg", "images/{name}.jpg", "{", "{}"):
        with pytest.raises(UserError, match="--pictures"):
            conceptual_captions.Source(path, pictures=pictures).files()


def test_conceptual_captions_that_are_broken_keep_their_place_and_number(tmp_path):
    path = tmp_path / "cc.tsv"
    path.write_bytes(b"one\tcell\thttp://a\nno address\there\nhttp://a\thttp://b\nonly\n\xff\thttp://a\n"
                     + b"y" * 200_000 + b"\thttp://a\nfine\thttp://a.b/c\n")
    *broken, last = conceptual_captions.Source(path).rows()
    assert [row.key for row in broken] == [f"cc.tsv:{number}" for number in range(1, 7)]
    assert last == Item("cc-00000006", ("http://a.b/c",), (NarrationItem("0", "fine"),))


def test_a_csv_table_with_its_standard_columns(tmp_path):
    path = tmp_path / "all.csv"
    path.write_text('\ufeffimage,caption,audio,other\nimages/a.jpg,"A dog,\nrunning.",a.wav,1\n'
                    'images/a.jpg,Second.,,2\n,Only words.,,3\nimages/b.jpg,,,4\n,,only/speech.flac,5\n'
                    'https://a.b/c.jpg,Far.,,6\n')
    source = table.Source(path)
    rows = list(source.rows())
    assert rows[:5] == [
        Item("images-a", ("images/a.jpg",), (NarrationItem("0", "A dog,\nrunning.", "a.wav"),)),
        Item("images-a", ("images/a.jpg",), (NarrationItem("1", "Second."),)),
        Item("all-00000002", (), (NarrationItem("2", "Only words."),)),
        Item("images-b", ("images/b.jpg",)),
        Item("only-speech", (), (NarrationItem("4", None, "only/speech.flac"),)),
    ]
    assert rows[5].pictures == ("https://a.b/c.jpg",) and len(rows[5].key) == 16
    assert source.root == tmp_path and table.Source(path, folder=tmp_path / "media").root == tmp_path / "media"


def test_a_tsv_table_with_columns_of_its_own(tmp_path):
    path = tmp_path / "all.tsv"
    path.write_text('id\tfile\tsaid\tpart\nx.1\ta.jpg\t"quoted\ttrain\ny\tb.jpg\tB\tval\nz\tc.jpg\tC\ttrain\n')
    columns = {"image_column": "file", "caption_column": "said", "key_column": "id", "split_column": "part"}
    assert list(table.Source(path, **columns).rows()) == [
        Item("x-1", ("a.jpg",), (NarrationItem("0", '"quoted'),)), Item("z", ("c.jpg",), (NarrationItem("2", "C"),))]
    assert [row.key for row in table.Source(path, "val", **columns).rows()] == ["y"]
    with pytest.raises(UserError, match="--audio-column nothing: .* has the columns id, file, said, part"):
        list(table.Source(path, audio_column="nothing").rows())
    with pytest.raises(UserError, match="say which holds what"):
        list(table.Source(path).rows())


def test_a_table_names_broken_rows(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b"image,caption\na.jpg\nb.jpg,\xff\n,\nc.jpg,\"" + b"x" * 200_000 + b"\"\nd.jpg,ok,more\n")
    *broken, last = table.Source(path).rows()
    assert [row.key for row in broken] == [f"t.csv:{number}" for number in (2, 3, 4, 5)] and last.key == "d"
    for name, content in [("empty.csv", b""), ("t.json", b"{}"), ("t.parquet", b"PAR1 no")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError):
            list(table.Source(tmp_path / name).rows())
    with pytest.raises(UserError, match="does not exist"):
        table.Source(tmp_path / "absent.csv").files()


def test_a_parquet_table_is_the_same_as_the_csv(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"image": ["a.jpg", None, "c.jpg"], "caption": ["A dog.", "Words.", None], "number": [1, 2, 3],
               "raw": [b"1", b"2", b"3"]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet", row_group_size=2)
    (tmp_path / "t.csv").write_text("image,caption,number\na.jpg,A dog.,1\n,Words.,2\nc.jpg,,3\n")
    assert list(table.Source(tmp_path / "t.parquet").rows()) == list(table.Source(tmp_path / "t.csv").rows())
    assert [row.key for row in table.Source(tmp_path / "t.parquet", key_column="number").rows()] == ["1", "2", "3"]
    (broken, *_) = table.Source(tmp_path / "t.parquet", caption_column="raw").rows()
    assert broken == BadRow("t.parquet:1", "malformed line (ValueError: a bytes where a text was expected)")


def test_text_is_one_caption_a_line(tmp_path):
    path = tmp_path / "news.en.txt"
    path.write_bytes(b"\xef\xbb\xbfFirst line. \r\n\n\xff\nLast,\tline")
    first, broken, last = text.Source(path).rows()
    assert first == Item("news-en-00000001", (), (NarrationItem("0", "First line."),))
    assert isinstance(broken, BadRow) and broken.key == "news.en.txt:3"
    assert last == Item("news-en-00000004", (), (NarrationItem("0", "Last,\tline"),))


def test_transcripts_in_a_table(tmp_path):
    (tmp_path / "transcripts.tsv").write_bytes(
        b"1688-142285-0000\tthere's iron they say\nno tab\n\tno id\nb\t\xff\nc\t\n")
    first, *broken, last = transcripts.Source(tmp_path).rows()
    assert first == Item("1688-142285-0000", (), (NarrationItem("0", "there's iron they say",
                                                                "flac/1688-142285-0000.flac"),))  # fmt: skip
    assert [row.key for row in broken] == [f"transcripts.tsv:{number}" for number in (2, 3, 4)]
    assert last.narrations[0].caption == ""
    first, *_ = transcripts.Source(tmp_path, recordings="https://a.b/{id}.wav").rows()
    assert first.narrations[0].recording == "https://a.b/1688-142285-0000.wav"
    with pytest.raises(UserError, match="must hold {id}"):
        transcripts.Source(tmp_path, recordings="flac").files()


def test_transcripts_as_librispeech_has_them(tmp_path):
    chapters = [("dev-clean", 84, 121123), ("train-clean-100", 103, 1241), ("train-clean-100", 103, 1240)]
    for split, speaker, chapter in chapters:
        folder = tmp_path / split / str(speaker) / str(chapter)
        folder.mkdir(parents=True)
        (folder / f"{speaker}-{chapter}.trans.txt").write_text(
            f"{speaker}-{chapter}-0000 CHAPTER ONE\n{speaker}-{chapter}-0001 THAT HAD\n")
    rows = list(transcripts.Source(tmp_path, "train-clean-100").rows())
    assert [row.key for row in rows] == ["103-1240-0000", "103-1240-0001", "103-1241-0000", "103-1241-0001"]
    assert rows[0].narrations == (NarrationItem("0", "CHAPTER ONE", "train-clean-100/103/1240/103-1240-0000.flac"),)
    assert len(list(transcripts.Source(tmp_path).rows())) == 6
    assert len(list(transcripts.Source(tmp_path / "dev-clean").rows())) == 2
    with pytest.raises(UserError, match="there are dev-clean, train-clean-100"):
        transcripts.Source(tmp_path, "val").files()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"neither transcripts\.tsv nor any"):
        transcripts.Source(tmp_path, "empty").files()


@pytest.mark.parametrize("name", ["cc.tsv", "t.csv", "t.txt"])
def test_long_tables_are_streamed(tmp_path, name):
    path = tmp_path / name
    with path.open("w") as file:
        file.write("caption,image\n" if name == "t.csv" else "")
        separator = "," if name == "t.csv" else "\t"
        file.writelines(f"caption number {row}{separator}http://a.b/{row}.jpg\n" for row in range(50_000))
    kind = {"cc.tsv": conceptual_captions, "t.csv": table, "t.txt": text}[name]
    tracemalloc.start()
    assert sum(1 for _ in kind.Source(path).rows()) == 50_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
