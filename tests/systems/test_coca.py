"""CoCa: one forward is two, the decoder's halves see what they may see, and captions are written from what was seen."""

import dataclasses

import numpy as np
import pytest
import torch
from fixtures import FACTS, tokenizer
from shrunken import batch_of, made, rows, sample

from opt.config import UserError
from opt.data.batch import Batch
from opt.data.capacity import Filled
from opt.nn.sampling import Sampling
from opt.nn.states import ABSENT, States, beside, onto
from opt.nn.writing import write
from opt.objectives.term import loss
from opt.systems.coca import CaptionWriter, CoCa, CoCaConfig, Words, base
from opt.systems.system import Progress, build, compose

START = Progress(0, 0.0)
SAMPLES = {number: sample(number) for number in range(6)}
POOLINGS = ["cascade", "parallel", "shared"]


def coca(preset: str = "coca.trimodal", **changes: object) -> CoCa:
    """A small model whose outputs are far from those of an average input."""
    system = made(preset, **changes)
    assert isinstance(system, CoCa)
    with torch.no_grad():
        for parameter in system.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return system.eval()


def pooling(kind: str) -> CoCa:
    return coca("coca.tiny", pooling=kind)


def lower(system: CoCa, captions: list[str]) -> list[torch.Tensor]:
    """Each caption's states after the lower half, [CLS] last."""
    samples = [dataclasses.replace(SAMPLES[0], caption=caption) for caption in captions]
    states = system.alone(samples, "text")
    return list(states.hidden.split(states.lengths.tolist()))


def words(system: CoCa) -> Words:
    return CaptionWriter(system).words


def logits(system: CoCa, batch: Batch) -> torch.Tensor:
    """Of every word that is asked for, in the order of the writing."""
    found: list[torch.Tensor] = []
    hook = system.next_word.register_forward_hook(lambda module, inputs, output: found.append(output))
    with torch.inference_mode():
        system(batch, START)
    hook.remove()
    return found[0]


def asked(system: CoCa, batch: Batch) -> list[torch.Tensor]:
    """The same, caption by caption."""
    borders = batch.writings["caption"].layout.query_borders.tolist()
    return list(logits(system, batch).split(np.diff(borders).tolist()))


@torch.inference_mode()
@pytest.mark.parametrize("kind", POOLINGS)
def test_one_forward_is_a_contrast_and_a_captioning_of_their_own(kind: str) -> None:
    system = pooling(kind)
    batch = batch_of(system, SAMPLES)
    terms = system(batch, START).terms
    alone = system.preparer().inputs(list(SAMPLES.values()), ["text"])
    text = system.vector("text", system.encode("text", alone))
    image = system.vector("image", system.alone(list(SAMPLES.values()), "image"))
    order = [int(key.removeprefix("sample")) for key in batch.keys]
    scores = system.temperature() * text[order] @ image[order].T
    own = torch.arange(len(order))
    contrast = (torch.nn.functional.cross_entropy(scores, own) + torch.nn.functional.cross_entropy(scores.T, own)) / 2
    torch.testing.assert_close(terms["align_text_image"].mean(), contrast, rtol=1e-4, atol=1e-5)
    pooled, _ = system.poolers["image"](system.alone(list(SAMPLES.values()), "image"))
    total, count = torch.tensor(0.0), 0
    for place, each in enumerate(SAMPLES.values()):  # a token at a time, over caches
        ids = tokenizer().encode(each.caption or "").tolist()
        writer, context = CaptionWriter(system), pooled.take(np.array([place])).padded()
        caches = writer.start(context[0], context[1], len(ids) + 1)
        for position, (now, following) in enumerate(
                zip([tokenizer().bos, *ids], [*ids, tokenizer().eos], strict=True)):
            answer = writer.step(torch.tensor([now]), position, caches)
            total, count = total + torch.nn.functional.cross_entropy(answer, torch.tensor([following])), count + 1
    torch.testing.assert_close(terms["caption"].mean(), total / count, rtol=1e-4, atol=1e-5)
    assert terms["caption"].count == count
    assert (terms["caption"].weight, terms["align_text_image"].weight) == (2.0, 1.0)


