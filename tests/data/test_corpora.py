"""Several folders read as one: the samples end to end, facts that must agree, and every kind of corpus in one batch."""

from __future__ import annotations

import pickle
import re
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures import FACTS, fake_sample, fake_shards, tokenizer
from stored_records import CLASSES, full_record, same, write_folder

from opt.config import UserError
from opt.data.corpora import Corpora, open_shards
from opt.data.loader import Loader
from opt.data.manifest import write_manifest
from opt.data.merge import MergeConfig, merge
from opt.data.plan import Plan
from opt.data.record import Narration, Record
from opt.data.remote import Cache
from opt.data.shards import ShardReader, ShardWriter
from opt.data.subset import Subset
from opt.systems.opt import OPT, OPTConfig
from opt.systems.system import Progress

FIELDS = ("extractors", "region_classes", "codebook", "region_attributes", "speech_codebooks")
KINDS: dict[str, dict[str, bool]] = {
    "triples": {}, "picture and text": {"speech": False}, "picture and speech": {"caption": False},
    "text and speech": {"regions": False},
    "text": {"regions": False, "speech": False}, "speech": {"regions": False, "caption": False},
}  # fmt: skip


@pytest.fixture
def folders(tmp_path: Path) -> list[ShardReader]:
    first = write_folder(tmp_path / "first", [[full_record("a", 0, narrations=3)], [full_record("b", 1)]])
    shards = [[full_record("c", 2)], [full_record("a", 3), full_record("d", 4)]]
    second = write_folder(tmp_path / "second", shards, int8=True)
    write_folder(tmp_path / "words", [[Record("e", (), (Narration("0", "Only words."),))]])
    write_manifest(tmp_path / "words", ["00000"], {}, (), 0)
    return [first, second, ShardReader(tmp_path / "words")]


def test_the_samples_stand_end_to_end(folders: list[ShardReader]) -> None:
    corpora = Corpora(folders)
    assert corpora.sizes == (4, 3, 1) and len(corpora) == 8
    assert list(corpora.keys()) == ["a", "a", "a", "b", "c", "a", "d", "e"]
    assert list(corpora.captions()) == [caption for reader in folders for caption in reader.captions()]
    assert corpora.key_hash.tolist() == [number for reader in folders for number in reader.key_hash.tolist()]
    assert corpora.key_hash[0] == corpora.key_hash[5], "one key, one picture, wherever it lies"
    expected = [(reader, number) for reader in folders for number in range(len(reader))]
    for whole in (corpora, pickle.loads(pickle.dumps(corpora))):
        for number, (reader, inner) in enumerate(expected):
            assert same([whole.record(number, True)], [reader.record(inner, True)])
            assert whole.sample(number).narration_id == reader.sample(inner).narration_id
            assert whole.lengths.words[number] == reader.lengths.words[inner]
    for number in (-1, 8):
        with pytest.raises(IndexError):
            corpora.sample(number)
    part = Subset(corpora, np.array([7, 0, 5]))
    assert list(part.keys()) == ["a", "a", "e"] and part.sample(2).caption == "Only words."


def test_the_manifest_tells_of_all(folders: list[ShardReader]) -> None:
    first, second, words = (reader.manifest for reader in folders)
    for order in ([0, 1, 2], [2, 1, 0]):
        told = Corpora([folders[number] for number in order]).manifest
        assert (told.records, told.samples, len(told.shards)) == (6, 8, 5)
        assert told.totals["frames"] == first.totals["frames"] + second.totals["frames"]
        assert (told.region_width, told.speech_width, told.frame_rate) == (8, 6, 12.5)
        assert all(getattr(told, name) == getattr(first, name) != getattr(words, name) for name in FIELDS)
    prints = {Corpora([folders[number] for number in order]).fingerprint for order in ([0, 1], [1, 0], [0, 1, 2])}
    assert len(prints) == 3 and words.fingerprint not in prints


def test_a_merged_folder_and_its_corpora_are_the_same_data(tmp_path: Path) -> None:
    readers = [write_folder(tmp_path / key, [[full_record(key, 0)]]) for key in "ab"]
    merge(MergeConfig(tmp_path / "out", (tmp_path / "a", tmp_path / "b")))
    merged, corpora = ShardReader(tmp_path / "out"), Corpora(readers)
    assert merged.fingerprint == corpora.fingerprint
    assert [merged.sample(n).key for n in range(2)] == [corpora.sample(n).key for n in range(2)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extractors": {"regions": {"weights": "other"}}}, "extractors.regions.weights is made up, then other"),
        ({"region_classes": CLASSES[:3]}, "region_classes has 5 entries, then 3"),
        ({"region_attributes": ("red", "green")}, r"region_attributes\[1\] is 'blue', then 'green'"),
        ({"codebook": 64}, "codebook is 32, then 64"),
        ({"speech_codebooks": (7, 8)}, r"speech_codebooks\[1\] is 9, then 8"),
    ],
)
def test_folders_made_otherwise_are_refused(folders: list[ShardReader], change: dict, message: str) -> None:
    folder, manifest = folders[1].folder, folders[1].manifest
    write_manifest(Path(folder), ["00000", "00001"], **{name: getattr(manifest, name) for name in FIELDS} | change)
    with pytest.raises(UserError, match=f"first and .*second do not go together: {message}; .* read in one run"):
        Corpora([folders[2], folders[0], ShardReader(folder)])


