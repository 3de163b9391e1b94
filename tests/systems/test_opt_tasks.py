"""What each task does to a row: swaps by enumeration, ways of mixing and masking, samples that lack modalities."""

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from fixtures import FACTS, fake_sample, tokenizer

from opt.data.batch import Batch
from opt.data.plan import BatchPlan
from opt.data.record import Sample
from opt.objectives.matching import ALL_MATCH, IMAGE_AUDIO, NONE_MATCH, TEXT_AUDIO, TEXT_IMAGE
from opt.objectives.term import loss
from opt.systems.opt import OPT, OPTConfig
from opt.systems.opt.rows import Rows
from opt.systems.opt.tasks import TASKS
from opt.systems.system import MODALITIES, Progress

CONFIG = OPTConfig(width=16, layers=1, heads=2, inner=32, decoder_layers=1, dropout=0.0, modality_rate=0.0,
                   pair_rate=0.0)
SAMPLES = [fake_sample(number) for number in range(3)]
RULES = {  # whose part stands where: the anchor's (0), one other sample's (1), or another other's (2)
    ALL_MATCH: (0, 0, 0), IMAGE_AUDIO: (0, 1, 1), TEXT_AUDIO: (0, 1, 0), TEXT_IMAGE: (0, 0, 1), NONE_MATCH: (0, 1, 2),
}


def rows(**changes: object) -> Rows:
    return Rows(dataclasses.replace(CONFIG, **changes), tokenizer(), FACTS.region_width, FACTS.speech_width,
                FACTS.codebook)


def prepare(preparer: Rows, samples: list[Sample], task: str, seed: int, partnered: bool = True) -> Batch:
    """A batch of one row, the first sample's; the others are its partners."""
    partners = np.array([[1, 2]]) if partnered else np.full((1, 2), -1)
    task_number = preparer.tasks.names.index(task)
    plan = BatchPlan(np.array([0]), np.array([task_number]), partners, np.array([seed], np.uint64), 0, 0, 1)
    return preparer(dict(enumerate(samples)), plan)


def trace(batch: Batch, sequence: int, samples: list[Sample]) -> dict[str, int]:
    """Whose text, picture and speech a sequence holds, by comparing with the samples themselves."""
    view, text, regions = batch.views["encoder"], len(batch.text.ids), len(batch.regions.masked)
    bounds = [*view.first.tolist(), len(view.gather)]
    entries = view.gather[bounds[sequence] : bounds[sequence + 1]]
    ids = batch.text.ids[entries[entries < text]].tolist()[1:-1]
    image = batch.regions.features[entries[(entries >= text) & (entries < text + regions)] - text]
    audio = batch.frames.features[entries[entries >= text + regions] - text - regions]
    found = {}
    for number, sample in enumerate(samples):
        if ids and ids == tokenizer().encode(sample.caption or "").tolist():
            found["text"] = number
        if len(image) and sample.pictures and np.array_equal(image, sample.pictures[0].regions.astype(np.float32)):
            found["image"] = number
        if len(audio) and sample.speech is not None and np.array_equal(audio, sample.speech.astype(np.float32)):
            found["audio"] = number
    return found


def test_all_five_ways_by_enumeration_and_uniform() -> None:
    preparer, drawn = rows(), Counter()
    for seed in range(1500):
        batch = prepare(preparer, SAMPLES, "match", seed)
        label = int(batch.targets["match"].label[0])
        assert tuple(trace(batch, 0, SAMPLES)[name] for name in MODALITIES) == RULES[label]
        drawn[label] += 1
    assert set(drawn) == set(RULES)
    assert all(abs(count / 1500 - 0.2) < 5 * np.sqrt(0.2 * 0.8 / 1500) for count in drawn.values())


@pytest.mark.parametrize("lacking", MODALITIES)
def test_two_modalities_match_or_do_not(lacking: str) -> None:
    """Pictures with captions alone, such as Conceptual Captions, train too."""
    without = {"text": "caption", "image": "regions", "audio": "speech"}[lacking]
    samples, drawn = [fake_sample(number, **{without: False}) for number in range(3)], Counter()
    preparer = rows()
    for seed in range(500):
        batch = prepare(preparer, samples, "match", seed)
        label = int(batch.targets["match"].label[0])
        found = trace(batch, 0, samples)
        assert set(found) == set(MODALITIES) - {lacking}
        assert (len(set(found.values())) == 1) == (label == ALL_MATCH)
        drawn[label] += 1
    assert set(drawn) == {ALL_MATCH, NONE_MATCH}
    assert abs(drawn[ALL_MATCH] / 500 - 0.5) < 5 * 0.5 / np.sqrt(500)


