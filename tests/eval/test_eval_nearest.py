"""The nearest vectors: against sorting everything, in blocks, with ties, by FAISS."""

import sys

import numpy as np
import pytest

from eval.lookup import nearest
from eval.lookup.nearest import build, exact, first_k, open_faiss, save_faiss, share_found
from opt.config import UserError
from opt.files import sha256


def unit(count, width=16, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def sorted_all(query, candidate, k):
    """Every similarity, sorted by value and then by row."""
    scores = np.round(query @ candidate.T, 5)
    rows = np.stack([np.lexsort((np.arange(len(candidate)), -one))[:k] for one in scores])
    return np.take_along_axis(scores, rows, axis=1), rows


@pytest.mark.parametrize(("candidates", "queries"), [(1000, 256), (7, 3), (64, 2)])
@pytest.mark.parametrize("k", [1, 10, 100])
def test_exact_is_a_sort_of_everything_whatever_the_blocks(monkeypatch, candidates, queries, k) -> None:
    monkeypatch.setattr(nearest, "CANDIDATES", candidates)
    monkeypatch.setattr(nearest, "QUERIES", queries)
    candidate = np.tile(unit(50), (4, 1))  # every vector four times: ties everywhere, in other blocks too
    scores, rows = exact(unit(9, seed=1), candidate, k)
    wanted_scores, wanted_rows = sorted_all(unit(9, seed=1), candidate, k)
    assert np.array_equal(rows, wanted_rows) and np.allclose(scores, wanted_scores, atol=2e-5)


def test_more_than_there_are_gives_all_and_memory_maps_are_read(tmp_path) -> None:
    candidate = unit(30)
    np.save(tmp_path / "vectors.npy", candidate)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    assert first_k(candidate[:4], mapped, 99).shape == (4, 30)
    assert np.array_equal(first_k(candidate[:4], mapped, 3), exact(candidate[:4], candidate, 3)[1])
    assert first_k(candidate, candidate, 1)[:, 0].tolist() == list(range(30)), "itself"


def test_flat_faiss_is_exact_ties_included() -> None:
    pytest.importorskip("faiss")
    candidate = np.concatenate([unit(200), unit(200)[:5], unit(200)[:5]])
    query = unit(20, seed=3)
    assert np.array_equal(first_k(query, candidate, 10, "Flat"), first_k(query, candidate, 10))
    assert np.array_equal(first_k(candidate[:5], candidate, 3, "Flat"), [[n, 200 + n, 205 + n] for n in range(5)])
    assert share_found(build(candidate, "Flat"), candidate) == (1.0, 200)


def test_what_faiss_misses_is_measured_and_what_it_leaves_open_is_filled(tmp_path) -> None:
    pytest.importorskip("faiss")
    candidate = unit(2000)
    narrow, wide = build(candidate, "IVF50,Flat nprobe=1"), build(candidate, "IVF50,Flat nprobe=50")
    share = share_found(narrow, candidate)[0]
    assert 0.1 < share < 0.95 and share_found(wide, candidate)[0] == 1
    drawn = np.sort(np.random.default_rng(0).permutation(2000)[:200])
    truth = exact(candidate[drawn], candidate, 10)[1]
    found = nearest.approximate(narrow, candidate[drawn], candidate, 10)[1]
    by_hand = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(truth, found, strict=True)])
    assert share == pytest.approx(by_hand, abs=0.005)
    rows = first_k(candidate[:3], candidate, 500, "IVF50,Flat nprobe=1")  # one list holds some 40
    assert np.array_equal(rows, first_k(candidate[:3], candidate, 500))
    save_faiss(narrow, tmp_path / "narrow.faiss")
    opened = open_faiss(tmp_path / "narrow.faiss", sha256(tmp_path / "narrow.faiss"))
    assert np.array_equal(nearest.approximate(opened, candidate[drawn], candidate, 10)[1], found), "nprobe is saved"


@pytest.mark.parametrize(("factory", "said"), [
    ("nonsense", "could not parse"), ("IVF4000,Flat", "training points"), ("HNSW32 nprobe=3", "nprobe"),
    ("HNSW32 efSearch", "efSearch"),
])  # fmt: skip
def test_what_faiss_refuses_is_a_sentence(factory, said) -> None:
    pytest.importorskip("faiss")
    with pytest.raises(UserError, match=said):
        first_k(unit(3), unit(100), 2, factory)


def test_without_faiss_or_with_another_file(monkeypatch, tmp_path) -> None:
    pytest.importorskip("faiss")
    (tmp_path / "image.faiss").write_bytes(b"something else")
    with pytest.raises(UserError, match="not the file"):
        open_faiss(tmp_path / "image.faiss", "0" * 64)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="pip install"):
        first_k(unit(3), unit(9), 2, "Flat")
