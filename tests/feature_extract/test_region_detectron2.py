"""The detectron2 backend, and bottom_up against detectron2 itself.

detectron2 is no dependency. Where it is not installed, the backend is tested on a hand-written stand-in with the few
functions that it calls: that proves the wiring, not detectron2. Where it is (its Python files suffice for these
networks, its compiled extension is not needed), the last tests compare with its own answers. Random weights throughout.
"""

import copy
import pickle
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from feature_extract.backends import bottom_up, detectron2_detector
from feature_extract.bottom_up.pictures import prepare
from feature_extract.regions import RegionSettings
from opt.config import UserError

NAMES = "dog\ncat\ncow\n"


@pytest.fixture(scope="module")
def picture():
    coarse = np.random.default_rng(0).integers(256, size=(16, 22, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((220, 160), Image.Resampling.BICUBIC)


class Instances:
    """A stand-in for detectron2's: fields of one length."""

    def __init__(self, **fields):
        self.__dict__.update(fields)

    def __getitem__(self, place):
        boxes = SimpleNamespace(tensor=self.pred_boxes.tensor[place])
        return Instances(pred_boxes=boxes, scores=self.scores[place], pred_classes=self.pred_classes[place])


class Predictor(nn.Module):
    """A stand-in for FastRCNNOutputLayers: scores a class a proposal, no suppression, and the last box has no size."""

    test_score_thresh, test_topk_per_image = 0.05, 100

    def __init__(self):
        super().__init__()
        self.cls_score = nn.Linear(4, 4)

    def forward(self, features):
        return self.cls_score(features), features

    def predict_probs(self, predictions, proposals):
        return [predictions[0].softmax(1)]

    def inference(self, predictions, proposals):
        scores, classes = predictions[0].softmax(1)[:, :-1].max(1)
        rows = scores.argsort(descending=True)
        rows = rows[scores[rows] > self.test_score_thresh][: self.test_topk_per_image]
        without_size = torch.tensor([[5.0, 5, 5, 9]])[: len(rows)]
        boxes = SimpleNamespace(tensor=torch.cat([proposals[0][rows], without_size]))
        rows = torch.cat([rows, rows[:1]])
        return [Instances(pred_boxes=boxes, scores=scores[rows], pred_classes=classes[rows])], [rows]


class Model(nn.Module):
    """A stand-in for GeneralizedRCNN: the mean colour of four fixed boxes."""

    def __init__(self):
        super().__init__()
        self.roi_heads = nn.Module()
        self.roi_heads.box_predictor = Predictor()
        self.roi_heads.forward = lambda images, maps, proposals, _: self.roi_heads.box_predictor(
            torch.stack([torch.cat([maps[:, int(y):int(v), int(x):int(u)].mean((1, 2)), y[None] / 100])
                         for x, y, u, v in proposals[0]]))
        self.backbone = lambda tensor: tensor[0] / 255
        self.proposal_generator = lambda images, maps, _: (
            [torch.tensor([[0.0, 0, 40, 40], [10, 20, 90, 80], [50, 0, 110, 30], [0, 40, 60, 80]])], {})
        self.preprocess_image = lambda inputs: SimpleNamespace(
            tensor=inputs[0]["image"][None], image_sizes=[tuple(inputs[0]["image"].shape[1:])])


class Config(SimpleNamespace):
    def merge_from_file(self, name, allow_unsafe):
        if not name.endswith(".yaml") or allow_unsafe:
            raise ValueError("no such file")

    def dump(self):
        return "INPUT: ..."


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """A module named detectron2, and the words that open its model."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "detectron2"]:
        monkeypatch.delitem(sys.modules, name)  # the real one comes back behind the test
    config = Config(
        INPUT=SimpleNamespace(FORMAT="BGR", MIN_SIZE_TEST=80, MAX_SIZE_TEST=200),
        MODEL=SimpleNamespace(ROI_HEADS=SimpleNamespace(NUM_CLASSES=3)), DATASETS=SimpleNamespace(TEST=()))
    half = SimpleNamespace(apply_image=lambda pixels: pixels[::2, ::2])
    parts = {
        "config": {"get_cfg": lambda: copy.deepcopy(config)},
        "modeling": {"build_model": lambda _: Model()},
        "data": {"MetadataCatalog": {}},
        "data.transforms": {"ResizeShortestEdge": lambda *_: SimpleNamespace(get_transform=lambda _: half)},
    }
    for name, members in {"": {}, **parts}.items():
        module = ModuleType(f"detectron2.{name}".rstrip("."))
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.manual_seed(0)
    torch.save({"model": Model().state_dict()}, tmp_path / "detector.pth")
    (tmp_path / "detector.classes.txt").write_text(NAMES)
    return f"model.yaml:{tmp_path / 'detector.pth'}"


def test_without_the_package_the_error_says_how_to_get_it():
    if find_spec("detectron2"):
        pytest.skip("detectron2 is installed")
    with pytest.raises(UserError, match=r"detectron2 is not installed; .*bottom_up:CHECKPOINT"):
        detectron2_detector.load("model.yaml:detector.pth", RegionSettings(), "cpu")


def test_the_stand_ins_answers_come_through(stand_in, picture):
    settings = RegionSettings(score_threshold=0.0, top_classes=2)
    extractor = detectron2_detector.load(stand_in, settings, "cpu")
    found = extractor(picture)
    pixels = torch.from_numpy(np.asarray(picture)[::2, ::2, ::-1].copy()).permute(2, 0, 1).float() / 255
    (boxes,), _ = extractor.model.proposal_generator(None, None, None)
    colours = torch.stack([pixels[:, int(y):int(v), int(x):int(u)].mean((1, 2)) for x, y, u, v in boxes])
    probabilities = extractor.predictor.cls_score(torch.cat([colours, boxes[:, 1:2] / 100], 1)).softmax(1)[:, :-1]
    order = probabilities.amax(1).argsort(descending=True)
    np.testing.assert_allclose(found.features[:, :3], colours[order].numpy(), atol=1e-3)
    np.testing.assert_allclose(found.boxes, boxes[order].numpy() / np.array([110, 80, 110, 80]), atol=1e-6)
    np.testing.assert_allclose(found.scores, probabilities.amax(1)[order].numpy(), atol=1e-6)
    np.testing.assert_array_equal(found.classes, probabilities.argmax(1)[order].numpy())
    np.testing.assert_array_equal(found.top_classes, probabilities.topk(2).indices[order].numpy())
    assert extractor.classes == ("dog", "cat", "cow") and extractor.describe()["config"] == "INPUT: ..."


def test_at_least_so_many_and_at_most(stand_in, picture):
    def count(**settings):
        return len(detectron2_detector.load(stand_in, RegionSettings(**settings), "cpu")(picture).scores)

    assert count(score_threshold=0.99) == 1
    assert count(score_threshold=0.99, min_regions=3) == 3
    assert count(score_threshold=0.0, max_regions=2) == 2


@pytest.mark.parametrize(
    ("word", "said"),
    [("model.yaml", "expected CONFIG.yaml:CHECKPOINT"), ("model.txt:{path}", "could not be read as a configuration"),
     ("model.yaml:{path}x", "could not be read as a checkpoint")],
)
def test_wrong_words_are_clear_errors(stand_in, word, said):
    path = stand_in.partition(":")[2]
    with pytest.raises(UserError, match=said):
        detectron2_detector.load(word.format(path=path), RegionSettings(), "cpu")


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """detectron2's own C4 network, narrow, with random weights: its configuration, the model, both files."""
    config_module = pytest.importorskip("detectron2.config")
    from detectron2.modeling import build_model

    config = config_module.get_cfg()
    config.merge_from_list([
        "MODEL.DEVICE", "cpu", "MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16,
        "MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.ROI_HEADS.NUM_CLASSES", 3, "MODEL.RPN.POST_NMS_TOPK_TEST", 60,
        "MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "INPUT.MIN_SIZE_TEST", 160, "INPUT.MAX_SIZE_TEST", 400])
    torch.manual_seed(0)
    model = build_model(config).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith(("norm.weight", "running_var")):
            tensor.uniform_(0.2, 0.8)
        elif name.endswith(("cls_score.weight", "bbox_pred.weight")):
            tensor.normal_(0, 0.02)
    folder = tmp_path_factory.mktemp("detectron2")
    (folder / "model.yaml").write_text(config.dump())
    with (folder / "model.pkl").open("wb") as file:
        pickle.dump({"model": {name: one.numpy() for name, one in model.state_dict().items()}}, file)
    (folder / "model.classes.txt").write_text(NAMES)
    return config, model, folder / "model.yaml", folder / "model.pkl"


@torch.inference_mode()
def test_bottom_up_is_detectron2_bit_for_bit(real, picture):
    _, model, _, checkpoint = real
    extractor = bottom_up.load(f"{checkpoint},proposals=60,short_side=160,long_side=400", RegionSettings(), "cpu")
    pixels, scale = prepare(picture, extractor.network.how)
    found = extractor.network(pixels, min(scale))
    images = SimpleNamespace(tensor=pixels, image_sizes=[tuple(pixels.shape[-2:])])
    maps = model.backbone(pixels)
    proposals, _ = model.proposal_generator(images, maps, None)
    pooled = model.roi_heads._shared_roi_transform([maps["res4"]], [proposals[0].proposal_boxes])
    predictions = model.roi_heads.box_predictor(pooled.mean(dim=(2, 3)))
    assert len(found.boxes) == 60
    assert torch.equal(found.boxes, proposals[0].proposal_boxes.tensor)
    assert torch.equal(found.features, pooled.mean(dim=(2, 3)))
    assert torch.equal(found.scores, model.roi_heads.box_predictor.predict_probs(predictions, proposals)[0][:, :-1])


@torch.inference_mode()
def test_the_backend_is_detectron2_called_directly(real, picture):
    config, model, yaml, checkpoint = real
    settings = RegionSettings(max_regions=20, score_threshold=0.3)
    found = detectron2_detector.load(f"{yaml}:{checkpoint}", settings, "cpu")(picture)
    from detectron2.data.transforms import ResizeShortestEdge

    pixels = np.asarray(picture)[:, :, ::-1]
    resized = ResizeShortestEdge([160, 160], 400).get_transform(pixels).apply_image(pixels)
    model.roi_heads.box_predictor.test_score_thresh = 0.3
    model.roi_heads.box_predictor.test_topk_per_image = 20
    image = torch.from_numpy(resized.transpose(2, 0, 1).astype(np.float32))
    (direct,) = model([{"image": image, "height": picture.height, "width": picture.width}])
    direct = direct["instances"]
    assert len(direct.scores)
    np.testing.assert_array_equal(found.scores, direct.scores.numpy())
    np.testing.assert_array_equal(found.classes, direct.pred_classes.numpy())
    size = np.array([picture.width, picture.height] * 2, np.float32)
    np.testing.assert_allclose(found.boxes, direct.pred_boxes.tensor.numpy() / size, atol=1e-6)
