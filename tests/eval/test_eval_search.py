"""`opt index` and `opt search`: what is found is what brute force over the model's own vectors finds."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures import FACTS, fake_sample, fake_shards, tokenizer
from safetensors.numpy import load_file
from workshop import COUNT, make_workshop

import eval.lookup.index as building
from eval.lookup.index import Index, index
from eval.lookup.page import Found
from eval.lookup.search import _table, search
from eval.lookup.vectors import Entry
from opt.checkpoint import from_pretrained, save_pretrained
from opt.cli import _parse
from opt.config import UserError
from opt.data.shards import ShardReader
from opt.systems.system import build, compose, load

MODALITIES = ("text", "image", "audio")


def run(verb, *words: object) -> None:
    verb(_parse(verb, "opt", [str(word) for word in words]))


def save_model(folder: Path, seed: int = 0) -> None:
    torch.manual_seed(seed)
    system = build("opt", load("opt.tiny").model, tokenizer(), FACTS)
    with torch.no_grad():
        for parameter in system.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    save_pretrained(system, folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """model/, shards/ of 40 samples in 3 shards, index/ of all modalities."""
    folder = tmp_path_factory.mktemp("search")
    save_model(folder / "model")
    fake_shards(folder / "shards", [fake_sample(number) for number in range(40)])
    run(index, folder / "model", folder / "shards", "--out", folder / "index", "--batch", 7)
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """media/, shards/ and model/ for files of one's own, and index/."""
    folder = make_workshop(tmp_path_factory.mktemp("own"))
    run(index, folder / "model", folder / "shards", "--out", folder / "index")
    return folder


def brute_force(made: Path, given, sought: str, top: int) -> list[list[str]]:
    """Keys of the nearest, by the model's vectors of every sample and a full sort."""
    system, reader = from_pretrained(made / "model"), ShardReader(made / "shards")
    samples = [reader.sample(number) for number in range(len(reader))]
    scores = np.round(system.embed(samples, given).numpy() @ system.embed(samples, [sought]).numpy().T, 5)
    return [[samples[place].key for place in np.argsort(-row, kind="stable")[:top]] for row in scores]


@pytest.mark.parametrize("sought", MODALITIES)
def test_an_index_finds_what_brute_force_finds(made, sought) -> None:
    system, reader, opened = from_pretrained(made / "model"), ShardReader(made / "shards"), Index(made / "index")
    samples = [reader.sample(number) for number in range(len(reader))]
    vectors = system.embed(samples, ["text"]).numpy()
    scores, rows = opened.search(vectors, sought, 5)
    assert [[opened.entry(sought, row).key for row in one] for one in rows] == brute_force(made, ["text"], sought, 5)
    assert scores.dtype == np.float32 and (np.diff(scores) <= 0).all()
    entry = opened.entry(sought, rows[0, 0])
    assert reader.sample(entry.sample).caption == entry.caption and entry.narration_id == "0"


def test_the_file_is_safetensors_and_says_what_made_it(made) -> None:
    arrays = load_file(made / "index" / "image.safetensors")
    system, reader = from_pretrained(made / "model"), ShardReader(made / "shards")
    wanted = system.embed([reader.sample(number) for number in range(40)], ["image"])
    assert arrays["vectors"].dtype == np.float32 and np.allclose(arrays["vectors"], wanted, atol=1e-5)
    assert np.allclose(np.linalg.norm(arrays["vectors"], axis=1), 1, atol=1e-5)
    assert arrays["samples"].tolist() == list(range(40)) and arrays["starts"][-1] == len(arrays["entries"])
    about = json.loads((made / "index" / "index.json").read_text())
    assert about["split_sha256"] == ShardReader(made / "shards").fingerprint and about["rows"]["image"] == 40


