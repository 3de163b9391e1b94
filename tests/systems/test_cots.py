"""COTS's own promises: what is hidden and who tells of it, each level by hand, and whom the filter leaves out."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fixtures import FACTS, tokenizer
from shrunken import ROWS, batch_of, lacking, made, rows, sample, small
from torch import Tensor
from training import Job

from opt.config import UserError
from opt.data.batch import Batch, PatchTable
from opt.data.pack import PATCH, TEXT
from opt.data.pixels import Sight
from opt.data.plan import BatchPlan
from opt.data.record import Lengths
from opt.distributed import rank, sum_over_ranks, world
from opt.nn.embed import PatchEmbedder
from opt.objectives.term import loss
from opt.systems import cots
from opt.systems.cots import COTS, HIDDEN, COTSConfig, base
from opt.systems.system import MODALITIES, Progress
from pretrain.parallel import processes

LATE, KEPT = Progress(90, 0.9), torch.tensor(True)
SAMPLES = {number: lacking(number) for number in range(ROWS)}
BOTH = pytest.mark.parametrize("preset", ["cots.tiny", "cots.trimodal"])
STRICT = 0.3
"""Deviations at which the filter leaves some of few pairs out."""


def full(system: COTS) -> COTS:
    """With a ring that has gone round, and a twin that believes something else."""
    torch.manual_seed(5)
    ring = system.contrast.ring
    ring.picture.copy_(torch.arange(ring.rows) + 10**6)
    for name in system.modalities:
        ring.get_buffer(name).copy_(F.normalize(torch.randn(ring.rows, system.config.space), dim=-1))
        ring.get_buffer(f"has_{name}").copy_(torch.rand(ring.rows) < 0.9)
    with torch.no_grad():
        for value in system.kept.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return system


def entries(batch: Batch, view: str, column: str, table: int) -> list[np.ndarray]:
    """A column of the table for all sequences of a view, learned first entries left out."""
    found = getattr(batch.text if table == TEXT else batch.patches, column)
    numbers = [each.numpy() for each in batch.views[view].gather.split(batch.views[view].lengths.tolist())]
    return [found[each if table == TEXT else each[1:] - 1].numpy() for each in numbers]


def tellers(system: COTS, batch: Batch, term: str) -> list[tuple[str, int]]:
    """The modality and number of the sequence beside each hidden word or patch."""
    others = [name for name in system.modalities if name != HIDDEN[term]]
    ends = [(name, number) for name in others for number in range(len(batch.views[name].lengths))]
    return [ends[place] for place in batch.extra[f"beside_{term}"].tolist()]


def row_of(batch: Batch, modality: str, number: int) -> int:
    """The row whose sequence of a modality has that number."""
    return int(np.flatnonzero(batch.host["rows"][:, MODALITIES.index(modality)] == number)[0])


def reordered(plan: BatchPlan, order: np.ndarray) -> BatchPlan:
    return dataclasses.replace(plan, sample=plan.sample[order], task=plan.task[order], partners=plan.partners[order],
                               key=plan.key[order])


@BOTH
def test_the_order_of_rows_changes_nothing(preset: str) -> None:
    system = full(made(preset, deviations=STRICT))
    plan, preparer = rows(system, SAMPLES), system.preparer()
    order = np.random.default_rng(0).permutation(len(plan.sample))
    expected, found = (system(preparer(SAMPLES, each), LATE).terms for each in (plan, reordered(plan, order)))
    for name, term in expected.items():
        torch.testing.assert_close(found[name].total, term.total, rtol=1e-5, atol=1e-5)
        assert term.total > 0 and found[name].count == term.count
    assert expected["align_text_image"].count < batch_of(system, SAMPLES).counts["align_text_image"]


@BOTH
def test_words_are_hidden_beside_another_modality_of_their_row(preset: str) -> None:
    system = made(preset, token_rate=0.5)
    batch = batch_of(system)
    whole, masked, target = (entries(batch, "text", "ids", TEXT), entries(batch, "cmlm", "ids", TEXT),
                             batch.targets["cmlm"])
    others = [MODALITIES.index(name) for name in system.modalities if name != "text"]
    asked = [row for row in batch.host["rows"] if row[0] >= 0 and (row[others] >= 0).any()]
    assert 0 < len(masked) == len(asked) < len(batch.keys)
    original = np.concatenate([whole[row[0]] for row in asked])
    hidden = np.isin(np.arange(len(original)), target.index.numpy())
    assert np.array_equal(original[hidden], target.label.numpy()) and batch.counts["cmlm"] == hidden.sum()
    shown = np.concatenate(masked)
    assert np.array_equal(shown[~hidden], original[~hidden]) and 0.5 < (shown[hidden] == tokenizer().mask).mean() < 1
    assert not np.isin(original[hidden], [tokenizer().cls, tokenizer().sep]).any()
    own = np.repeat([row[0] for row in asked], [len(whole[row[0]]) for row in asked])[hidden]
    said = tellers(system, batch, "cmlm")
    assert [row_of(batch, *teller) for teller in said] == [row_of(batch, "text", number) for number in own]
    assert {name for name, _ in said} == set(system.modalities) - {"text"}


@BOTH
def test_patches_are_hidden_in_blocks_and_told_in_their_codes(preset: str) -> None:
    system = made(preset)
    batch = batch_of(system)
    target, masked = batch.targets["cmvm"], entries(batch, "cmvm", "masked", PATCH)
    said = tellers(system, batch, "cmvm")
    assert all(each.sum() == round(0.4 * 64) for each in masked) and len(said) == 26 * len(masked) > 0
    assert np.array_equal(np.flatnonzero(np.concatenate([[False, *each] for each in masked])), target.index.numpy())
    assert {name for name, _ in said} == set(system.modalities) - {"image"}
    for number, hidden in enumerate(masked):
        part = slice(26 * number, 26 * number + 26)
        assert len(set(said[part])) == 1
        row = row_of(batch, *said[26 * number])
        codes = next(each for each in SAMPLES.values() if each.key == batch.keys[row]).pictures[0].codes
        assert np.array_equal(target.label[part].numpy(), codes.ravel()[hidden])
        picture = batch.host["rows"][row, 1]
        for column in ("pixels", "places", "shares"):
            same, shown = (entries(batch, view, column, PATCH)[place] for view, place in (("image", picture),
                                                                                         ("cmvm", number)))
            kept = ~hidden if column == "pixels" else np.ones(64, bool)
            assert np.array_equal(same[kept], shown[kept])
        assert not entries(batch, "cmvm", "pixels", PATCH)[number][hidden].any()
    assert not any(each.any() for each in entries(batch, "image", "masked", PATCH))


def test_of_a_hidden_patch_its_place_alone_is_seen() -> None:
    torch.manual_seed(0)
    embedder = PatchEmbedder(Sight(size=8, patch=4), 6, masks=True)
    torch.nn.init.normal_(embedder.mask)
    pixels = torch.randint(0, 255, (4, 48), dtype=torch.uint8)
    table = PatchTable(pixels, torch.arange(1, 5)[:, None], torch.ones(4, 1), torch.tensor([False, True, True, False]))
    found = embedder(table)
    torch.testing.assert_close(found[2:4], embedder.mask + embedder.position.weight[2:4])
    bare = PatchEmbedder(Sight(size=8, patch=4), 6)
    bare.load_state_dict({name: value for name, value in embedder.state_dict().items() if name != "mask"})
    assert torch.equal(found[[0, 1, 4]], bare(table)[[0, 1, 4]])


@BOTH
def test_the_token_level_is_each_stream_and_one_state_of_another(preset: str) -> None:
    system = made(preset, token_rate=0.5).eval()
    batch = batch_of(system)
    terms = system(batch, LATE).terms
    embedder = system.streams.towers["text"].embedder
    for term, table in (("cmlm", embedder.token.weight), ("cmvm", system.code_table.weight)):
        hidden = system.streams.encode(HIDDEN[term], batch, term).hidden
        total, target, head = torch.zeros(()), batch.targets[term], system.heads[term]
        for place, label, (name, number) in zip(target.index, target.label, tellers(system, batch, term), strict=True):
            told = head.beside[name](system.encode(name, batch).first[number])
            total = total + F.cross_entropy(head.head(hidden[place] + told, table), label)
        torch.testing.assert_close(terms[term].total, total, rtol=1e-4, atol=1e-4)
        assert terms[term].count == batch.counts[term] and terms[term].weight == 1


def test_hidden_words_teach_the_stream_of_pictures() -> None:
    system = made("cots.tiny")
    terms = system(batch_of(system), LATE).terms
    terms["cmlm"].total.backward(retain_graph=True)
    assert system.streams.towers["image"].stack.blocks[0].self_attention.query.weight.grad.any()
    system.zero_grad()
    terms["cmvm"].total.backward()
    assert system.streams.towers["text"].embedder.token.weight.grad.any()


@pytest.mark.parametrize(("sides", "deviations"), [("below", STRICT), ("both", 1.0), ("none", 0.0)])
def test_instances_and_tasks_by_hand(sides: str, deviations: float) -> None:
    """A row at a time: who is trusted by the ring, the cross entropy among all keys, both beliefs over all pairs."""
    system = full(made("cots.tiny", filtered=sides, deviations=deviations)).eval()
    batch, ring = batch_of(system), dict(system.contrast.ring.named_buffers())
    count, scale = len(batch.keys), system.contrast.temperature()
    own = {name: torch.zeros(2, count, 16) for name in ("text", "image")}
    has = {name: torch.from_numpy(batch.host["rows"][:, MODALITIES.index(name)] >= 0) for name in own}
    for name, both in own.items():
        for side, streams in enumerate((system.streams, system.kept)):
            both[side][has[name]] = streams.vector(name, streams.encode(name, batch))
    keys = {name: torch.cat([both[1], ring[name]]).double() for name, both in own.items()}
    has = {name: torch.cat([has[name], ring[f"has_{name}"]]) for name in own}
    paired, similar = has["text"] & has["image"], (keys["text"] * keys["image"]).sum(1)
    earlier = similar[count:][paired[count:]]
    distance = (earlier.mean() - similar[:count]) / earlier.std()
    trusted = paired[:count] & {"below": distance <= deviations, "both": distance.abs() <= deviations,
                                "none": distance > -99}[sides]
    instance = task = torch.zeros(())
    for row in torch.nonzero(trusted).ravel().tolist():
        logits = {name: scale * keys[other] @ own[name][0, row].double() for name, other in (("text", "image"),
                                                                                            ("image", "text"))}
        for name, other in (("text", "image"), ("image", "text")):
            instance = instance - logits[name][has[other]].log_softmax(0)[has[other][:row].sum()] / 2
        p, q = (logits[name][paired].log_softmax(0) for name in ("text", "image"))
        task = task + (F.kl_div(p, q, reduction="sum", log_target=True)
                       + F.kl_div(q, p, reduction="sum", log_target=True)) / 2
    terms = system(batch, LATE).terms
    for name, expected in (("align_text_image", instance), ("agree_text_image", task)):
        torch.testing.assert_close(terms[name].total, expected.float(), rtol=1e-4, atol=1e-4)
        assert terms[name].count.item() == pytest.approx(int(trusted.sum()))
    assert (int(trusted.sum()) == int(paired[:count].sum())) == (sides == "none") and trusted.any()


def test_both_streams_that_say_the_same_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    system = made("cots.tiny")
    batch = batch_of(system, {number: sample(number) for number in range(6)})
    assert system(batch, LATE).terms["agree_text_image"].total > 1e-3
    said = F.normalize(torch.randn(6, 16), dim=-1)
    monkeypatch.setattr(cots.Streams, "vector", lambda *_: said)
    assert system(batch, LATE).terms["agree_text_image"].total.abs() < 1e-5


def test_nothing_is_left_out_before_the_ring_is_full() -> None:
    system = full(made("cots.tiny", deviations=STRICT))
    system.contrast.ring.picture[7] = -1
    pairs = batch_of(system).counts["align_text_image"]
    assert system(batch_of(system), LATE).terms["align_text_image"].count == pairs
    system.contrast.ring.picture[7] = 7
    assert 1 <= system(batch_of(system), LATE).terms["align_text_image"].count < pairs


def test_all_keys_enter_the_ring_text_beside_picture_whoever_was_left_out() -> None:
    system = full(made("cots.tiny", deviations=STRICT))
    samples = {number: sample(number) for number in range(ROWS)}
    batch = batch_of(system, samples)
    output = system(batch, LATE)
    assert output.terms["align_text_image"].count < ROWS
    expected = system.similarity([next(each for each in samples.values() if each.key == key) for key in batch.keys],
                                 "text", "image")
    system.after_step([output.carry], KEPT)
    ring = dict(system.contrast.ring.named_buffers())
    assert torch.equal(ring["picture"][:ROWS], batch.extra["picture"]) and ring["place"] == ROWS
    torch.testing.assert_close((ring["text"] * ring["image"]).sum(1)[:ROWS], expected)
    assert expected.std() > 1e-4


@BOTH
def test_each_pair_of_modalities_has_its_own_similarities(preset: str) -> None:
    """Whoever is unlike the ring in one pair stays in the others."""
    system = full(made(preset, deviations=2.0))
    for name in system.modalities:
        system.contrast.ring.get_buffer(f"has_{name}").fill_(True)
    similar, pairs = torch.tensor([-0.9, 0.0]), torch.tensor([True, True])
    ring = system.contrast.ring
    ring.image.copy_(F.normalize(ring.text + 0.3 * torch.randn_like(ring.text), dim=-1))
    for a, b in system.contrast.pairs:
        expected = [False, False] if (a, b) == ("text", "image") else [False, True]
        expected = [True, True] if not any(expected) else expected  # never are all left out
        assert system.trusted(similar, pairs, a, b).tolist() == expected
    assert system.trusted(torch.tensor([0.0, 0.95]), pairs, "text", "image").tolist() == [False, True]


WEIGHTS = {"instance_weight": "align_text_image", "token_weight": "cmlm", "task_weight": "agree_text_image"}


@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_level_of_weight_0_is_not_computed_and_others_stay(weight: str, monkeypatch: pytest.MonkeyPatch) -> None:
    system, without = (full(made("cots.tiny", **changes)).eval() for changes in ({}, {weight: 0.0}))
    without.load_state_dict({name: value for name, value in system.state_dict().items()
                             if name in without.state_dict()})
    expected = system(batch_of(system), LATE).terms

    def never(*_: object, **__: object) -> None:
        raise AssertionError(weight)

    level = {"instance_weight": "opt.systems.shared.momentum.momentum_contrast",
             "token_weight": "opt.systems.cots.token_cross_entropy", "task_weight": "opt.systems.cots.agreement"}
    monkeypatch.setattr(level[weight], never)
    batch = batch_of(without)
    found = without(batch, LATE).terms
    gone = {"cmlm", "cmvm"} if weight == "token_weight" else {WEIGHTS[weight]}
    assert found.keys() == expected.keys() - gone
    for name, term in found.items():
        torch.testing.assert_close(term.total, expected[name].total)
    heads = [name for name, _ in without.named_parameters() if name.startswith(("heads", "code_table"))]
    assert (weight == "token_weight") == (not heads) == ("cmlm" not in batch.views)
    assert (weight == "token_weight") == (without.streams.towers["image"].embedder.mask is None)


def test_weights_are_those_of_the_levels() -> None:
    system = made("cots.tiny", instance_weight=2.0, token_weight=3.0, task_weight=0.25)
    terms = system(batch_of(system), LATE).terms
    assert {name: term.weight for name, term in terms.items()} == {
        "align_text_image": 2.0, "agree_text_image": 0.25, "cmlm": 3.0, "cmvm": 3.0}


def test_the_twin_moves_after_a_kept_step_and_never_else() -> None:
    system = full(made("cots.tiny"))
    before = {name: value.clone() for name, value in system.kept.state_dict().items()}
    output = system(batch_of(system), LATE)
    loss(output.terms).backward()
    assert all(value.grad is None for value in system.twin.parameters())
    for kept, place in ((torch.tensor(False), 0), (KEPT, ROWS)):
        system.after_step([output.carry], kept)
        assert int(system.contrast.ring.place) == place
        for name, value in system.streams.named_parameters():
            follows = torch.lerp(before[name], value, 1 - system.config.momentum) if kept else before[name]
            torch.testing.assert_close(system.kept.get_parameter(name), follows)


def test_a_model_in_use_is_its_streams() -> None:
    system = full(made("cots.trimodal")).eval()
    samples = [sample(number) for number in range(4)]
    expected = {name: system.embed(samples, [name]) for name in MODALITIES}
    with torch.no_grad():
        for part in (system.heads, system.code_table, system.kept):
            for value in part.parameters():
                value.normal_()
    for name, vectors in expected.items():
        assert torch.equal(system.embed(samples, [name]), vectors) and vectors.shape == (4, 16)


@BOTH
def test_cost_is_the_tokens_of_a_batch(preset: str) -> None:
    for weight in (1.0, 0.0):
        system = made(preset, token_weight=weight)
        pictures = np.array([len(each.pictures) for each in SAMPLES.values()])
        lengths = Lengths(np.array([len((each.caption or "").split()) for each in SAMPLES.values()]), 0 * pictures,
                          np.array([0 if each.speech is None else len(each.speech) for each in SAMPLES.values()]),
                          64 * pictures, pictures)
        assert system.preparer().cost(lengths).sum() == batch_of(system).tokens


def steps() -> dict[str, Tensor]:
    """What all processes together find in two steps with a full ring, some pairs of which are left out."""
    system, found = full(made("cots.trimodal", deviations=STRICT)), {}
    for turn in range(2):
        batch = batch_of(system, SAMPLES, rank(), world(), turn)
        batch = dataclasses.replace(batch, counts=sum_over_ranks(batch.counts))
        output = system(batch, LATE)
        loss(output.terms).backward()
        for name, term in output.terms.items():
            found[f"{turn} {name}"] = sum_over_ranks({"": term.total.detach()})[""]
            found[f"{turn} count {name}"] = term.count
            found[f"{turn} left out {name}"] = batch.counts.get(name, term.count) - term.count
        for name, value in system.named_parameters():
            if value.requires_grad:
                found[f"{turn} gradient {name}"] = sum_over_ranks({"": value.grad.clone()})[""]
                value.grad = None
        system.after_step([output.carry], KEPT)
    return found | dict(system.contrast.ring.named_buffers())


def save_steps(folder: Path) -> None:
    """What each of two processes does."""
    with processes():
        found = steps()
        torch.save(found, folder / f"{rank()}.pt")


def test_two_processes_leave_the_same_pairs_out_as_one(tmp_path: Path) -> None:
    expected = steps()
    left_out = torch.stack([value for name, value in expected.items() if "left out align" in name])
    assert (left_out > 0).sum() >= 4, left_out
    assert Job(2, save_steps, tmp_path).wait() == [0, 0]
    for number in range(2):
        found = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-5)


def test_settings_that_cannot_be_are_answered() -> None:
    with pytest.raises(UserError, match=r"patch-rate 1.5 must be from 0 to 1; task-weight -1 must be at least 0"):
        COTSConfig(patch_rate=1.5, task_weight=-1)
    with pytest.raises(UserError, match="instance-weight 0 must be above 0 where task-weight is 0"):
        COTSConfig(instance_weight=0, task_weight=0)


def test_codes_that_lie_elsewhere_or_nowhere_are_answered() -> None:
    config = small("cots.tiny")
    with pytest.raises(UserError, match="4 x 4 codes, the model sees it in 8 x 8 patches: .* --codes-grid 8"):
        COTS(config, tokenizer(), dataclasses.replace(FACTS, codes_grid=4))
    with pytest.raises(UserError, match="shards hold none: extract again with --codes"):
        COTS(config, tokenizer(), dataclasses.replace(FACTS, codebook=0))
    for change in ({"fit": "crop"}, {"least_area": 0.5}):
        with pytest.raises(UserError, match=r"--model.sight.fit squeeze and --model.sight.least-area 1, not"):
            COTS(dataclasses.replace(config, sight=dataclasses.replace(config.sight, **change)), tokenizer(), FACTS)
    COTS(dataclasses.replace(config, token_weight=0.0), tokenizer(), dataclasses.replace(FACTS, codebook=0))
    one = sample(0)
    small_codes = dataclasses.replace(one.pictures[0], codes=np.zeros((4, 4), np.int16))
    with pytest.raises(UserError, match="4 x 4 codes"):
        batch_of(made("cots.tiny"), {0: dataclasses.replace(one, pictures=(small_codes,))})


def test_pictures_without_codes_have_none_hidden() -> None:
    system = made("cots.tiny")
    given = {number: sample(number) for number in range(4)}
    given[2] = dataclasses.replace(given[2], pictures=(dataclasses.replace(given[2].pictures[0], codes=None),))
    batch = batch_of(system, given)
    assert len(batch.views["cmvm"].lengths) == 3 and len(batch.views["cmlm"].lengths) == 4


def test_the_published_size() -> None:
    """BERT-base has 109.5 million, its pooler left out; ViT-B/16 at 384 pixels 86.1."""
    with torch.device("meta"):
        system = cots.Streams(base().model, 30_522, 0)
    sizes = {name: sum(each.numel() for each in tower.parameters()) for name, tower in system.towers.items()}
    assert sizes["image"] == pytest.approx(86.1e6, rel=0.005)
    assert sizes["text"] == pytest.approx(108.9e6, rel=0.005)
