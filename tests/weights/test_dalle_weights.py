"""DALL-E's pickled modules: read to the last digit, and never run."""

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from feature_extract.audio import AudioSettings
from feature_extract.extractors import open_extractors
from feature_extract.regions import RegionSettings
from opt.config import UserError
from opt.files import sha256
from opt.weights.dalle import NAMES, DALLEFiles, convert, load
from opt.weights.pickled import Pickled

dall_e = pytest.importorskip("dall_e")


@pytest.fixture(scope="module")
def published() -> tuple[torch.nn.Module, torch.nn.Module]:
    """Small random modules of the published classes, biases too."""
    torch.manual_seed(0)
    modules = dall_e.Encoder(n_hid=64, vocab_size=512), dall_e.Decoder(n_hid=64, n_init=16, vocab_size=512)
    for module in modules:
        for name, parameter in module.named_parameters():
            if name.endswith(".b"):
                parameter.data.normal_(std=0.1)
    return modules


@pytest.fixture(scope="module", params=["zip", "older"])
def files(request, published, tmp_path_factory) -> DALLEFiles:
    """Whole modules saved as OpenAI did, in either format of torch.save."""
    folder = tmp_path_factory.mktemp("dalle")
    for module, name in zip(published, ("encoder.pkl", "decoder.pkl"), strict=True):
        torch.save(module, folder / name, _use_new_zipfile_serialization=request.param == "zip")
    return DALLEFiles(folder / "encoder.pkl", folder / "decoder.pkl", folder / "out" / "dalle.safetensors")


@torch.inference_mode()
def test_converted_modules_compute_what_the_published_ones_do(published, files):
    convert(files)
    ours, pixels = load(files.out), torch.rand(2, 3, 64, 64)
    encoder, decoder = published
    logits = encoder(dall_e.map_pixels(pixels))
    torch.testing.assert_close(ours.encoder(dall_e.map_pixels(pixels)), logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.encode(pixels), logits.argmax(dim=1))
    codes = torch.randint(512, (2, 8, 8))
    weights = torch.nn.functional.one_hot(codes, 512).permute(0, 3, 1, 2).float()
    statistics = decoder(weights)
    torch.testing.assert_close(ours.decoder(weights), statistics, atol=1e-5, rtol=1e-5)
    drawn = dall_e.unmap_pixels(statistics[:, :3].sigmoid())
    torch.testing.assert_close(ours.decode(codes), drawn, atol=1e-5, rtol=1e-5)


def test_the_file_says_where_it_comes_from(files):
    convert(files)
    with safe_open(files.out, "pt") as file:
        sources = json.loads(file.metadata()["sources_sha256"])
    assert sources == {"encoder": sha256(files.encoder), "decoder": sha256(files.decoder)}


def test_extraction_reads_the_converted_file(files):
    convert(files)
    extractors = open_extractors("none", "none", f"dalle:{files.out}", RegionSettings(), AudioSettings(), "cpu")
    picture = Image.fromarray(np.random.default_rng(0).integers(256, size=(120, 160, 3), dtype=np.uint8))
    codes = extractors.codes(picture)
    assert codes.shape == (8, 8) and codes.dtype == np.int16 and codes.max() < extractors.codes.codebook == 512
    assert [decoded.size for decoded in extractors.codes.decode(codes[None])] == [(64, 64)]
    assert extractors.codes.describe()["backend"] == "dalle"


class Evil:
    """Unpickled, it runs a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.system, (f"touch {self.mark}",)


class Unlisted:
    """Harmless, but not on the list."""


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("named", ["posix.system", "Unlisted"])
def test_a_file_that_names_anything_else_is_refused_and_runs_nothing(tmp_path, files, zipped, named):
    mark, path = tmp_path / "ran", tmp_path / "encoder.pkl"
    torch.save(Evil(mark) if named == "posix.system" else Unlisted(), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=f"names .*{named}.* no place"):
        convert(DALLEFiles(path, files.decoder, tmp_path / "out.safetensors"))
    assert not mark.exists() and not (tmp_path / "out.safetensors").exists()
    torch.load(path, weights_only=False)  # the file would have done it
    assert mark.exists() == (named == "posix.system")


def test_a_bare_pickle_runs_nothing_either(tmp_path):
    path, mark = tmp_path / "bare.pkl", tmp_path / "ran"
    path.write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(UserError, match=r"posix\.system"):
        Pickled(path, NAMES)
    assert not mark.exists()


@pytest.mark.parametrize("name", [b"torch\ndevice", b"collections\nOrderedDict"])
def test_a_file_cannot_change_the_classes_it_may_name(tmp_path, name):
    """GLOBAL, then BUILD with attributes for the class itself: another __setstate__ would be the next step."""
    attributes = b"}X\x0c\x00\x00\x00__setstate__X\x01\x00\x00\x00xs"
    for number, program in enumerate((attributes + b"b.", b"N" + attributes + b"\x86b.")):
        path = tmp_path / f"{number}.pkl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02c" + name + b"\n" + program)
        with pytest.raises(UserError, match="not a file of torch.save"):
            Pickled(path, NAMES)


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"\x80\x02.", b"hello"])
def test_broken_files_are_a_sentence(tmp_path, files, content):
    (tmp_path / "encoder.pkl").write_bytes(content)
    with pytest.raises(UserError, match="not a file of torch.save"):
        convert(DALLEFiles(tmp_path / "encoder.pkl", files.decoder, tmp_path / "out"))


def test_encoder_and_decoder_are_not_mixed_up(files, tmp_path):
    with pytest.raises(UserError, match=r"holds no dall_e\.encoder\.Encoder"):
        convert(DALLEFiles(files.decoder, files.encoder, tmp_path / "out"))


def test_the_published_files_are_not_written_over(files):
    whole = files.encoder.read_bytes()
    with pytest.raises(UserError, match="is an input"):
        convert(DALLEFiles(files.encoder, files.decoder, files.encoder))
    assert files.encoder.read_bytes() == whole


def test_a_file_cut_short_is_refused(files, tmp_path):
    whole = files.encoder.read_bytes()
    (tmp_path / "encoder.pkl").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"not a file of torch\.save|damaged"):
        convert(DALLEFiles(tmp_path / "encoder.pkl", files.decoder, tmp_path / "out"))


def test_another_file_is_not_dalle(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="opt convert dalle"):
        load(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="opt convert dalle"):
        load(tmp_path / "missing.safetensors")
