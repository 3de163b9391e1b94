"""`opt shards caption` and `opt shards filter`: what is written, what goes and why, and that all else stays."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures import FACTS, tokenizer
from shrunken import small
from stored_records import full_narration, full_record, records_of, same, write_folder
from torch import Tensor

from feature_extract import capfilt
from feature_extract.capfilt import ShardsCaption, ShardsFilter, caption_shards, filter_shards
from opt.checkpoint import save_pretrained
from opt.config import UserError
from opt.data.manifest import Origin
from opt.data.record import Narration, Record, Sample
from opt.data.shards import ShardReader
from opt.data.verify import VerifyConfig, verify
from opt.nn.sampling import Sampling
from opt.nn.states import States
from opt.systems.blip import BLIP

SEEN = dataclasses.replace(FACTS, region_width=8, speech_width=6)


class Seer(BLIP):
    """Describes a picture by its key, and holds captions for right that name the key."""

    def generate_text(self, samples: Sequence[Sample], modalities: Sequence[str], sampling: Sampling) -> list[str]:
        assert tuple(modalities) == ("image",) and all(sample.caption is None for sample in samples)
        return ["" if sample.key == "silent" else f"shows {sample.key}" for sample in samples]

    def alone(self, samples: Sequence[Sample], modality: str) -> States:
        """The key's hash, or that of the caption's last word."""
        said = [sample.key if modality == "image" else (sample.caption or "").split()[-1] for sample in samples]
        return States(torch.tensor([[float(sum(map(ord, word)))] for word in said]), np.ones(len(said), np.int64))

    def match_probability(self, parts: Mapping[str, States], rows: Mapping[str, np.ndarray]) -> Tensor:
        text, image = (parts[name].take(rows[name]).hidden[:, 0] for name in ("text", "image"))
        return torch.where(text == image, 0.9, 0.25)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a Seer."""
    system = Seer(small("blip.tiny"), tokenizer(), SEEN).eval()
    save_pretrained(system, tmp_path / "model")
    monkeypatch.setattr(capfilt, "from_pretrained", lambda folder: system)
    return tmp_path / "model"


def told(key: str, *captions: str | None, seed: int = 0) -> Record:
    """A record with these captions, each with speech."""
    narrations = tuple(dataclasses.replace(full_narration(np.random.default_rng(number), number), caption=caption)
                       for number, caption in enumerate(captions))
    return dataclasses.replace(full_record(key, seed), narrations=narrations)


def failures(folder: Path) -> list[tuple[str, str]]:
    return [(failure.key, failure.reason) for failure in ShardReader(folder).manifest.failures]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".tar", ".npy", ".json")}


RECORDS = [[told("a", "A red cube."), told("b", "One.", "Two."), Record("words", (), (Narration("0", "Only words."),))],
           [told("silent", "Nothing."), told("c")]]


def test_every_picture_is_described_once_and_all_else_stays(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "shards", RECORDS, origins=(Origin("web", "train"),))
    caption_shards(ShardsCaption(tmp_path / "shards", model, tmp_path / "out", together=2))
    reader = ShardReader(tmp_path / "out")
    before = [record for shard in RECORDS for record in shard]
    expected = [record if record.key not in "abc" else dataclasses.replace(
        record, narrations=(*record.narrations, Narration("synthetic", f"shows {record.key}"))) for record in before]
    assert same(records_of(reader), expected)
    assert failures(tmp_path / "out") == [("words", capfilt.NO_PICTURE), ("silent", capfilt.SILENT)]
    assert reader.manifest.origins == (Origin("web", "train"),)
    verify(VerifyConfig(tmp_path / "out", deep=True))
    shown = capsys.readouterr().out
    assert "3 captions written beside 5" in shown and "1  caption: nothing was written" in shown
    made = content(tmp_path / "out")
    caption_shards(ShardsCaption(tmp_path / "shards", model, tmp_path / "out", together=2))
    assert content(tmp_path / "out") == made
    with pytest.raises(UserError, match="holds narrations 'synthetic' already; give another --mark"):
        caption_shards(ShardsCaption(tmp_path / "out", model, tmp_path / "again"))
    caption_shards(ShardsCaption(tmp_path / "out", model, tmp_path / "again", mark="second"))