@pytest.mark.parametrize("kept", MODALITIES)
def test_one_modality_is_never_matched_but_still_learned_from(kept: str) -> None:
    names = {"text": "caption", "image": "regions", "audio": "speech"}
    samples = [fake_sample(number, **{names[name]: name == kept for name in MODALITIES}) for number in range(3)]
    batch = prepare(rows(), samples, "match", 1)
    assert not len(batch.targets["match"].index)
    assert sum(len(target.index) for target in batch.targets.values())


def test_a_partner_that_lacks_the_part_leaves_the_row_matching() -> None:
    samples = [SAMPLES[0], fake_sample(1, regions=False, speech=False), fake_sample(2, regions=False, speech=False)]
    for seed in range(50):
        batch = prepare(rows(), samples, "match", seed)
        assert batch.targets["match"].label.tolist() == [ALL_MATCH]
        assert set(trace(batch, 0, samples).values()) == {0}


def test_every_way_of_mixing_and_masking_learns() -> None:
    """60 steps lower the loss by a third."""
    samples = {number: fake_sample(number) for number in range(8)}
    for mixing, masking in itertools.product(("rows", "steps", "joint"), ("paper", "code")):
        torch.manual_seed(0)
        config = dataclasses.replace(CONFIG, mixing=mixing, modality_masking=masking, modality_rate=0.3, pair_rate=0.3)
        system = OPT(config, tokenizer(), FACTS)
        preparer, optimizer = system.preparer(), torch.optim.Adam(system.parameters(), 1e-2)
        numbers, losses = np.arange(8), []
        partners = np.stack([np.roll(numbers, -1), np.roll(numbers, -2)], axis=1)
        for step in range(60):
            names = preparer.tasks.names
            task = np.full(8, step % len(names)) if mixing == "steps" else numbers % len(names)
            keys = np.arange(step * 8, step * 8 + 8).astype(np.uint64)
            terms = system(preparer(samples, BatchPlan(numbers, task, partners, keys, 0, 0, 8)), Progress(0, 0.0)).terms
            total = loss(terms)
            losses.append(total.item())
            optimizer.zero_grad()
            total.backward()
            assert all(parameter.grad is not None for parameter in system.parameters())
            optimizer.step()
        assert np.mean(losses[-6:]) < 0.67 * np.mean(losses[:6]), (mixing, masking)


def test_joint_asks_everything_of_one_masked_input() -> None:
    preparer = rows(mixing="joint")
    seen = Counter()
    for seed in range(300):
        batch = prepare(preparer, SAMPLES, "joint", seed)
        first = batch.views["encoder"].first.tolist()
        end = first[1] if len(first) > 1 else len(batch.views["encoder"].gather)
        assert all(len(batch.targets[name].index) and batch.targets[name].index.max() < end
                   for name in ("mlm", "regions", "frames")), "all levels of masks in the first sequence"
        assert batch.writings["codes"].label.tolist() == SAMPLES[0].pictures[0].codes.ravel().tolist()
        assert len(batch.writings["text"].label) == len(tokenizer().encode(SAMPLES[0].caption or "")) + 1
        label, index = batch.targets["match"].label.item(), batch.targets["match"].index.item()
        assert (index == 0) == (label == ALL_MATCH) and len(first) == 1 + (label != ALL_MATCH)
        masked = batch.regions.masked[batch.views["encoder"].gather[batch.targets["regions"].index]
                                      - len(batch.text.ids)]
        assert masked.all()
        seen[label] += 1
    assert set(seen) == set(RULES)


def test_joint_hides_whole_modalities_and_never_all() -> None:
    preparer, standing = rows(mixing="joint", modality_rate=0.3), rows(mixing="joint", modality_rate=0.3, drop_rate=0.0)
    cases = Counter()
    for seed in range(800):
        batch = prepare(standing, SAMPLES, "joint", seed)
        whole = (len(batch.targets["mlm"].index) == len(tokenizer().encode(SAMPLES[0].caption or "")),
                 len(batch.targets["regions"].index) == len(SAMPLES[0].pictures[0].regions),
                 len(batch.targets["frames"].index) == len(SAMPLES[0].speech))
        cases[whole] += 1
        left_out = prepare(preparer, SAMPLES, "joint", seed, partnered=False)
        assert len(left_out.views["encoder"].gather) > 1
    # few words and regions may all be hidden one by one, but the frames are many: hidden whole or not at all
    rate = (0.3 - 0.3**3) / (1 - 0.3**3)
    share = sum(count for whole, count in cases.items() if whole[2]) / 800
    assert abs(share - rate) < 5 * np.sqrt(rate * (1 - rate) / 800)