def test_shards_in_another_order_give_the_same_answers(made, tmp_path) -> None:
    order = np.random.default_rng(1).permutation(40)
    fake_shards(tmp_path / "shards", [fake_sample(int(number)) for number in order], shard_size=9)
    run(index, made / "model", tmp_path / "shards", "--out", tmp_path / "index", "--modalities", "image")
    query = np.asarray(Index(made / "index").vectors["text"].vectors)
    found = []
    for opened in (Index(made / "index"), Index(tmp_path / "index")):
        scores, rows = opened.search(query, "image", 40)
        found.append([sorted((-score, opened.entry("image", row).key) for score, row in zip(*one, strict=True))
                      for one in zip(scores, rows, strict=True)])
    for here, there in zip(*found, strict=True):
        assert {key: score for score, key in here} == pytest.approx({key: score for score, key in there}, abs=2e-5)
    assert set(Index(tmp_path / "index").facts.rows) == {"image"}


def test_a_picture_of_several_narrations_stands_once(own) -> None:
    assert Index(own / "index").facts.rows == dict.fromkeys(MODALITIES, COUNT)


def test_a_search_from_the_command_line(made, tmp_path, capsys) -> None:
    out = tmp_path / "new" / "found.jsonl"
    texts = [fake_sample(number).caption for number in (3, 8)]
    run(search, made / "index", "--text", *texts, "--top", 4, "--out", out)
    said = capsys.readouterr().out
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    wanted = brute_force(made, ["text"], "image", 4)
    assert [[one["key"] for one in line["found"]] for line in lines] == [wanted[3], wanted[8]]
    assert [line["text"] for line in lines] == texts and [one["rank"] for one in lines[0]["found"]] == [1, 2, 3, 4]
    assert f'"{texts[0]}"\nrank  similarity  key' in said and said.count("\n   1  ") == 2
    run(search, made / "index", "--text", texts[0], "--for", "audio", "--top", 99)
    assert len(capsys.readouterr().out.splitlines()) == 2 + 40 + 1, "all there are"


def test_reranking_orders_the_first_by_matching_and_similarity(made, tmp_path) -> None:
    query = fake_sample(5)
    run(search, made / "index", "--text", query.caption, "--rerank", 6, "--top", 9, "--out", tmp_path / "lines.jsonl")
    (line,) = map(json.loads, (tmp_path / "lines.jsonl").read_text().splitlines())
    system, reader = from_pretrained(made / "model"), ShardReader(made / "shards")
    nearest = brute_force(made, ["text"], "image", 9)[5]
    number = {key: place for place, key in enumerate(reader.keys())}
    pairs = [compose(text=query, image=reader.sample(number[key])) for key in nearest[:6]]
    scores = dict(zip(nearest, system.score(pairs, ("text", "image")).tolist(), strict=False))
    cosines = {one["key"]: one["similarity"] for one in line["found"]}
    assert system.cosine_weight > 1
    both = {key: score + system.cosine_weight * cosines[key] for key, score in scores.items()}
    assert [one["key"] for one in line["found"]] == [*sorted(both, key=lambda key: -both[key]), *nearest[6:]]
    assert [one["matching"] for one in line["found"][:6]] == pytest.approx([scores[key] for key in sorted(
        both, key=lambda key: -both[key])], abs=1e-3)
    assert all("matching" not in one for one in line["found"][6:])
    run(search, made / "index", "--text", query.caption, "--rerank", 6, "--top", 2, "--out", tmp_path / "lines.jsonl")
    assert json.loads((tmp_path / "lines.jsonl").read_text())["found"] == line["found"][:2], "the best of all six"


def test_own_files_are_found_in_their_index_and_shown(own, tmp_path, capsys) -> None:
    """A picture finds itself; a recording gives what its vector from the shards gives; several parts are one query."""
    picture, recording = own / "media/images/p1.jpg", own / "media/voice/r2.wav"
    out, page = tmp_path / "found.jsonl", tmp_path / "found.html"
    run(search, own / "index", "--image", picture, "--for", "image", "--out", out)
    first = json.loads(out.read_text())["found"][0]
    assert first["key"] == "p1" and first["similarity"] == pytest.approx(1, abs=1e-4)
    for given, words in {("audio",): [], ("text", "audio"): ["--text", "red circle 2"]}.items():
        run(search, own / "index", "--audio", recording, *words, "--out", out, "--page", page)
        assert [one["key"] for one in json.loads(out.read_text())["found"]] == brute_force(own, given, "image", 3)[2]
    html = page.read_text()
    assert html.count('src="data:image/jpeg') == COUNT and "<audio" in html and "red circle 2" in html
    assert "http" not in html.replace("http-equiv", ""), "the page needs nothing else"
    run(search, own / "index", "--image", picture, "--page", page, "--top", 1)
    assert page.read_text().count('src="data:image/jpeg') == 2, "the query and what it found"
    capsys.readouterr()
    (tmp_path / "broken.png").write_text("no picture")
    with pytest.raises(UserError, match=r"1 of 2 could not be used: .*broken\.png"):
        run(search, own / "index", "--image", tmp_path / "broken.png", picture, "--out", out, "--page", page)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert "error" in lines[0] and lines[1]["found"] and "could not be used" in page.read_text()