@pytest.mark.parametrize("kind", POOLINGS)
def test_a_batch_without_pictures_asks_nothing_and_every_weight_takes_part(kind: str) -> None:
    system = pooling(kind)
    batch = batch_of(system, {number: sample(number, image=False) for number in range(3)})
    value = loss(system(batch, START).terms)
    value.backward()
    assert value == 0 and len(batch.writings["caption"].ids) == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in system.parameters())


def test_a_word_changes_nothing_before_it_and_the_class_sees_all_words() -> None:
    system = coca()
    first, other = lower(system, ["red blue green star", "red blue square star"])
    same = [torch.allclose(one, two, atol=1e-5) for one, two in zip(first, other, strict=True)]
    assert same == [True, True, True, False, False, False, False]  # [BOS] red blue * star [EOS] [CLS]
    for word in range(4):
        changed = ["red", "blue", "green", "star"]
        changed[word] = "circle"
        assert not torch.allclose(lower(system, [" ".join(changed)])[0][-1], first[-1], atol=1e-3)


def test_the_upper_half_sees_no_class_and_no_later_word() -> None:
    system = coca("coca.tiny")
    captions = {number: dataclasses.replace(SAMPLES[0], key=f"sample{number}", caption=caption)
                for number, caption in enumerate(["red blue green star", "red blue square star"])}
    one, two = asked(system, batch_of(system, captions))
    same = [torch.allclose(a, b, atol=1e-4) for a, b in zip(one, two, strict=True)]
    assert same == [True, True, True, False, False]  # [BOS] red blue * star: nobody is asked behind [EOS] and [CLS]
    with torch.no_grad():
        words(system).first.add_(1.0)
    torch.testing.assert_close(torch.cat([one, two]), torch.cat(asked(system, batch_of(system, captions))))


def test_nobody_sees_the_class() -> None:
    system = coca()
    before = lower(system, ["red star"])[0]
    with torch.no_grad():
        words(system).first.add_(torch.randn(16))
    after = lower(system, ["red star"])[0]
    torch.testing.assert_close(after[:-1], before[:-1])
    assert not torch.allclose(after[-1], before[-1], atol=1e-2)


