"""Generated pictures: what the detector finds, which caption they find, what CLIP says, and the sheets."""

import dataclasses
import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from workshop import make_workshop

from eval import image_generation
from eval.image_generation import Judging, TextToImageConfig, measure
from eval.pictures.gallery import REAL, Gallery
from eval.pictures.networks import open_networks
from eval.pictures.sheets import wrapped, write_sheets
from eval.result import read_result
from feature_extract.regions import Regions
from opt.cli import main
from opt.config import UserError
from opt.systems.system import Sampling

HERE = (Path("model"), Path("shards"))
SHADES = 2
"""Pictures are grey levels twice their number, so that 120 of them are 120 different ones."""


def decode(codes):
    return [Image.new("RGB", (64, 64), (SHADES * int(one[0, 0]),) * 3) for one in codes]


class Detector:
    """Finds "number N" in a picture of shade 2 N; `blind` numbers are seen as the next one."""

    attributes = ()

    def __init__(self, classes, blind=()):
        self.classes, self.blind = tuple(classes), set(blind)

    def __call__(self, picture):
        number = round(picture.resize((1, 1)).getpixel((0, 0))[0] / SHADES)
        number += number in self.blind
        return Regions(
            np.array([[number]], np.float16), np.array([[0, 0, 1, 1]], np.float32),
            np.array([min(number, len(self.classes) - 1)], np.int16), np.array([0.9], np.float32),
        )  # fmt: skip


