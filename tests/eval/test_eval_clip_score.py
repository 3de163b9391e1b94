"""CLIPScore against a direct computation, on a CLIP checkpoint that learned nothing."""

import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval.image_generation import Judging, TextToImageConfig, measure
from eval.pictures.clip_score import open_clip
from opt.config import UserError

HERE = (Path("model"), Path("shards"))


def decode(codes):
    """A picture of a grey level each: how bright, the first code says."""
    return [Image.new("RGB", (64, 64), (20 * int(one[0, 0]),) * 3) for one in codes]


def by_name(metrics):
    return {metric.name: metric for metric in metrics}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP checkpoint that learned nothing, with letters as its words."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(
        text_config={**size, "vocab_size": len(words), "max_position_embeddings": 40,
                     "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1},
        vision_config={**size, "image_size": 32, "patch_size": 8}, projection_dim=12,
    ))  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_clip_score_is_that_of_a_direct_computation(make_task, clip_folder):
    from transformers import CLIPModel, CLIPProcessor

    task = make_task((9, 1))
    judging = Judging(decode, None, (), open_clip(clip_folder))
    metrics, absent, *_ = measure(task, TextToImageConfig(*HERE), judging)
    found = by_name(metrics)["text_to_image.clip_score"]
    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), CLIPProcessor.from_pretrained(clip_folder)
    scores = []
    for number in range(9):
        inputs = processor(
            text=f"A photo depicts telling 0 of number {number}", images=decode([np.full((8, 8), number)])[0],
            return_tensors="pt", truncation=True, max_length=40,
        )  # fmt: skip
        with torch.inference_mode():
            output = model(**inputs)
        cosine = torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)
        scores.append(2.5 * max(float(cosine), 0))
    assert found.value == pytest.approx(np.mean(scores), rel=1e-5) and found.value > 0 and found.n == 9
    assert (found.unit, found.better, found.protocol) == ("score", "higher", "clip-score/hessel")
    assert "tiny-clip, SHA-256" in found.note and "0 of 9 captions" in found.note
    assert found.interval and found.chance is not None and "text_to_image.clip_score" not in absent
    assert {"text_to_image.clip_score_true_codes", "text_to_image.clip_score_real"} <= {*by_name(metrics)}


def test_a_picture_that_contradicts_its_caption_scores_nothing(make_task):
    class Opposite:
        name, longest = "opposite", 40
        read = staticmethod(lambda captions: np.tile(np.float32([1, 0]), (len(captions), 1)))
        see = staticmethod(lambda pictures: np.tile(np.float32([-0.6, 0.8]), (len(pictures), 1)))
        cut = staticmethod(lambda captions: 0)

    metrics, *_ = measure(make_task((4, 1)), TextToImageConfig(*HERE), Judging(decode, None, (), Opposite()))
    assert {metric.value for metric in metrics} == {0.0} and len(metrics) == 3


def test_captions_longer_than_clip_reads_are_cut_and_counted(clip_folder):
    clip = open_clip(clip_folder)
    assert clip.cut(["a" * 60, "short"]) == 1
    vectors = clip.read(["a" * 60, "a" * 70, "short"])
    assert np.allclose(vectors[0], vectors[1]) and not np.allclose(vectors[0], vectors[2])
    assert np.allclose(vectors[2], clip.read(["short"])[0], atol=1e-6)  # padding changes nothing


def test_folders_without_a_clip_checkpoint_are_sentences(clip_folder, tmp_path):
    with pytest.raises(UserError, match="expected a folder with a CLIP checkpoint"):
        open_clip(tmp_path / "absent")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="of type bert, not clip"):
        open_clip(tmp_path / "bert")
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "config.json").write_bytes((clip_folder / "config.json").read_bytes())
    with pytest.raises(UserError, match="could not be opened"):
        open_clip(tmp_path / "part")


def test_a_clip_is_opened_without_network_and_without_running_anything(clip_folder, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert open_clip(clip_folder).longest == 40
    shutil.copytree(clip_folder, tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").unlink()
    with (tmp_path / "clip" / "pytorch_model.bin").open("wb") as file:
        torch.save({"logit_scale": Touches(tmp_path / "ran")}, file)
    with pytest.raises(UserError, match="could not be opened"):
        open_clip(tmp_path / "clip")
    assert not (tmp_path / "ran").exists()


class Touches:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_clip_with_weights_missing_is_refused(clip_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(clip_folder, tmp_path / "clip")
    weights = load_file(clip_folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "clip" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lack visual_projection.weight"):
        open_clip(tmp_path / "clip")