def test_captions_that_do_not_match_go_with_their_speech_and_are_counted_by_kind(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    synthetic, wrong = Narration("synthetic", "shows d"), Narration("synthetic", "shows other")
    records = [
        [told("a", "this is a", "this is b"), told("b", "this is a"), told("e", None, "wrong")],
        [dataclasses.replace(told("d"), narrations=(*told("d", "wrong").narrations, synthetic)),
         dataclasses.replace(told("f"), narrations=(wrong,)), told("c"), RECORDS[0][2]],
    ]
    write_folder(tmp_path / "shards", records)
    filter_shards(ShardsFilter(tmp_path / "shards", model, tmp_path / "out", together=3))
    a, _, e = records[0]
    expected = [dataclasses.replace(a, narrations=a.narrations[:1]),
                dataclasses.replace(e, narrations=e.narrations[:1]),
                dataclasses.replace(records[1][0], narrations=(synthetic,)), *records[1][2:]]
    assert same(records_of(ShardReader(tmp_path / "out")), expected)
    assert failures(tmp_path / "out") == [
        ("a", f"{capfilt.WRONG} (narration n1, probability 0.250)"),
        ("b", f"{capfilt.WRONG} (narration n0, probability 0.250)"), ("b", capfilt.BARE),
        ("e", f"{capfilt.WRONG} (narration n1, probability 0.250)"),
        ("d", f"{capfilt.WRONG} (narration n0, probability 0.250)"),
        ("f", f"{capfilt.WRONG_SYNTHETIC} (narration synthetic, probability 0.250)"), ("f", capfilt.BARE),
    ]
    verify(VerifyConfig(tmp_path / "out", deep=True))
    shown = capsys.readouterr().out
    assert "kept 2 captions as they were told and 1 synthetic ones" in shown
    for line in ("4  caption that does not match", "1  synthetic caption that", "2  record without a caption that"):
        assert line in shown
    filter_shards(ShardsFilter(tmp_path / "shards", model, tmp_path / "all", threshold=0.25))
    assert same(records_of(ShardReader(tmp_path / "all")), [record for shard in records for record in shard])


@pytest.mark.parametrize("int8", [False, True])
def test_a_stopped_job_goes_on_and_what_stays_is_copied_as_it_is_stored(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, int8: bool
) -> None:
    write_folder(tmp_path / "shards", [[told("a", "x a")], [told("b", "x b")], [told("c", "x a", "x c")]], int8)
    config = ShardsFilter(tmp_path / "shards", model, tmp_path / "out")
    real, seen = capfilt.judge, []

    def stopping(system: BLIP, records: Sequence[Record], *rest: object) -> list[capfilt.Retold]:
        seen.append(records[0].key)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(system, records, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(capfilt, "judge", stopping)
    with pytest.raises(KeyboardInterrupt):
        filter_shards(config)
    assert not (tmp_path / "out" / "manifest.json").exists() and not list((tmp_path / "out").glob("00001*"))
    filter_shards(config)
    assert seen == ["a", "b", "b", "c"]
    for name in ("00000.tar", "00001.npy"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "shards" / name).read_bytes()
    verify(VerifyConfig(tmp_path / "out", deep=True))
    with pytest.raises(UserError, match="was begun with threshold 0.5; now it is threshold 0.4"):
        filter_shards(dataclasses.replace(config, threshold=0.4))
    model.joinpath("model.safetensors").write_bytes(b"another")
    with pytest.raises(UserError, match="was begun with model"):
        filter_shards(config)


def test_broken_pictures_end_no_job(tmp_path: Path, model: Path) -> None:
    record = told("broken", "x broken")
    broken = dataclasses.replace(record, pictures=(dataclasses.replace(record.pictures[0], jpeg=b"no picture"),))
    write_folder(tmp_path / "shards", [[told("a", "x a"), broken]])
    caption_shards(ShardsCaption(tmp_path / "shards", model, tmp_path / "captioned"))
    assert failures(tmp_path / "captioned") == [("broken", capfilt.UNREADABLE)]
    filter_shards(ShardsFilter(tmp_path / "captioned", model, tmp_path / "out"))
    assert failures(tmp_path / "out")[1:] == [("broken", capfilt.UNJUDGED)]
    assert [record.key for record in records_of(ShardReader(tmp_path / "out"))] == ["a"]


def test_values_out_of_range_are_a_sentence(tmp_path: Path, model: Path) -> None:
    write_folder(tmp_path / "shards", [[told("a", "x a")]])
    shards, out = tmp_path / "shards", tmp_path / "out"
    for config, message in ((ShardsFilter(shards, model, out, threshold=1.5), "--threshold 1.5"),
                            (ShardsFilter(shards, model, shards), "the folder that is read"),
                            (ShardsFilter(shards, model, out, together=0), "--together 0")):
        with pytest.raises(UserError, match=message):
            filter_shards(config)
    with pytest.raises(UserError, match="--mark is empty"):
        caption_shards(ShardsCaption(shards, model, out, mark=" "))
    assert not out.exists()


def test_a_model_captions_and_filters_the_same_in_any_company(tmp_path: Path) -> None:
    """No Seer: a small BLIP, with random weights."""
    torch.manual_seed(0)
    save_pretrained(BLIP(small("blip.tiny"), tokenizer(), SEEN), tmp_path / "model")
    write_folder(tmp_path / "shards", [[told(f"k{number}", "red circle", seed=number) for number in range(5)]])
    for together in (2, 5):
        caption_shards(ShardsCaption(tmp_path / "shards", tmp_path / "model", tmp_path / f"out{together}",
                                     together=together))
    records = [records_of(ShardReader(tmp_path / f"out{together}")) for together in (2, 5)]
    assert same(*records)
    written = [record.narrations[1].caption for record in records[0] if len(record.narrations) == 2]
    assert len(set(written)) > 1, "each record draws its own numbers"
    filter_shards(ShardsFilter(tmp_path / "out5", tmp_path / "model", tmp_path / "kept", threshold=0.0))
    assert same(records_of(ShardReader(tmp_path / "kept")), records[1])