def grey(number):
    """A stored picture of that shade, in another size than 64 x 64."""
    buffer = io.BytesIO()
    Image.new("RGB", (96, 96), (SHADES * number,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def samples_of(make_task, pictures, narrations=1):
    return make_task((pictures, narrations)).split.reader.samples


def drawing_task(make_task, pictures, narrations=1):
    """A task whose stored pictures have the shade of their number, and whose system reads numbers off regions."""
    samples = [
        dataclasses.replace(
            sample, pictures=(dataclasses.replace(sample.pictures[0], jpeg=grey(int(sample.key[6:]))),)
        )
        for sample in samples_of(make_task, pictures, narrations)
    ]
    task = make_task(samples, batch=16)

    def embed(samples, modalities):
        numbers = [
            int(sample.caption.split()[-1]) if modalities == ("text",) else int(sample.pictures[0].regions[0, 0])
            for sample in samples
        ]
        return torch.nn.functional.one_hot(torch.tensor(numbers), 256).float()

    def sample(number, jpeg=False):  # as shards do: the file only where it is asked for
        pictures = samples[number].pictures
        kept = pictures if jpeg else tuple(dataclasses.replace(picture, jpeg=None) for picture in pictures)
        return dataclasses.replace(samples[number], pictures=kept)

    task.system.embed, task.split.reader.sample = embed, sample
    return task


def names(count):
    return [f"number {number}" for number in range(count)]


def found_by(task, detector=None, **options):
    config = TextToImageConfig(*HERE, **options)
    return measure(task, config, Judging(decode, detector))


def by_name(metrics):
    return {metric.name: metric for metric in metrics}


def test_generated_pictures_are_looked_at_by_the_detector(make_task):
    task = drawing_task(make_task, 6, 2)
    metrics, absent, examples, worst = found_by(task, Detector(names(6)))
    found = by_name(metrics)
    assert [*found] == [f"text_to_image.object_found{kind}" for kind in ("", "_true_codes", "_real")]
    for metric in metrics:
        assert (metric.value, metric.n, metric.chance) == (1.0, 6, 0.0) and metric.protocol == "object-found/detector"
    assert found["text_to_image.object_found"].modalities == ("text",)
    assert "6" in absent["text_to_image.r_precision"] and not worst
    assert (task.folder / examples[5]["generated"]).is_file() and (task.folder / examples[5]["true_codes"]).is_file()


def test_the_worst_pictures_are_those_without_any_named_object(make_task):
    task = drawing_task(make_task, 5)
    metrics, _, examples, worst = found_by(task, Detector(names(6), blind={3}))
    assert by_name(metrics)["text_to_image.object_found"].value == 4 / 5
    assert [one["key"] for one in worst] == ["scene-3"]
    assert worst[0]["failure"] == "no number 3 found, but number 4"
    assert {*worst[0]} == {*examples[3], "failure"}


def test_the_captions_that_name_most_come_first_among_the_worst(make_task):
    samples = samples_of(make_task, 3)
    tellings = ["a cat, number 0", "a cat and a dog, number 1", "a cat, number 2"]
    samples = [dataclasses.replace(sample, caption=told) for sample, told in zip(samples, tellings, strict=True)]
    *_, worst = found_by(make_task(samples), Detector(["cat", "dog", "house"], blind={0, 1, 2, 3}))
    assert worst[0]["key"] == "scene-1" and worst[0]["failure"] == "none of 2 named objects found, but house"


@pytest.mark.parametrize(("classes", "reason"), [((), "have no names"), (("dog",), "no caption names a class")])
def test_pictures_without_named_classes_have_no_figure_but_a_reason(make_task, classes, reason):
    metrics, absent, examples, worst = found_by(make_task((3, 1)), Detector(classes))
    assert not metrics and not worst and reason in absent["text_to_image.object_found"] and len(examples) == 3


def test_shards_without_regions_still_draw(make_task):
    metrics, absent, examples, _ = found_by(make_task((3, 1)))
    assert not metrics and "without regions" in absent["text_to_image.r_precision"] and len(examples) == 3


def test_a_picture_finds_its_own_caption_among_a_hundred(make_task):
    task = drawing_task(make_task, 120)
    found = by_name(found_by(task, Detector(names(121), blind={7, 8, 9}), pictures=20).metrics)
    mine = found["text_to_image.r_precision"]
    assert mine.value == 17 / 20 and mine.n == 20 and mine.chance == 0.01 and mine.protocol == "r-precision/100"
    assert mine.interval[0] < 17 / 20 < mine.interval[1] and "judge is the model that drew" in mine.note
    assert found["text_to_image.r_precision_real"].value == 17 / 20  # seen by the same blind detector


def test_equal_captions_are_no_hit(make_task):
    task = drawing_task(make_task, 100)
    same = torch.nn.functional.normalize(torch.ones(256), dim=0)
    task.system.embed = lambda samples, modalities: same.expand(len(samples), -1)
    assert by_name(found_by(task, Detector(names(100)), pictures=4).metrics)["text_to_image.r_precision"].value == 0


def test_a_system_that_cannot_embed_leaves_r_precision_out(make_task):
    task = drawing_task(make_task, 100)
    task.system.embed = lambda *_: (_ for _ in ()).throw(UserError("system 'fake' cannot embed; choose another"))
    metrics, absent, *_ = found_by(task, Detector(names(100)), pictures=4)
    assert absent["text_to_image.r_precision"].startswith("system 'fake' cannot embed") and metrics


def test_all_captions_but_its_own_are_of_other_pictures(make_task):
    from eval.pictures.r_precision import RPrecision

    task = drawing_task(make_task, 130, 2)
    numbers = task.split.one_a_picture(np.arange(260))[:10]
    judge = RPrecision(task, numbers, Detector(names(3)), "")
    for number, candidates in judge.candidates.items():
        assert candidates[0] == number and len(set(task.split.groups[candidates])) == 100
    again = RPrecision(task, numbers[5:], Detector(names(3)), "")
    assert (again.candidates[numbers[7]] == judge.candidates[numbers[7]]).all()  # whichever others are drawn


def test_fidelity_by_the_tiny_network_stands_beside(make_task):
    task = drawing_task(make_task, 20)
    judging = Judging(decode, Detector(names(20)), open_networks(["tiny"]))
    metrics, absent, *_ = measure(task, TextToImageConfig(*HERE), judging)
    found = by_name(metrics)
    assert found["text_to_image.fid_tiny_true_codes"].value == pytest.approx(0, abs=1e-4)
    assert found["text_to_image.fid_tiny"].value == pytest.approx(0, abs=1e-4)  # drawn from their own true codes
    assert "inception:FILE" in absent["text_to_image.fid_inception"] and "--clip" in absent["text_to_image.clip_score"]


# ---- sheets ---------------------------------------------------------------------------------------------------------


def test_sheets_hold_every_caption_sixteen_a_page(make_task):
    task = drawing_task(make_task, 20)
    folder = task.folder / "text_to_image"
    folder.mkdir(parents=True)
    (folder / "sheet-009.png").write_bytes(b"of an earlier evaluation")
    seeds = []
    task.system.generate_codes = lambda samples, _, sampling: (
        seeds.append(sampling.seed) or torch.full((len(samples), 8, 8), 10 + sampling.seed)
    )
    metrics, *_ = found_by(task, Detector(names(20)), draws=3, sampling=Sampling(seed=4))
    assert sorted(path.name for path in folder.glob("sheet*")) == ["sheet-001.png", "sheet-002.png"]
    assert seeds == [4, 4, 5, 5, 6, 6]
    first = Image.open(folder / "sheet-001.png").convert("RGB")
    shades = [first.getpixel((16 + 420 + 136 * column + 64, 16 + 40 + 64)) for column in range(5)]
    assert shades == [(2 * level,) * 3 for level in (14, 15, 16, 0, 0)]
    assert found_note(metrics).endswith("seed 4")  # figures are of the first draw


def found_note(metrics):
    return by_name(metrics)["text_to_image.object_found"].note


def test_a_sheet_leaves_the_place_of_a_missing_picture_empty(tmp_path):
    (path,) = write_sheets(tmp_path, ["one", "two"], [("words", "", [None, Image.new("RGB", (30, 60), "red")])])
    page = Image.open(path).convert("RGB")
    assert page.getpixel((16 + 420 + 64, 56 + 64)) == (255, 255, 255)
    assert page.getpixel((16 + 420 + 136 + 32, 56 + 64))[0] > 200
    assert page.getpixel((16 + 420 + 136 + 100, 56 + 64)) == (255, 255, 255)  # proportions kept


def test_words_are_wrapped_within_their_column():
    font = ImageFont.load_default(16)
    text = "a picture of very many words indeed " * 9 + "x" * 200
    lines = wrapped(text, font, 300, 100)
    assert all(font.getlength(line) <= 300 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    cut = wrapped(text, font, 300, 3)
    assert len(cut) == 3 and cut[2].endswith("…") and font.getlength(cut[2]) <= 300 and wrapped("", font, 300, 3) == []


# ---- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [({"draws": 0}, "--draws 0"), ({"draws": 2, "sampling": Sampling(top_k=1)}, "--draws 2: greedy"),
     ({"draws": 2, "sampling": Sampling(beams=3)}, "--draws 2: beam search")],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused_before_any_work(change, said):
    with pytest.raises(UserError, match=said):
        image_generation.text_to_image(TextToImageConfig(*HERE, **change))


def test_a_figure_says_how_its_pictures_were_drawn(make_task):
    task = drawing_task(make_task, 3)
    metrics, *_ = found_by(task, Detector(names(3)), sampling=Sampling(top_p=0.9, seed=3))
    assert found_note(metrics) == "top-32 sampling from the nucleus of 0.9 at temperature 1, seed 3"


def test_nothing_to_draw_is_a_sentence(make_task):
    samples = [dataclasses.replace(sample, caption=None) for sample in samples_of(make_task, 2)]
    with pytest.raises(UserError, match="nothing to draw"):
        found_by(make_task(samples), Detector(["cat"]))


def test_a_model_on_extracted_shards_is_judged_from_the_command_line(tmp_path, capsys):
    workshop = make_workshop(tmp_path / "made")
    command = ["eval", "text-to-image", *(str(workshop / name) for name in ("model", "shards")), "--out", str(tmp_path)]
    assert main([*command, "--draws", "2", "--seed", "3"]) == 0
    result = read_result(tmp_path / "text_to_image.json")
    found = by_name(result.metrics)
    assert [*found] == [f"text_to_image.object_found{kind}" for kind in ("", "_true_codes", "_real")]
    assert found["text_to_image.object_found_real"].value > 0  # two of the three are red circles to any eye
    assert "too few pictures: 3" in result.absent["text_to_image.kid_tiny"]
    assert "100 pictures, the split has those of 3" in result.absent["text_to_image.r_precision"]
    assert all((tmp_path / example["generated"]).is_file() for example in result.examples)
    assert Image.open(tmp_path / "text_to_image" / "sheet-001.png").width == 2 * 16 + 420 + 4 * 136
    capsys.readouterr()
    assert main([*command, "--fid-network", "nonsense"]) == 2
    assert "--fid-network nonsense: expected tiny or inception:FILE" in capsys.readouterr().err


def test_judges_see_pictures_by_key_whatever_the_order_of_the_shards(make_task):
    samples = samples_of(make_task, 5)
    for some in (samples, samples[::-1], samples[2:] + samples[:2]):
        task, looked = make_task(some, batch=2), []
        judge = SimpleNamespace(look=lambda kind, seen, task=task, looked=looked: looked.extend(
            task.split.keys[one.number] for one in seen if kind == REAL))
        drawn = {number: np.zeros((8, 8), np.int64) for number in range(5)}
        Gallery(task, drawn, decode).show([judge], None)
        assert looked == [f"scene-{number}" for number in range(5)]
