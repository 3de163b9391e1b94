"""ViLT: rows hide whole words and swap what they say, one stream sees what it may, and it learns what pictures show."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures import FACTS, WORDS, tokenizer
from shrunken import batch_of, made, rows, sample

from opt.config import UserError
from opt.data.batch import Batch
from opt.data.pixels import Sight
from opt.data.record import Lengths, Sample
from opt.data.tokenizer import Tokenizer
from opt.objectives.term import loss
from opt.systems.shared.config import Sizes
from opt.systems.shared.tuning import Tuning
from opt.systems.system import Progress, build
from opt.systems.vilt import ViLT, ViLTConfig
from opt.systems.vilt.rows import MATCHED

SAMPLES = {number: sample(number) for number in range(12)}
EARLY = Progress(0, 0.0)
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def vilt(preset: str = "vilt.trimodal", **changes: Any) -> ViLT:
    """Small, in evaluation mode, away from its beginning, so that what it sees changes what it says."""
    system = made(preset)
    system = build("vilt", dataclasses.replace(system.config, **changes), tokenizer(), FACTS).eval()
    with torch.no_grad():
        for parameter in system.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    assert isinstance(system, ViLT)
    return system


class Reader:
    """What the sequences of a batch are made of, traced back to the samples by words, frames and pixels."""

    def __init__(self, batch: Batch, samples: dict[int, Sample], system: ViLT) -> None:
        self.batch, self.words, self.frames = batch, len(batch.text.ids), len(batch.frames.masked)
        self.speech = {each.speech[0].tobytes(): number for number, each in samples.items()}
        preparer = system.preparer()
        self.pixels: dict[bytes, set[int]] = {}
        for number, each in samples.items():
            for patch in preparer.inputs([each], ["image"]).patches.pixels:
                self.pixels.setdefault(patch.numpy().tobytes(), set()).add(number)

    def entries(self, start: int) -> torch.Tensor:
        view = self.batch.views["encoder"]
        number = view.first.tolist().index(start)
        return view.gather[start : start + int(view.lengths[number])]

    def sources(self, start: int) -> dict[str, int]:
        """By modality, whose part it is, in the order of the sequence; text by its place among the samples' captions.
        """
        found: dict[str, int] = {}
        entries = self.entries(start)
        frames = entries[(entries >= self.words) & (entries < self.words + self.frames)] - self.words
        patches = entries[entries > self.words + self.frames] - self.words - self.frames - 1
        if (entries < self.words).sum() > 1:
            found["text"] = -1
        if len(frames):
            found["audio"] = self.speech[self.batch.frames.features[frames[0]].numpy().tobytes()]
        if len(patches):
            owners = [self.pixels[self.batch.patches.pixels[patch].numpy().tobytes()] for patch in patches]
            found["image"] = min(set.intersection(*owners))
        return found


def test_labels_are_true_of_the_rows_to_match_and_reach_every_case() -> None:
    system, seen = vilt(contrast_weight=0.0), set()
    for turn in range(12):
        batch = batch_of(system, SAMPLES, turn=turn)
        reader, target = Reader(batch, SAMPLES, system), batch.targets["match"]
        near = iter(batch.extra["near"].tolist())
        for key, start, label in zip(batch.keys, target.index.tolist(), target.label.tolist(), strict=True):
            own = int(key.removeprefix("sample"))
            found = {**reader.sources(start)}
            if "text" in found:
                found["text"] = own
            assert bool(label) == (len(set(found.values())) == 1)
            if {"text", "image"} <= set(found):
                assert next(near) == (found["image"] == own)
            stranger = "".join(name for name, number in found.items() if number != own)
            seen.add((tuple(found), stranger if len(found) == 3 else bool(label)))
        assert next(near, None) is None
    assert seen == {(names, label) for names in MATCHED[:3] for label in (True, False)} | {
        (MATCHED[3], stranger) for stranger in ("", "audio", "image")}


def test_half_of_the_rows_match_and_a_lone_pair_always_does() -> None:
    system = vilt("vilt.tiny")
    labels = torch.cat([batch_of(system, SAMPLES, turn=turn).targets["match"].label for turn in range(60)])
    assert abs(labels.float().mean() - 0.5) < 5 * np.sqrt(0.25 / len(labels))
    assert batch_of(system, {0: sample(0), 1: sample(1)}).targets["match"].label.all(), "no third picture, no partners"


def pieces(tmp_path: Path) -> Tokenizer:
    """Every colour is two pieces, every shape one."""
    halves = [half for word in WORDS[:3] for half in (word[:2], f"##{word[2:]}")]
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[BOS]", "[EOS]"]
    (tmp_path / "vocab.txt").write_text("\n".join([*specials, *halves, *WORDS[3:]]) + "\n")
    return Tokenizer.from_vocab(tmp_path / "vocab.txt")


def test_hidden_words_are_whole_and_all_else_stays(tmp_path: Path) -> None:
    words, counts = pieces(tmp_path), np.zeros(2)
    system = ViLT(dataclasses.replace(made("vilt.tiny").config, token_rate=0.3), words, FACTS)
    for turn in range(20):
        batch = batch_of(system, SAMPLES, turn=turn)
        target, reader = batch.targets["mlm"], Reader(batch, SAMPLES, system)
        view = batch.views["encoder"]
        for row, key in enumerate(batch.keys):
            start = int(view.first[2 * row])
            original = words.encode(SAMPLES[int(key.removeprefix("sample"))].caption or "")
            entries = reader.entries(start)[: len(original) + 2]
            own = (target.index >= start) & (target.index < start + len(entries))
            hidden = target.index[own].numpy() - start - 1
            assert target.label[own].tolist() == original[hidden].tolist()
            word = words.words_of(original)
            assert set(np.flatnonzero(np.isin(word, word[hidden]))) == set(hidden), "all pieces of a word"
            kept = np.setdiff1d(np.arange(len(original)), hidden)
            assert np.array_equal(batch.text.ids[entries].numpy()[1:-1][kept], original[kept])
            assert torch.equal(batch.text.positions[entries], torch.arange(len(entries)))
            counts += len(set(word[hidden])), word[-1] + 1
    assert 0.3 < counts[0] / counts[1] < 0.45, "the rate, and at least one word each"


def test_training_sees_a_draw_of_the_patches_and_evaluation_all() -> None:
    system = vilt(most_patches=3)
    batch = batch_of(system, SAMPLES)
    view, first = batch.views["encoder"], len(batch.text.ids) + len(batch.frames.masked)
    drawn = []
    for start in view.first.tolist():
        entries = Reader(batch, SAMPLES, system).entries(start)
        patches = entries[entries > first]
        assert len(patches) in (0, 3) and len(patches) == len(set(patches.tolist()))
        drawn += [tuple(patches.tolist())] if len(patches) else []
    assert len(set(drawn)) > len(SAMPLES), "anew for each sequence"
    assert system.preparer().inputs([sample(0)], ["image"]).views["encoder"].lengths == [5]


def test_word_patch_alignment_leaves_special_tokens_out() -> None:
    system = vilt()
    batch = batch_of(system, SAMPLES)
    gather, text, frames = batch.views["encoder"].gather, len(batch.text.ids), len(batch.frames.masked)
    words_ST, patches_SP = batch.extra["words"], batch.extra["patches"]
    ids = batch.text.ids[gather[words_ST[words_ST >= 0]]]
    special = torch.tensor([getattr(tokenizer(), name) for name in ("cls", "sep", "pad")])
    assert len(ids) and not torch.isin(ids, special).any()
    assert (gather[patches_SP[patches_SP >= 0]] > text + frames).all(), "the class token lies before"
    hidden_ND = system.read(batch).detach()
    expected = system._word_patches(hidden_ND, batch)["wpa"].mean()
    others = torch.ones(len(hidden_ND), dtype=torch.bool)
    others[torch.cat([words_ST[words_ST >= 0], patches_SP[patches_SP >= 0]])] = False
    changed = hidden_ND + others[:, None] * torch.randn_like(hidden_ND)
    torch.testing.assert_close(system._word_patches(changed, batch)["wpa"].mean(), expected)
    assert not torch.isclose(system._word_patches(-hidden_ND * torch.randn(16), batch)["wpa"].mean(), expected)


@torch.no_grad()
@pytest.mark.parametrize("names", MATCHED)
def test_pairs_are_scored_as_they_were_trained(names: tuple[str, ...]) -> None:
    system, chosen = vilt(), [sample(number) for number in (3, 4, 5)]
    preparer = system.preparer()
    packer = preparer.packer()
    for each in chosen:
        tables, _ = preparer.tables(packer, each, names)
        preparer.join(packer, {name: part for name, (part,) in tables.items()})
    batch = packer.batch(["3", "4", "5"], {}, {}, {})
    logits = system.match_head(system.pooler(system.read(batch)[batch.views["encoder"].first]))
    scores = system.score(chosen, names)
    torch.testing.assert_close(scores, logits[:, 1] - logits[:, 0], **CLOSE)
    torch.testing.assert_close(system.score(chosen[::-1], names), scores.flip(0), **CLOSE)
    torch.testing.assert_close(system.score(chosen[:1], names), scores[:1], **CLOSE)
    parts = {name: system.alone(chosen, name) for name in names}
    swapped = system.fuse(parts, {name: np.array([0, 1, 2]) if name == names[0] else np.array([1, 2, 0])
                                  for name in names})
    assert (swapped - scores).abs().min() > 1e-4


@torch.no_grad()
def test_vectors_and_features() -> None:
    system, chosen = vilt(), [sample(number) for number in (0, 1, 2)]
    clip = dataclasses.replace(chosen[0], pictures=chosen[0].pictures + chosen[1].pictures)
    for name in ("text", "image", "audio"):
        vectors = system.embed(chosen, [name])
        assert vectors.shape == (3, 16) and torch.allclose(vectors.norm(dim=1), torch.ones(3))
        torch.testing.assert_close(system.embed(chosen[1:2], [name]), vectors[1:2], **CLOSE)
    vectors = system.embed(chosen, ["image"])
    mean = torch.nn.functional.normalize(vectors[0] + vectors[1], dim=0)
    torch.testing.assert_close(system.embed([clip, chosen[2]], ["image"]), torch.stack([mean, vectors[2]]), **CLOSE)
    alone = system.alone(chosen, "image").lengths
    assert system.alone([clip, chosen[2]], "image").lengths.tolist() == [alone[0] + alone[1], alone[2]]
    assert system.features(chosen, ["image", "text"]).shape == (3, 32)
    assert system.cosine_weight > 1 and vilt("vilt.tiny").cosine_weight == 0


@torch.no_grad()
@pytest.mark.parametrize("task", ["vqa-classes", "nlvr2"])
def test_questions_are_answered_by_the_pooled_state_beside_each_picture(task: str) -> None:
    count = 2 if task == "nlvr2" else 1
    system = vilt("vilt.tiny", tuning=Tuning(task, answers=("yes", "no", "red"), pictures=count))
    asked = [dataclasses.replace(sample(number), answers=("no",), pictures=tuple(
        picture for each in range(count) for picture in sample(number + each).pictures)) for number in range(6)]
    batch = system.preparer()(dict(enumerate(asked)), rows(system, dict(enumerate(asked))))
    assert system(batch, EARLY).terms.keys() == {"answer"}
    words = system.alone(asked, "text")
    pooled = [system.pooled({"text": words, "image": system.alone([dataclasses.replace(
        one, pictures=one.pictures[turn : turn + 1]) for one in asked], "image")}) for turn in range(count)]
    best = system.answer_head(torch.cat(pooled, dim=1)).argmax(dim=1)
    assert system.answer(asked) == [("yes", "no", "red")[place] for place in best.tolist()]
    assert system.answer(asked[::-1]) == system.answer(asked)[::-1]


def test_what_it_cannot_do_is_said() -> None:
    system = vilt("vilt.tiny")
    with pytest.raises(UserError, match="contrast-weight 0"):
        system.embed([sample(0)], ["image"])
    with pytest.raises(UserError, match="vilt.trimodal"):
        system.alone([sample(0)], "audio")
    with pytest.raises(UserError, match="no image"):
        system.score([sample(0, image=False)], ["text", "image"])
    with pytest.raises(UserError) as error:
        ViLTConfig(sight=dataclasses.replace(ViLTConfig().sight, least_area=0.5), token_rate=1.5, wpa_weight=-1,
                   text_positions=2)
    for said in ("least-area 0.5", "token-rate 1.5", "wpa-weight -1", "text-positions 2"):
        assert said in str(error.value)


def test_the_weights_are_those_of_the_terms() -> None:
    system = vilt(mlm_weight=0.5, match_weight=0.25, wpa_weight=0.3, contrast_weight=2.0)
    terms = system(batch_of(system, SAMPLES), EARLY).terms
    expected = {"mlm": 0.5, "match": 0.25, "wpa": 0.3, "align_text_image": 2.0, "align_text_audio": 2.0,
                "align_image_audio": 2.0}
    assert {name: term.weight for name, term in terms.items()} == expected
    assert all(float(term.count) > 0 for term in terms.values())


@pytest.mark.parametrize("preset", ["vilt.tiny", "vilt.trimodal"])
def test_a_batch_has_no_more_tokens_than_it_costs(preset: str) -> None:
    system, each = vilt(preset), list(SAMPLES.values())
    words = np.array([len((one.caption or "").split()) for one in each])
    frames = np.array([len(one.speech) for one in each if one.speech is not None])
    cost = system.preparer().cost(Lengths(words, 0 * words, frames, 0 * words, 0 * words + 9)).sum()
    most = max(batch_of(system, SAMPLES, turn=turn).tokens for turn in range(8))
    assert 0.6 * cost < most <= cost


def test_hidden_words_of_new_samples_are_read_off_their_pictures() -> None:
    """Below the entropy of words by themselves."""
    torch.manual_seed(0)
    config = dataclasses.replace(made("vilt.tiny").config, encoder=Sizes(64, 2, 4, 128),
                                 sight=Sight(size=48, patch=12, fit="keep", longest=48))
    system = ViLT(config, tokenizer(), FACTS)
    optimizer = torch.optim.AdamW(system.parameters(), 3e-3)
    for turn in range(85):
        batch = batch_of(system, {row: sample(32 * turn + row) for row in range(32)})
        loss(system(batch, EARLY).terms).backward()
        optimizer.step()
        optimizer.zero_grad()
    new = {row: sample(5000 + row) for row in range(64)}
    _, counts = np.unique(" ".join(each.caption or "" for each in new.values()).split(), return_counts=True)
    share = counts / counts.sum()
    with torch.no_grad():
        terms = system(batch_of(system, new), EARLY).terms
    assert float(terms["mlm"].mean()) < 0.85 * -(share * np.log(share)).sum()
