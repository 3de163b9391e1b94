"""torchvision's detectors as region extractors, against the detector called directly; random weights."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import get_model
from torchvision.transforms.functional import pil_to_tensor

from feature_extract.backends import torchvision_detector
from feature_extract.regions import RegionSettings
from opt.config import UserError

BUILDER = "fasterrcnn_mobilenet_v3_large_320_fpn"


def save_detector(builder, path, **sizes):
    """An untrained detector of five classes whose scores are spread, with its names, as a user would have them."""
    torch.manual_seed(0)
    detector = get_model(builder, weights=None, weights_backbone=None, num_classes=6, **sizes)
    torch.nn.init.normal_(detector.roi_heads.box_predictor.cls_score.weight, std=0.5)
    torch.save(detector.state_dict(), path)
    path.with_suffix(".classes.txt").write_text("dog\ncat\ncow\nhen\npig\n")
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_detector(BUILDER, tmp_path_factory.mktemp("detector") / "detector.pt")


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(256, size=(120, 160, 3), dtype=np.uint8))


def load(checkpoint, **settings):
    return torchvision_detector.load(f"{BUILDER}:{checkpoint}", RegionSettings(**settings), "cpu")


@torch.inference_mode()
def direct(builder, checkpoint, picture, threshold, most, **sizes):
    """torchvision's own answer, and the box head's features and class probabilities of every proposal."""
    detector = get_model(builder, weights=None, weights_backbone=None, num_classes=6, box_score_thresh=threshold,
                         box_detections_per_img=most, **sizes).eval()
    detector.load_state_dict(torch.load(checkpoint, weights_only=True))
    seen = {}
    detector.roi_heads.box_head.register_forward_hook(lambda *call: seen.update(features=call[2]))
    detector.roi_heads.box_predictor.register_forward_hook(lambda *call: seen.update(logits=call[2][0]))
    (answer,) = detector([pil_to_tensor(picture).float() / 255])
    return answer, seen["features"], seen["logits"].softmax(-1)[:, 1:]


def assert_same(found, answer, size=(160, 120, 160, 120)):
    np.testing.assert_array_equal(found.scores, answer["scores"].numpy())
    np.testing.assert_array_equal(found.classes + 1, answer["labels"].numpy())
    np.testing.assert_array_equal(found.boxes, answer["boxes"].numpy() / np.array(size, np.float32))


def test_detections_are_torchvisions_and_features_the_box_heads(checkpoint, picture):
    extractor = load(checkpoint, max_regions=20, score_threshold=0.05, top_classes=3)
    answer, features_PD, probabilities_PC = direct(BUILDER, checkpoint, picture, 0.05, 20)
    found = extractor(picture)
    assert len(found.scores) == 20 and extractor.classes == ("dog", "cat", "cow", "hen", "pig")
    assert_same(found, answer)
    top = probabilities_PC.topk(3, dim=1)
    for number, (label, score) in enumerate(zip(answer["labels"] - 1, answer["scores"], strict=True)):
        origins = torch.where(probabilities_PC[:, label] == score)[0]  # several where proposals coincide
        features = features_PD[origins].numpy().astype(np.float16)
        assert (found.features[number] == features).all(axis=1).any()
        assert (found.top_classes[number] == top.indices[origins].numpy()).all(axis=1).any()
        assert (found.top_scores[number] == top.values[origins].half().numpy()).all(axis=1).any()
    assert found.top_classes.dtype == np.int16 and found.top_scores.dtype == np.float16


def test_classes_are_not_stored_unless_asked_for(checkpoint, picture):
    found = load(checkpoint)(picture)
    assert found.top_classes is None and found.top_scores is None and found.attributes is None


@pytest.mark.parametrize(
    ("builder", "sizes"), [("maskrcnn_resnet50_fpn", {}), ("keypointrcnn_resnet50_fpn", {"num_keypoints": 5})]
)
def test_mask_and_keypoint_detectors_too(tmp_path, picture, builder, sizes):
    picture = picture.crop((0, 0, 160, 16))  # little work: these detectors enlarge the longer side to 1,333 pixels
    path = save_detector(builder, tmp_path / "detector.pth", **sizes)
    answer, *_ = direct(builder, path, picture, 0.1, 8, **sizes)
    settings = RegionSettings(max_regions=8, score_threshold=0.1)
    assert_same(torchvision_detector.load(f"{builder}:{path}", settings, "cpu")(picture), answer, (160, 16, 160, 16))


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "safetensors"])
def test_wrapped_checkpoints_are_the_same_detector(checkpoint, tmp_path, wrapper):
    state = torch.load(checkpoint, weights_only=True)
    path = tmp_path / ("detector.safetensors" if wrapper == "safetensors" else "detector.pth")
    if wrapper == "safetensors":
        save_file(state, path)
    else:
        torch.save({"epoch": 3, wrapper: {f"module.{name}": one for name, one in state.items()}}, path)
    path.with_suffix(".classes.txt").write_text("a\nb\nc\nd\ne\n")
    assert load(path).describe()["weights_sha256"] == load(checkpoint).describe()["weights_sha256"]


def test_the_best_region_is_kept_when_all_are_below_the_threshold(checkpoint, picture):
    every = load(checkpoint, score_threshold=0.0)(picture)
    best = load(checkpoint, score_threshold=0.99)(picture)
    assert len(best.scores) == 1
    np.testing.assert_array_equal(best.scores, every.scores[:1])
    np.testing.assert_array_equal(best.features, every.features[:1])


def test_of_equal_scores_the_first_proposals_is_kept():
    """The embedded detector sees the same in many places of a picture of one colour."""
    extractor, seen = torchvision_detector.load("tiny", RegionSettings(), "cpu"), {}
    heads = extractor.detector.roi_heads
    heads.box_predictor.register_forward_hook(lambda *call: seen.update(features=call[1][0], logits=call[2][0]))
    ties = 0
    for red, green, blue in np.random.default_rng(0).integers(256, size=(12, 3)).tolist():
        found = extractor(Image.new("RGB", (128, 128), (red, green, blue)))
        probabilities_PC = seen["logits"].softmax(-1)[:, 1:]
        ties += int((probabilities_PC == probabilities_PC.max()).sum() > 1)
        row, column = divmod(int(probabilities_PC.flatten().argmax()), len(extractor.classes))
        assert found.classes.tolist() == [column]
        np.testing.assert_array_equal(found.features[0], seen["features"][row].numpy().astype(np.float16))
    assert ties


def test_the_best_fill_up_below_the_threshold(checkpoint, picture):
    every = load(checkpoint, score_threshold=0.0)(picture)
    above = 1 + int(np.diff(every.scores[:20]).argmin())  # the widest gap: random scores lie close together
    threshold = float(every.scores[above - 1] + every.scores[above]) / 2
    alone = load(checkpoint, score_threshold=threshold)(picture)
    filled = load(checkpoint, score_threshold=threshold, min_regions=above + 6)(picture)
    assert len(alone.scores) == above and len(filled.scores) == above + 6
    for name in ("features", "boxes", "classes", "scores"):
        np.testing.assert_array_equal(getattr(filled, name), getattr(every, name)[: above + 6])
        np.testing.assert_array_equal(getattr(alone, name), getattr(every, name)[:above])


def test_no_region_where_none_is_asked_for(checkpoint, picture):
    found = load(checkpoint, min_regions=0, score_threshold=0.999, top_classes=2)(picture)
    assert found.features.shape[0] == 0 and found.boxes.shape == (0, 4) and found.top_classes.shape == (0, 2)


@pytest.mark.parametrize("wrong", [{"min_regions": 40}, {"max_regions": 0}, {"min_regions": -1}, {"top_classes": -1}])
def test_settings_that_contradict_themselves_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        RegionSettings(**wrong)


def test_a_picture_of_a_few_lines_is_too_narrow(checkpoint):
    detector = load(checkpoint)
    with pytest.raises(ValueError, match=r"30,000 x 10 pixels is too narrow"):
        detector(Image.new("RGB", (30_000, 10)))
    detector(Image.new("RGB", (20, 600)))


@pytest.mark.parametrize(
    ("weights", "said"),
    [("nothing:x.pt", "BUILDER one of"), (f"{BUILDER}:missing.pt", "could not be read"),
     ("fasterrcnn_resnet50_fpn_v2:{checkpoint}", "does not fit")],
)
def test_a_wrong_checkpoint_is_a_clear_error(checkpoint, weights, said):
    with pytest.raises(UserError, match=said):
        torchvision_detector.load(weights.format(checkpoint=checkpoint), RegionSettings(), "cpu")


@pytest.mark.parametrize("name", ["detector.pt", "detector.pkl", "detector.safetensors"])
def test_an_unreadable_checkpoint_gives_no_dangerous_advice(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"no checkpoint")
    said = "could not be read as a checkpoint|not a pickle of arrays|not a file of torch.save"
    with pytest.raises(UserError, match=said) as error:
        load(path)
    assert "weights_only" not in str(error.value)