def test_faiss_flat_is_exact_and_its_share_is_said(made, tmp_path, capsys) -> None:
    pytest.importorskip("faiss")
    shutil.copytree(made / "index", tmp_path / "index")
    before = (tmp_path / "index" / "text.safetensors").stat()
    run(index, made / "model", made / "shards", "--out", tmp_path / "index", "--faiss", "Flat")
    assert "FAISS Flat finds 100.0 % of the true first ten of 40 pictures" in capsys.readouterr().out
    after = (tmp_path / "index" / "text.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns), "vectors were taken over"
    plain, fast = Index(made / "index"), Index(tmp_path / "index")
    query = np.asarray(plain.vectors["audio"].vectors)
    assert np.array_equal(fast.search(query, "image", 7)[1], plain.search(query, "image", 7)[1])
    (tmp_path / "index" / "image.faiss").write_bytes(b"cut")
    with pytest.raises(UserError, match="build the index again"):
        Index(tmp_path / "index").search(query, "image", 7)
    run(index, made / "model", made / "shards", "--out", tmp_path / "index", "--modalities", "image")
    assert {path.name for path in (tmp_path / "index").glob("[!.]*")} == {"image.safetensors", "index.json"}


def test_parts_of_an_index_that_contradict_each_other_are_damage(made, tmp_path) -> None:
    for number, change in enumerate(({"faiss": "HNSW32"}, {"bytes": {}}, {"rows": {"image": 40}})):
        folder = tmp_path / str(number)
        shutil.copytree(made / "index", folder)
        facts = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps(facts | change))
        with pytest.raises(UserError, match="is damaged: its parts name other modalities"):
            Index(folder)


def test_captions_cannot_command_the_terminal() -> None:
    found = [Found(Entry(0, "key\x1b[2J", "0", "red \x1b[31m\u202e\nblue 赤"), 0.5)]
    assert _table(found).splitlines()[1].endswith("key\ufffd[2J  red \ufffd[31m\ufffd blue 赤")


def test_a_killed_build_leaves_no_index_and_the_same_command_ends_it(made, tmp_path, monkeypatch) -> None:
    class KilledError(BaseException):
        pass

    def write(path, *arguments):
        if path.name.startswith("audio"):
            raise KilledError
        return whole(path, *arguments)

    whole = building.write_vectors
    command = (made / "model", made / "shards", "--out", tmp_path / "index")
    run(index, *command)
    (tmp_path / "index" / "audio.safetensors").unlink()
    monkeypatch.setattr(building, "write_vectors", write)
    with pytest.raises(KilledError):
        run(index, *command)
    with pytest.raises(UserError, match="begun and not finished"):
        Index(tmp_path / "index")
    monkeypatch.undo()
    run(index, *command)
    for modality in MODALITIES:
        assert np.array_equal(*(Index(one / "index").vectors[modality].samples for one in (made, tmp_path)))


def test_a_model_that_gives_no_numbers_makes_no_index(made, tmp_path) -> None:
    system = from_pretrained(made / "model")
    with torch.no_grad():
        next(system.parameters()).fill_(float("nan"))
    save_pretrained(system, tmp_path / "model")
    with pytest.raises(UserError, match="no finite number for sample0"):
        run(index, tmp_path / "model", made / "shards", "--out", tmp_path / "index")
    assert not any((tmp_path / "index").glob("[!.]*"))


