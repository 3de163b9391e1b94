"""Image codes on other grids than 8 x 8: stored, read and checked; refused where another grid is wanted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from fixtures import FACTS, tokenizer
from stored_records import full_narration, full_picture, records_of, same, write_folder

from opt.config import UserError
from opt.data.corpora import Corpora
from opt.data.export import ExportConfig, export
from opt.data.merge import MergeConfig, merge
from opt.data.record import Record, RecordError, check
from opt.data.shards import ShardReader
from opt.data.verify import InspectConfig, VerifyConfig, inspect, verify
from opt.systems.system import build, load
from pretrain.run import facts


def made(key: str, grid: int, pictures: int = 1) -> Record:
    rng = np.random.default_rng(grid)
    return Record(key, tuple(full_picture(rng, grid=grid) for _ in range(pictures)), (full_narration(rng, 0),))


def folder_of(folder: Path, grid: int, *records: Record) -> ShardReader:
    settings = {} if grid == 8 else {"codes_grid": grid}
    return write_folder(folder, [list(records)], extractors={"codes": {"weights_sha256": "ab", "settings": settings}})


@pytest.mark.parametrize("grid", [8, 14, 1, 24])
def test_a_grid_comes_back_and_is_known(tmp_path: Path, grid: int, capsys: pytest.CaptureFixture[str]) -> None:
    stored = [made("a", grid), made("b", grid, pictures=2)]
    reader = folder_of(tmp_path, grid, *stored)
    assert same(records_of(reader), stored)
    assert reader.lengths.codes.tolist() == [grid**2, 2 * grid**2]
    assert reader.manifest.codes_grid == facts(reader.manifest).codes_grid == grid
    verify(VerifyConfig(tmp_path, deep=True))
    inspect(InspectConfig(tmp_path))
    assert f"32 image codes on {grid} x {grid} places" in capsys.readouterr().out


def test_without_codes_there_is_no_grid(tmp_path: Path) -> None:
    manifest = dataclasses.replace(folder_of(tmp_path, 14, made("a", 14)).manifest, codebook=0)
    assert manifest.codes_grid == facts(manifest).codes_grid == 0


@pytest.mark.parametrize("shape", [(8, 7), (0, 0), (64,)])
def test_what_is_no_square_is_refused(shape: tuple[int, ...]) -> None:
    picture = dataclasses.replace(full_picture(np.random.default_rng(0)), codes=np.zeros(shape, np.int16))
    with pytest.raises(RecordError, match="codes"):
        check(Record("k", (picture,)))


def test_another_grid_than_the_manifest_says_is_damage(tmp_path: Path) -> None:
    folder_of(tmp_path, 14, made("a", 14), made("b", 8))
    with pytest.raises(UserError, match=r"key 'b': picture.0.codes: 8 x 8; the manifest says 14 x 14"):
        verify(VerifyConfig(tmp_path, deep=True))


def test_grids_are_not_mixed(tmp_path: Path) -> None:
    fine, usual = folder_of(tmp_path / "fine", 14, made("a", 14)), folder_of(tmp_path / "usual", 8, made("b", 8))
    differs = "extractors.codes.settings.codes_grid is 14, then absent"
    with pytest.raises(UserError, match=differs):
        Corpora([fine, usual])
    with pytest.raises(UserError, match=differs):
        merge(MergeConfig(tmp_path / "out", (fine.folder, usual.folder)))
    merge(MergeConfig(tmp_path / "out", (fine.folder, folder_of(tmp_path / "more", 14, made("c", 14)).folder)))
    assert ShardReader(tmp_path / "out").manifest.codes_grid == 14


def test_export_writes_the_grid(tmp_path: Path) -> None:
    reader = folder_of(tmp_path / "shards", 14, made("a", 14))
    export(ExportConfig("webdataset", tmp_path / "shards", tmp_path / "out"))
    webdataset = pytest.importorskip("webdataset")
    sample = next(iter(webdataset.WebDataset(str(tmp_path / "out" / "00000.tar"), shardshuffle=False).decode()))
    np.testing.assert_array_equal(sample["codes.npy"], reader.record(0).pictures[0].codes)


def test_a_model_reads_only_the_grid_it_was_trained_on(tmp_path: Path) -> None:
    manifest = folder_of(tmp_path, 14, made("a", 14)).manifest
    trained = dataclasses.replace(facts(manifest), codes_grid=24)
    with pytest.raises(UserError, match="14 x 14 codes, those .* in 24 x 24; .* --codes-grid 24"):
        trained.require_same(manifest, tmp_path)
    facts(manifest).require_same(manifest, tmp_path)
    unread = dataclasses.replace(manifest, extractors={})  # what a system that reads no codes asks about
    trained.require_same(unread, tmp_path)


def test_opt_draws_its_own_grid_only() -> None:
    model = load("opt.tiny").model
    with pytest.raises(UserError, match="in 14 x 14 codes, OPT draws 8 x 8; .* --codes-grid 8"):
        build("opt", model, tokenizer(), dataclasses.replace(FACTS, codes_grid=14))
    build("opt", model, tokenizer(), dataclasses.replace(FACTS, codes_grid=0))