def test_a_row_knows_nothing_of_its_neighbours_and_longer_neighbours_pad_nothing() -> None:
    """There is no id for padding: whatever stands beside a row, and in whatever order, it is the same."""
    system = coca()
    batch = batch_of(system, SAMPLES)
    reverse = rows(system, SAMPLES)
    turned = {field.name: getattr(reverse, field.name)[::-1].copy() for field in dataclasses.fields(reverse)
              if isinstance(getattr(reverse, field.name), np.ndarray)}
    other = system.preparer()(SAMPLES, dataclasses.replace(reverse, **turned))
    assert other.keys == batch.keys[::-1]
    for one, two in zip(asked(system, batch), reversed(asked(system, other)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    short = dataclasses.replace(SAMPLES[0], caption="star")
    longer = dataclasses.replace(SAMPLES[1], caption=" ".join(["red blue"] * 20))
    together = system.embed([short, longer], ["text"])[0]
    torch.testing.assert_close(together, system.embed([short], ["text"])[0], rtol=1e-4, atol=1e-5)


def test_captions_come_from_pictures_speech_or_both_as_a_row_has_and_draws() -> None:
    system = coca()
    lacking = {"sample0": sample(0), "sample1": sample(1, image=False), "sample2": sample(2, speech=False),
               "sample3": sample(3, caption=False), "sample4": sample(4, image=False, speech=False)}
    drawn: dict[str, set[tuple[bool, ...]]] = {key: set() for key in lacking}
    for turn in range(12):
        batch = batch_of(system, dict(enumerate(lacking.values())), turn=turn)
        keys = [key for key in batch.keys if key in ("sample0", "sample1", "sample2")]
        lengths = np.diff(batch.writings["caption"].context.key_borders)
        for key, numbers, length in zip(keys, batch.host["contexts"], lengths, strict=True):
            row = batch.host["rows"][batch.keys.index(key)]
            assert all(number in (ABSENT, own) for number, own in zip(numbers, row[1:], strict=True))
            assert length == 16 * (numbers[0] != ABSENT) + 8 * (numbers[1] != ABSENT)
            drawn[key].add(tuple(numbers != ABSENT))
    image, audio = (True, False), (False, True)
    assert drawn == {"sample0": {image, audio, (True, True)}, "sample1": {audio}, "sample2": {image}, "sample3": set(),
                     "sample4": set()}


def test_what_a_caption_is_not_written_from_changes_nothing_of_it() -> None:
    system = coca()
    text, other = SAMPLES[0], SAMPLES[1]
    for turn in range(6):
        pair = {0: compose(text=text, image=text, audio=text), 1: compose(text=text, image=other, audio=text),
                2: compose(text=text, image=text, audio=other)}
        pair = {number: dataclasses.replace(each, key=f"sample{number}") for number, each in pair.items()}
        plan = rows(system, pair, turn)
        plan = dataclasses.replace(plan, key=np.full(3, turn + 1, np.uint64))  # all draw the same
        batch = system.preparer()(pair, plan)
        place = {key: number for number, key in enumerate(batch.keys)}
        one, image, audio = (asked(system, batch)[place[f"sample{number}"]] for number in range(3))
        sees = (batch.host["contexts"] >= 0).all(axis=0).tolist()
        assert [not torch.allclose(one, changed, atol=1e-4) for changed in (image, audio)] == sees


def test_every_word_is_asked_and_packed() -> None:
    """Logits only where there is a target: no padding, and a label for [EOS]."""
    system = coca("coca.tiny")
    batch = batch_of(system, SAMPLES)
    words = sum(len(tokenizer().encode(each.caption or "")) + 1 for each in SAMPLES.values())
    assert len(logits(system, batch)) == words == len(batch.writings["caption"].label)
    assert int((batch.writings["caption"].label == tokenizer().eos).sum()) == len(SAMPLES)


def test_no_caption_is_longer_than_the_positions_without_the_class() -> None:
    system = coca("coca.tiny", text_positions=6)
    long = dataclasses.replace(SAMPLES[0], caption=" ".join(["red", "blue", "green", "star"] * 3))
    batch = batch_of(system, {0: long})
    assert batch.views["text"].lengths.tolist() == [7]  # [BOS] four words [EOS], and [CLS] beyond
    assert batch.text.positions.max() == 5
    assert words(system).position.num_embeddings == 6


@pytest.mark.parametrize("sampling", [Sampling(limit=12), Sampling(limit=12, beams=3),
                                      Sampling(limit=12, top_p=0.9, seed=4)])
def test_texts_written_over_caches_are_those_of_running_everything_again(sampling: Sampling) -> None:
    system = coca()
    samples = list(SAMPLES.values())

    class Anew(CaptionWriter):
        """Runs both halves over all words for each new one."""

        def start(self, context_BMD, valid_BM, length, beams=1):  # type: ignore[no-untyped-def]
            self.context = [row[valid] for row, valid in zip(context_BMD, valid_BM, strict=True) for _ in range(beams)]
            self.written = torch.zeros(len(self.context), 0, dtype=torch.int64)
            return []

        def step(self, ids_R, position, caches, parents_R=None):  # type: ignore[no-untyped-def]
            before = self.written if parents_R is None else self.written[parents_R]
            self.written = torch.cat([before, ids_R[:, None]], dim=1)
            assert self.written.shape[1] == position + 1
            answers = []
            for ids_L, context_MD in zip(self.written, self.context, strict=True):
                hidden = self.words.at(ids_L, torch.arange(len(ids_L)))
                states = States(hidden, np.array([len(ids_L)]))
                hidden = self.lower(hidden, states.layout)
                layout = onto(states.lengths, np.array([len(context_MD)]), hidden.device)
                answers.append(self.next_word(self.upper(hidden, states.layout, context_MD, layout))[-1])
            return torch.stack(answers)

    with torch.inference_mode():
        found = [system.poolers[name](system.alone(samples, name))[0] for name in ("image", "audio")]
        texts = []
        for kind in (CaptionWriter, Anew):
            ids_BL = write(kind(system), *beside(found).padded(), [tokenizer().bos], tokenizer().eos, 12,
                           sampling.for_text(), [each.key for each in samples])
            texts.append([tokenizer().decode(ids) for ids in ids_BL.numpy()])
    assert texts[0] == texts[1] == system.generate_text(samples, ["image", "audio"], sampling)
    assert len(set(texts[0])) > 1


def test_it_learns_to_name_what_it_sees_and_hears() -> None:
    torch.manual_seed(0)
    system = made("coca.trimodal", seed=1)
    assert isinstance(system, CoCa)
    batches = [batch_of(system, SAMPLES, turn=turn) for turn in range(4)]
    optimizer = torch.optim.AdamW(system.parameters(), 4e-3)
    for number in range(160):
        value = loss(system(batches[number % 4], START).terms)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    system.eval()
    samples = list(SAMPLES.values())
    for modalities in (["image"], ["audio"], ["image", "audio"]):
        texts = system.generate_text(samples, modalities, Sampling())
        right = [text == each.caption for text, each in zip(texts, samples, strict=True)]
        assert sum(right) >= 5, (modalities, texts)
    text = system.embed(samples, ["text"])
    for modality in ("image", "audio"):
        assert (text @ system.embed(samples, [modality]).T).argmax(1).tolist() == list(range(6))


def test_it_sums_up_and_writes_of_clips_and_matches_nothing() -> None:
    system = coca()
    clip = dataclasses.replace(SAMPLES[0], pictures=SAMPLES[0].pictures + SAMPLES[1].pictures)
    several = [clip, SAMPLES[2]]
    assert system.features(several, ["image", "text"]).shape == (2, 2 * 2 * 16)
    ones = system.features([SAMPLES[0], SAMPLES[1]], ["text"])
    assert not torch.allclose(ones[0, :16], ones[1, :16], atol=1e-3)  # not [BOS], which sees nothing
    assert len(system.generate_text(several, ["image"], Sampling(limit=5))) == 2
    patches = system.alone([SAMPLES[0]], "image").lengths[0]
    assert system.alone(several, "image").lengths.tolist() == [2 * patches, patches]
    with pytest.raises(UserError, match="cannot write text from text, only from image and audio"):
        system.generate_text(several, ["text"], Sampling())
    with pytest.raises(UserError, match="cannot match"):
        system.score(several, ["text", "image"])
    deaf = coca("coca.tiny")
    with pytest.raises(UserError, match="only from image;"):
        deaf.generate_text(several, ["audio"], Sampling())


def test_no_weight_is_left_as_memory_was_and_the_paper_sizes_stand() -> None:
    one, other = made("coca.trimodal"), made("coca.trimodal", seed=1)
    for (name, parameter), again in zip(one.named_parameters(), other.parameters(), strict=True):
        if parameter.ndim > 1:
            assert 0.005 < float(parameter.detach().std()) < 0.4 and not torch.equal(parameter, again), name
    model = base().model
    assert (model.sight.most, model.queries, model.text.layers, model.decoder_layers) == (256, 256, 12, 12)
    with torch.device("meta"):
        whole = build("coca", model, tokenizer(), FACTS)
    words = 2 * (64_000 - tokenizer().size) * 768
    millions = (sum(parameter.numel() for parameter in whole.parameters()) + words) / 1e6
    assert round(millions) == 445


@pytest.mark.parametrize(("changes", "message"), [
    ({"pooler_heads": 7}, "pooler-heads 7 must be a divisor of the text's width 768"),
    ({"queries": 0, "caption_weight": 0.0}, "queries 0 must be at least 1; caption-weight 0.0 must be above 0"),
    ({"text_positions": 2}, "text-positions 2 must be at least 3"),
])
def test_values_out_of_range(changes: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CoCaConfig(), **changes)  # type: ignore[arg-type]


def test_padding_in_a_filled_batch_changes_no_term() -> None:
    system = coca()
    batch = batch_of(system, SAMPLES)
    filled = Filled(system.preparer(), 4096).fill(batch)
    assert len(filled.writings["caption"].ids) > len(batch.writings["caption"].ids)
    assert len(filled.views["text"].gather) > len(batch.views["text"].gather)
    with torch.inference_mode():
        expected, found = system(batch, START).terms, system(filled, START).terms
    for name, term in expected.items():
        torch.testing.assert_close(found[name].mean(), term.mean(), rtol=1e-4, atol=1e-5, msg=name)
