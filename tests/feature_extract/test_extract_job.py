"""`opt extract` as a whole: what is written, what is lost and said so, what a stop and a changed setting do."""

import json
import tarfile

import numpy as np
import pytest
from jobs import config, contents
from PIL import Image

from feature_extract import job, options, work
from feature_extract.extractors import load_extractors
from feature_extract.job import extract
from feature_extract.media import read_picture, read_recording
from feature_extract.profiles import PROFILES
from opt import cli
from opt.config import UserError
from opt.data.manifest import Origin, read_manifest
from opt.data.questions import read_questions
from opt.data.shards import ShardReader


def members(folder) -> dict[tuple[str, str], bytes]:
    """(shard, member) -> bytes."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path, "r:") as tar:
            found |= {(path.name, member.name): tar.extractfile(member).read() for member in tar}
    return found


def test_samples_hold_what_the_extractors_see(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    extract(config(corpus, out))
    reader = ShardReader(out)
    assert list(reader.keys()) == ["p0", "p1", "p2", "p2", "p3", "p4", "p5", "p6", "p7"]
    regions, audio, codes = load_extractors(reader.manifest)
    sample = reader.sample(3, jpeg=True)
    picture = read_picture(corpus / "images" / "p2.jpg")
    with work.one_thread():
        found = regions(picture.image)
        speech = audio(read_recording(corpus / "voice" / "train" / "r8.flac"))
        np.testing.assert_array_equal(sample.pictures[0].codes, codes(picture.image))
    np.testing.assert_array_equal(sample.pictures[0].regions, found.features)
    np.testing.assert_array_equal(sample.pictures[0].boxes, found.boxes)
    np.testing.assert_array_equal(sample.speech, speech.features)
    assert sample.caption == "Telling 8 of picture 2."
    assert (sample.pictures[0].width, sample.pictures[0].height) == (112, 96)
    assert sample.pictures[0].jpeg == (corpus / "images" / "p2.jpg").read_bytes()
    assert reader.manifest.codebook == codes.codebook and reader.manifest.region_classes == regions.classes
    assert reader.manifest.origins == (Origin("localized_narratives " + corpus.name, "train"),)
    said = capsys.readouterr().out
    assert "8 records, 9 samples in 3 shards" in said and "regions tiny, audio tiny, codes tiny" in said


def test_what_is_broken_is_listed_and_shifts_nothing(corpus, tmp_path, capsys):
    extract(config(corpus, tmp_path / "whole"))
    broken = corpus / "images" / "p3.jpg"
    broken.write_bytes(broken.read_bytes()[:900])
    (corpus / "voice" / "train" / "r4.flac").unlink()
    path = corpus / "train_localized_narratives.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[5:7] = [lines[5].replace("Telling 5 of picture 5.", "  "), "{malformed\n"]
    path.write_text("".join(lines))
    extract(config(corpus, tmp_path / "holes"))
    whole, holes = members(tmp_path / "whole"), members(tmp_path / "holes")
    lost = {name.split(".")[0] for _, name in whole.keys() - holes.keys()}
    changed = {name for place, name in holes if whole[place, name] != holes[place, name]}
    assert lost == {"p3", "p5", "p6"} and changed == {"p4.safetensors"} and not holes.keys() - whole.keys()
    failures = [json.loads(line) for line in (tmp_path / "holes" / "failures.jsonl").read_text().splitlines()]
    assert [(failure["key"], failure["part"]) for failure in failures] == [
        ("p3", "picture 0"), ("p4", "recording 0"), ("p5", "caption 0"), ("train_localized_narratives.jsonl:7", "row")]
    assert failures[0]["reason"].startswith("broken picture (") and failures[1]["reason"] == "missing file"
    reader = ShardReader(tmp_path / "holes")
    sample = reader.sample(list(reader.keys()).index("p4"))
    assert sample.speech is None and sample.caption and sample.pictures
    said = capsys.readouterr().out
    for reason in ("picture: broken picture", "recording: missing file", "caption: empty", "row: malformed line"):
        assert f"     1  {reason}" in said
    assert len(read_manifest(tmp_path / "holes").failures) == 4


def test_one_telling_without_a_caption_leaves_the_other(corpus, tmp_path):
    path = corpus / "train_localized_narratives.jsonl"
    path.write_text(path.read_text().replace("Telling 2 of picture 2.", ""))
    extract(config(corpus, tmp_path / "out"))
    reader = ShardReader(tmp_path / "out")
    assert [narration.caption for narration in reader.record(2).narrations] == ["Telling 8 of picture 2."]


def test_a_second_run_does_nothing_again(corpus, tmp_path, monkeypatch, capsys):
    extract(config(corpus, tmp_path / "out"))
    before = contents(tmp_path / "out")
    monkeypatch.setattr(job, "run", lambda *_: pytest.fail("a finished shard was extracted again"))
    extract(config(corpus, tmp_path / "out"))
    assert contents(tmp_path / "out") == before
    assert "(3 were there already)" in capsys.readouterr().out


def test_a_stopped_job_goes_on_and_ends_the_same(corpus, tmp_path, monkeypatch):
    extract(config(corpus, tmp_path / "whole"))
    make, made = work.make_record, []

    def stop_at_the_fifth(*given):
        made.append(given)
        if len(made) == 5:
            raise KeyboardInterrupt
        return make(*given)

    monkeypatch.setattr(work, "make_record", stop_at_the_fifth)
    monkeypatch.setattr(job, "_forecast", lambda *_: "")
    with pytest.raises(KeyboardInterrupt):
        extract(config(corpus, tmp_path / "out"))
    assert sorted(contents(tmp_path / "out")) == ["00000.json", "00000.npy", "00000.tar", "settings.json"]
    monkeypatch.setattr(work, "make_record", make)
    (tmp_path / "out" / ".00001.tar.0123abcd.tmp").write_bytes(b"left by a kill")
    (tmp_path / "out" / "00002.tar").write_bytes(b"a shard without a receipt")
    kept = (tmp_path / "out" / "00000.tar").stat().st_mtime_ns
    extract(config(corpus, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert (tmp_path / "out" / "00000.tar").stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    ("change", "said"),
    [({"max_regions": 5}, "--max-regions 36; now it is --max-regions 5"), ({"audio": "none"}, "now it is --audio none"),
     ({"shard_size": 4, "jpeg": False}, "with --shard-size 3, --jpeg; now it is --shard-size 4, --no-jpeg: ")],
)
def test_other_settings_need_another_folder(corpus, tmp_path, change, said):
    extract(config(corpus, tmp_path / "out", codes="none"))
    with pytest.raises(UserError, match=said):
        extract(config(corpus, tmp_path / "out", **{"codes": "none"} | change))
    read_manifest(tmp_path / "out")


def test_codes_on_another_grid_are_those_of_a_larger_square(corpus, tmp_path):
    extract(config(corpus, tmp_path / "out", audio="none", codes_grid=14))
    reader = ShardReader(tmp_path / "out")
    codes = load_extractors(reader.manifest).codes
    with work.one_thread():
        seen = codes(read_picture(corpus / "images" / "p2.jpg").image)
    stored = reader.sample(3).pictures[0].codes
    np.testing.assert_array_equal(stored, seen)
    assert stored.shape == (14, 14) and reader.manifest.codes_grid == 14 and set(reader.lengths.codes) == {196}
    with pytest.raises(UserError, match="begun with --codes-grid 14; now it is no --codes-grid"):
        extract(config(corpus, tmp_path / "out", audio="none"))


def test_another_list_of_rows_needs_another_folder(corpus, tmp_path):
    extract(config(corpus, tmp_path / "out", audio="none", codes="none"))
    path = corpus / "train_localized_narratives.jsonl"
    path.write_text(path.read_text().replace("Telling", "Saying"))
    with pytest.raises(UserError, match="whose rows have the SHA-256"):
        extract(config(corpus, tmp_path / "out", audio="none", codes="none"))


def test_kinds_can_be_left_out(corpus, tmp_path):
    extract(config(corpus, tmp_path / "out", regions="none", codes="none", jpeg=False))
    sample = ShardReader(tmp_path / "out").sample(0, jpeg=True)
    assert sample.pictures[0].regions is sample.pictures[0].codes is sample.pictures[0].jpeg is None
    assert sample.speech is not None and list(read_manifest(tmp_path / "out").extractors) == ["audio"]


def test_a_repeated_key_and_a_corpus_of_nothing_usable(corpus, tmp_path):
    path = corpus / "train_localized_narratives.jsonl"
    line = json.loads(path.read_text().splitlines()[0])
    path.write_text("".join(json.dumps(line | {"image_id": name}) + "\n" for name in ("p.0", "p-0")))
    with pytest.raises(UserError, match="not one row could be used"):
        extract(config(corpus, tmp_path / "out"))
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert reasons == ["another row has this key and another picture", "missing file"]


def test_two_jobs_in_one_folder(corpus, tmp_path, monkeypatch):
    def second(*_):
        with pytest.raises(UserError, match="another job is writing here"):
            extract(config(corpus, tmp_path / "out"))
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "run", second)
    with pytest.raises(KeyboardInterrupt):
        extract(config(corpus, tmp_path / "out"))


def test_dry_run_says_what_the_job_would_say(corpus, tmp_path, capsys):
    extract(config(corpus, tmp_path / "out", codes="none"))
    with pytest.raises(UserError, match="begun with --codes none"):
        extract(config(corpus, tmp_path / "out", dry_run=True))
    for path in (corpus / "images").iterdir():
        path.unlink()
    extract(config(corpus, tmp_path / "other", dry_run=True))
    said = capsys.readouterr().out
    assert "none of the 8 rows tried can be used" in said and "8  picture: missing file, such as p0" in said


def test_folders_that_cannot_be_written_to_are_refused(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        extract(config(corpus, tmp_path / "file"))
    with pytest.raises(UserError, match="is the corpus itself"):
        extract(config(corpus, corpus))


def test_no_source_at_all_is_a_usage_error(capsys):
    assert cli.main(["extract"]) == 2 and cli.main(["extract", "nothing-like-it", "x", "--out", "y"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_dry_run_writes_nothing(corpus, tmp_path, capsys):
    extract(config(corpus, tmp_path / "out", dry_run=True))
    assert not (tmp_path / "out").exists() and "would extract 8 rows into 3 shards" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [{"frames_per_second": float("nan")}, {"frames_per_second": float("inf")}, {"max_seconds": float("inf")},
     {"max_frames": 70_000}, {"max_regions": 70_000}, {"shard_size": -1}, {"workers": -1}, {"score_threshold": 1.1},
     {"row_seconds": 0.0}, {"max_failures": -1}, {"codes_grid": 0}, {"codes_grid": 65}],
)
def test_numbers_out_of_range_are_refused_before_any_work(corpus, tmp_path, change):
    with pytest.raises(UserError, match=f"--{next(iter(change)).replace('_', '-')} "):
        extract(config(corpus, tmp_path / "out", **change))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["{", "[]", "", "\udcff"])
def test_damaged_settings_are_a_clear_error(corpus, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="settings.json"):
        extract(config(corpus, tmp_path / "out", regions="none", audio="none", codes="none"))


@pytest.mark.parametrize("about", [{}, {"backend": 1, "weights_sha256": "x"}, None, []])
def test_settings_of_another_form_are_other_settings(corpus, tmp_path, about):
    extract(config(corpus, tmp_path / "out", audio="none", codes="none"))
    path = tmp_path / "out" / "settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"regions": about}))
    with pytest.raises(UserError, match="was begun with (no )?--regions"):
        extract(config(corpus, tmp_path / "out", audio="none", codes="none"))


def test_a_folder_called_like_a_source_is_not_taken_for_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text("A caption.")
    none = ["--regions", "none", "--audio", "none", "--codes", "none", "--workers", "0"]
    assert cli.main(["extract", "--out", "folder", "text", "words.txt", *none]) == 2
    assert "put the source first: opt extract text" in capsys.readouterr().err
    assert cli.main(["extract", "text", "words.txt", "--out", "folder", *none]) == 0


def test_captions_that_are_too_long_are_failures_of_their_record(corpus, tmp_path):
    path = corpus / "train_localized_narratives.jsonl"
    path.write_text(path.read_text().replace("Telling 5 of picture 5.", "word " * 70_000))
    extract(config(corpus, tmp_path / "out", regions="none", audio="none", codes="none"))
    (failure,) = read_manifest(tmp_path / "out").failures
    assert failure.key == "p5" and "words = 70000" in failure.reason


@pytest.mark.parametrize("name", options.names())
def test_every_source_has_options_of_its_own_that_clash_with_none(name, capsys):
    assert cli.main(["extract", name, "--help"]) == 0
    said = capsys.readouterr().out
    assert "--out" in said and f" {name}" in said.replace(",", "")


@pytest.mark.parametrize(("profile", "int8"), [("full", False), ("standard", False), ("compact", True)])
def test_a_profile_sets_what_is_stored(profile, int8):
    kind, begin = options.ExtractConfig.prepare(["localized-narratives", "x", "--profile", profile])
    assert begin.int8 == int8 and begin.speech.max_frames == PROFILES[profile]["max_frames"]
    assert begin.name == "localized-narratives" and begin.source.split == "train"


def test_profiles_store_what_they_say(corpus, tmp_path):
    sizes = {}
    for profile, stored in PROFILES.items():
        extract(config(corpus, tmp_path / profile, jpeg=False, **stored))
        reader = ShardReader(tmp_path / profile)
        sizes[profile] = sum(receipt.bytes for receipt in reader.manifest.shards)
        top = reader.sample(0).pictures[0].top_classes
        assert (0 if top is None else top.shape[1]) == min(stored["top_classes"], len(reader.manifest.region_classes))
        assert all(receipt.storage == ("int8" if stored["int8"] else "float16") for receipt in reader.manifest.shards)
    assert reader.sample(0).speech.shape[0] < ShardReader(tmp_path / "full").sample(0).speech.shape[0]


def test_questions_of_the_source_lie_beside_the_shards(tmp_path):
    from feature_extract.sources import nlvr2

    (tmp_path / "corpus" / "images" / "dev").mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (64, 48), "red").save(tmp_path / "corpus" / "images" / "dev" / f"dev-1-0-img{number}.png")
    entry = {"identifier": "dev-1-0-0", "sentence": "Both are red.", "label": "True", "left_url": "a", "right_url": "b"}
    (tmp_path / "corpus" / "dev.json").write_text(json.dumps(entry) + "\n")
    settings = vars(config(tmp_path, tmp_path / "out", audio="none"))
    extract(options.ExtractConfig(**settings | {"name": "nlvr2", "source": nlvr2.Source(tmp_path / "corpus", "dev")}))
    reader = ShardReader(tmp_path / "out")
    assert len(reader.record(0).pictures) == 2 and reader.sample(0).caption == "Both are red."
    (question,) = read_questions(tmp_path / "out" / "questions.jsonl")
    assert question.keys == (reader.sample(0).key,) and question.answers == ("true",)


def test_labels_of_the_source_lie_beside_the_shards(tmp_path):
    from eval.naming import read_labels
    from feature_extract.sources import class_folders

    for name in ("red_hat", "dog"):
        (tmp_path / "corpus" / name).mkdir(parents=True)
        Image.new("RGB", (64, 48), "red").save(tmp_path / "corpus" / name / "1.png")
    settings = vars(config(tmp_path, tmp_path / "out", audio="none"))
    source = class_folders.Source(tmp_path / "corpus")
    extract(options.ExtractConfig(**settings | {"name": "class_folders", "source": source}))
    assert set(ShardReader(tmp_path / "out").keys()) == set(read_labels(tmp_path / "out" / "labels.jsonl"))
    assert not (tmp_path / "out" / "questions.jsonl").exists()