def test_what_only_one_folder_has_is_no_difference(folders: list[ShardReader]) -> None:
    one, two = ({"weights": place, "weights_sha256": "0" * 64} for place in ("here", "there"))
    made = [{"audio": one}, {"audio": two, "regions": two}]
    for reader, extractors, classes in zip(folders, made, [(), CLASSES], strict=False):
        write_manifest(reader.folder, ["00000", "00001"], extractors, classes, 32 * len(classes))
    told = Corpora([ShardReader(reader.folder) for reader in folders]).manifest
    assert told.extractors == {"audio": one, "regions": two}, "the same weights may lie elsewhere"
    assert told.region_classes == CLASSES and told.codebook == 160


def test_widths_must_agree(tmp_path: Path, folders: list[ShardReader]) -> None:
    narrow = Record("narrow", (), (Narration("0", None, full_record("f", 0).narrations[0].speech[:, :3], 10.0, 1.0),))
    with pytest.raises(UserError, match="speech_width is 6, then 3"):
        Corpora([*folders, write_folder(tmp_path / "narrow", [[narrow]])])


def test_places_are_opened_in_order(tmp_path: Path, folders: list[ShardReader]) -> None:
    cache = Cache(tmp_path / "cache", 1.0)
    places = [str(reader.folder) for reader in folders]
    assert type(open_shards(places[:1], cache)) is ShardReader
    assert open_shards(places, cache).fingerprint == Corpora(folders).fingerprint
    mirror = tmp_path / "mirror"
    shutil.copytree(places[0], mirror)
    for again in (places[0], places[0] + "/", f"{tmp_path}/second/../first", str(mirror), f"file://{mirror}"):
        with pytest.raises(UserError, match=f"{re.escape(again)} names the shards of {places[0]} again.*--proportions"):
            open_shards([*places, again], cache)
    with pytest.raises(UserError, match="is not a folder"):
        open_shards([places[0], str(tmp_path / "nowhere")], cache)


def test_each_reader_fetches_its_own_samples(folders: list[ShardReader], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(ShardReader, "prefetch", lambda self, numbers, jpeg: asked.append((self.place, numbers, jpeg)))
    Corpora(folders).prefetch([0, 6, 3, 4], True)
    first, second, words = (reader.place for reader in folders)
    assert asked == [(first, [0, 3], True), (second, [2, 0], True), (words, [], True)]


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory: pytest.TempPathFactory) -> Corpora:
    """A corpus of triples, three of pairs and three of single modalities."""
    folder = tmp_path_factory.mktemp("kinds")
    readers = [fake_shards(folder / name, [fake_sample(100 * kind + number, **has) for number in range(24)])
               for kind, (name, has) in enumerate(KINDS.items())]
    with ShardWriter(folder / "pictures", "00000") as shard:
        for number in range(24):
            shard.write(Record(f"picture{number}", fake_sample(1000 + number).pictures))
    write_manifest(folder / "pictures", ["00000"], {"regions": {"backend": "made up"}}, FACTS.region_classes, 16)
    return Corpora([*readers, ShardReader(folder / "pictures")])


@pytest.mark.parametrize("mixing", ["rows", "steps", "joint"])
def test_every_kind_of_corpus_trains_in_one_run(every_kind: Corpora, mixing: str) -> None:
    torch.manual_seed(0)
    config = OPTConfig(width=16, layers=2, heads=2, inner=32, decoder_layers=1, mixing=mixing)
    system = OPT(config, tokenizer(), FACTS).train()
    preparer = system.preparer()
    plan = Plan(0, preparer.cost(every_kind.lengths), 500, preparer.tasks, every_kind.key_hash, 8, every_kind.sizes,
                (4, 1, 1, 1, 1, 1, 1))
    terms: Counter[str] = Counter()
    for batches, _ in islice(Loader(every_kind, plan, preparer, micro_batches=2, workers=0), 30):
        for batch in batches:
            found = system(batch, Progress(0, 0.0)).terms
            assert all(bool(torch.isfinite(term.mean())) for term in found.values())
            terms.update(name for name, term in found.items() if float(term.count) > 0)
    assert len(terms) >= 8, terms