@pytest.mark.parametrize(("words", "said"), [
    ([], "nothing to look for"),
    (["--text", " "], "empty text"),
    (["--text", "red", "blue", "--audio", "a.wav"], "2 --text and 1 --audio"),
    (["--text", "red", "--top", 0], "--top 0 must be at least 1"),
    (["--text", "red", "--rerank", -1], "--rerank -1"),
    (["--text", "red", "--for", "text", "--rerank", 3], "both are captions"),
    (["--text", "red", "--out", "."], "is a folder"),
    (["--text", "red", "--out", "a.html", "--page", "a.html"], "name two files"),
    (["--text", "red", "--model", "gone"], "gone"),
    (["--text", "red", "--page", "a.html", "--shards", "gone"], "gone"),
    (["--image", "a.png"], "does not say which extractor"),
])  # fmt: skip
def test_what_makes_no_sense_is_said(made, tmp_path, monkeypatch, words, said) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        run(search, made / "index", *words)


def test_another_model_other_shards_or_none_are_refused(made, tmp_path) -> None:
    save_model(tmp_path / "model", seed=1)
    fake_shards(tmp_path / "shards", [fake_sample(number) for number in range(5)])
    with pytest.raises(UserError, match="another model"):
        run(search, made / "index", "--text", "red", "--model", tmp_path / "model")
    with pytest.raises(UserError, match="other shards"):
        run(search, made / "index", "--text", "red", "--rerank", 2, "--shards", tmp_path / "shards")
    shutil.copytree(made / "index", tmp_path / "index")
    about = json.loads((tmp_path / "index" / "index.json").read_text())
    moved = about | {"model": "/gone/model", "shards": "/gone/shards"}
    (tmp_path / "index" / "index.json").write_text(json.dumps(moved))
    with pytest.raises(UserError, match="--model says"):
        run(search, tmp_path / "index", "--text", "red")
    with pytest.raises(UserError, match="--shards says"):
        run(search, tmp_path / "index", "--text", "red", "--model", made / "model", "--rerank", 2)
    run(search, tmp_path / "index", "--text", "red", "--model", made / "model", "--shards", made / "shards",
        "--rerank", 2)


def test_what_is_no_index_or_no_whole_one(made, tmp_path) -> None:
    with pytest.raises(UserError, match="holds no index"):
        Index(tmp_path)
    with pytest.raises(UserError, match="no part of an index"):
        run(index, made / "model", made / "shards", "--out", made / "shards")
    with pytest.raises(UserError, match="at least 1"):
        run(index, made / "model", made / "shards", "--out", tmp_path / "new", "--batch", 0)
    fake_shards(tmp_path / "silent", [fake_sample(number, speech=False) for number in range(5)])
    with pytest.raises(UserError, match="no recordings"):
        run(index, made / "model", tmp_path / "silent", "--out", tmp_path / "new", "--modalities", "audio")
    assert not (tmp_path / "new").exists()
    run(index, made / "model", tmp_path / "silent", "--out", tmp_path / "mixed")
    with pytest.raises(UserError, match="captions and pictures but no recordings"):
        run(search, tmp_path / "mixed", "--text", "red", "--for", "audio")
    mixed = tmp_path / "mixed"
    about = json.loads((mixed / "index.json").read_text())
    for change, said in ({"schema": 99}, "schema 99"), ({"rows": 3}, "expected dict"):
        (mixed / "index.json").write_text(json.dumps(about | change))
        with pytest.raises(UserError, match=said):
            Index(mixed)
    shutil.copy(made / "index" / "image.safetensors", mixed)
    size = (mixed / "image.safetensors").stat().st_size
    (mixed / "index.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="not as it was written"):
        Index(mixed)
    (mixed / "index.json").write_text(json.dumps(about | {"bytes": about["bytes"] | {"image": size}}))
    with pytest.raises(UserError, match="another index"):
        Index(mixed)
    (mixed / "image.safetensors").write_bytes(b"\xff" * size)
    with pytest.raises(UserError, match="damaged"):
        Index(mixed)
