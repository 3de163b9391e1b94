"""`opt import`: which systems there are, what is new, missing or unfit, and the same bytes each time."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from fixtures import tokenizer
from safetensors.torch import save_file

from opt.checkpoint import from_pretrained, read_history
from opt.config import UserError
from opt.data.pixels import Sight
from opt.systems.clip import CLIP, CLIPConfig
from opt.systems.shared.config import Sizes
from opt.systems.system import names
from opt.weights import clip
from opt.weights.importing import NO_FEATURES, Import, Imported, fill, import_checkpoint
from opt.weights.source import Source

CONFIG = CLIPConfig(Sight(size=16, patch=8), Sizes(16, 2, 2, 32), Sizes(8, 2, 2, 16), space=4, text_positions=12)
TOKENS = "towers.text.embedder.token.weight"


def system(seed: int = 0) -> CLIP:
    torch.manual_seed(seed)
    return CLIP(CONFIG, tokenizer(), NO_FEATURES)


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint under our own names, with an importer that lets head and words be new."""
    state = {**system(1).state_dict(), "queue": torch.zeros(3)}
    state = {name: tensor for name, tensor in state.items() if not name.startswith("temperature.")}
    state[TOKENS] = state[TOKENS][:-2].clone()
    folder = tmp_path / "published"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")

    def convert(source: Source, words: object) -> Imported:
        ours = {name: source.take(name) for name in source.tensors if name != "queue"}
        return Imported(CONFIG, tokenizer(), ours, ("temperature.",), (TOKENS,))

    monkeypatch.setattr(clip, "convert", convert)
    monkeypatch.setattr(clip, "vocabulary", lambda path: tokenizer())
    return folder


def test_weights_are_taken_over_and_the_rest_is_told(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_checkpoint(Import(published, "clip", tmp_path / "ours"))
    said = capsys.readouterr().out
    assert "not used: 1\n  queue\n" in said and f"new in the model: 2\n  temperature.log_scale\n  {TOKENS}\n" in said
    model, theirs = from_pretrained(tmp_path / "ours"), system(1)
    for name, tensor in model.state_dict().items():
        expected = theirs.state_dict()[name]
        rows = len(expected) - 2 if name == TOKENS else len(expected)
        assert torch.equal(tensor[:rows], expected[:rows])
    assert not torch.equal(model.state_dict()[TOKENS][-2:], theirs.state_dict()[TOKENS][-2:])
    assert read_history(tmp_path / "ours") == ()
    digest = Source.open(published).sha256
    assert f"imported from model.safetensors (SHA-256 {digest})" in (tmp_path / "ours" / "README.md").read_text()


def test_once_more_gives_the_same_bytes(published: Path, tmp_path: Path) -> None:
    written = []
    for _ in range(2):
        torch.rand(3)  # whatever was drawn before
        import_checkpoint(Import(published, "clip", tmp_path / "ours"))
        written.append({path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()})
    assert written[0] == written[1] and set(written[0]) == {"config.json", "model.safetensors", "README.md",
                                                            "tokenizer.json"}


def test_what_does_not_fit_is_named_and_nothing_changes() -> None:
    ours, theirs = system(), system(1).state_dict()
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    whole = Imported(CONFIG, tokenizer(), theirs)
    for change, kind, message in (
        ({TOKENS: theirs[TOKENS][:-1]}, UserError, rf"file: what belongs to {TOKENS} .*--tokenizer"),
        ({TOKENS: torch.cat([theirs[TOKENS], theirs[TOKENS]])}, UserError, "has shape .*, expected"),
        ({"strange": torch.ones(1)}, ValueError, "has no strange"),
    ):
        with pytest.raises(kind, match=message):
            fill(ours, dataclasses.replace(whole, state={**theirs, **change}), Path("file"))
    lacking = {name: tensor for name, tensor in theirs.items() if "blocks.1." not in name}
    with pytest.raises(UserError, match="lacks what belongs to towers.text.stack.blocks.1.*give a whole checkpoint"):
        fill(ours, dataclasses.replace(whole, state=lacking), Path("file"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())
    for longer in ((), (TOKENS,)):
        assert fill(ours, dataclasses.replace(whole, longer=longer), Path("file")) == []
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items())


def test_systems_that_can_be_imported_are_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no published checkpoints of system 'opt' are read; there are .*clip"):
        import_checkpoint(Import(tmp_path, "opt", tmp_path / "ours"))
    for name in names():
        if importlib.util.find_spec(f"opt.weights.{name}"):
            importer = importlib.import_module(f"opt.weights.{name}")
            assert callable(importer.convert) and callable(importer.vocabulary)


def test_no_other_model_is_written_over(published: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds another model"):
        import_checkpoint(Import(published, "clip", published))
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text(json.dumps({"system": "opt"}))
    with pytest.raises(UserError, match="holds another model"):
        import_checkpoint(Import(published, "clip", tmp_path / "ours"))