@pytest.mark.parametrize(("task", "written"), [("dtr", "text"), ("dir", "image")])
def test_what_a_writer_may_see(task: str, written: str) -> None:
    """code: never the written modality, the others as 0.3, 0.3, 0.4. paper: each hidden independently, never all."""
    for masking in ("code", "paper"):
        preparer, seen = rows(modality_rate=0.3, modality_masking=masking, drop_rate=1.0, token_rate=0.0), Counter()
        for seed in range(800):
            batch = prepare(preparer, SAMPLES, task, seed)
            text, regions = len(batch.text.ids), len(batch.regions.masked)
            gather = batch.views["encoder"].gather
            seen[(bool((gather[1:] < text).any()), bool(((gather >= text) & (gather < text + regions)).any()),
                  bool((gather >= text + regions).any()))] += 1
        assert (False, False, False) not in seen
        shares = {case: count / 800 for case, count in seen.items()}
        if masking == "code":
            place = MODALITIES.index(written)
            assert not any(case[place] for case in shares)
            assert np.allclose(sorted(shares.values()), [0.3, 0.3, 0.4], atol=0.08)
        else:
            for case in itertools.product((False, True), repeat=3):
                wanted = np.prod([0.7 if there else 0.3 for there in case]) / (1 - 0.3**3) if any(case) else 0.0
                assert abs(shares.get(case, 0.0) - wanted) < 0.08


def test_hidden_modalities_stand_as_masks_or_are_left_out() -> None:
    lengths = {}
    for drop_rate in (0.0, 1.0):
        preparer = rows(modality_rate=0.0, drop_rate=drop_rate)
        lengths[drop_rate] = {len(prepare(preparer, SAMPLES, "dtr", seed).views["encoder"].gather) for seed in range(9)}
    words = len(tokenizer().encode(SAMPLES[0].caption or ""))
    rest = len(SAMPLES[0].pictures[0].regions) + len(SAMPLES[0].speech)
    assert lengths == {0.0: {words + 2 + rest}, 1.0: {1 + rest}}


def test_frame_spans_reach_the_batch() -> None:
    long = dataclasses.replace(SAMPLES[0], speech=np.random.default_rng(0).normal(size=(200, 10)).astype(np.float16))
    batch = prepare(rows(frame_span=10), [long, *SAMPLES[1:]], "mam", 5)
    hidden = batch.targets["frames"].index.numpy()
    runs = np.split(hidden, np.flatnonzero(np.diff(hidden) != 1) + 1)
    start, end = hidden.min(), hidden.max()
    assert all(len(run) >= 10 for run in runs if run[0] > start and run[-1] < end)


def test_tasks_without_a_share_never_come() -> None:
    config = dataclasses.replace(CONFIG.shares, dtr=0.0, dir=0.0)
    preparer = rows(shares=config)
    assert dict(zip(preparer.tasks.names, preparer.tasks.shares, strict=True))["dtr"] == 0.0
    assert preparer.tasks.names == TASKS


def test_partners_that_are_another_process_rows_are_not_encoded_for_the_alignment() -> None:
    """Three sequences for the row's own alignment, one for matching; the partners' parts stand in the tables alone."""
    preparer = rows(alignment_weight=1.0)
    batch = prepare(preparer, SAMPLES, "match", 3)
    assert len(batch.views["encoder"].first) == 4
    assert [len(batch.extra[f"align_{pair}"]) for pair in ("text_image", "text_audio", "image_audio")] == [1, 1, 1]


def test_a_picture_is_the_same_number_in_every_batch() -> None:
    preparer = rows(alignment_weight=1.0)
    twin = dataclasses.replace(SAMPLES[1], key=SAMPLES[0].key)
    numbers = [int(prepare(preparer, [sample, *SAMPLES[1:]], "mlm", 0).extra["align_text_image"][0, 2])
               for sample in (SAMPLES[0], twin, SAMPLES[2])]
    assert numbers[0] == numbers[1] != numbers[2] and min(numbers) >= 0


@pytest.mark.parametrize("mixing", ["rows", "joint"])
def test_a_batch_of_samples_without_any_part_can_be_trained_on(mixing: str) -> None:
    preparer = rows(alignment_weight=1.0, mixing=mixing)
    nothing = [fake_sample(number, regions=False, caption=False, speech=False) for number in range(3)]
    batch = prepare(preparer, nothing, "joint" if mixing == "joint" else "match", 0)
    system = OPT(preparer.config, tokenizer(), FACTS)
    total = loss(system(batch, Progress(0, 0.0)).terms)
    total.backward()
    assert total.item() == 0.0 and all(parameter.grad is not None for parameter in system.parameters())
