"""Each convention of bottom-up attention's network against a reference written out by hand, in numpy or plain loops.

The same conventions were compared with their publishers' own code, bit for bit (docs/regions.md). Random weights.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from feature_extract.bottom_up import boxes
from feature_extract.bottom_up.conventions import OF_KIND, Conventions
from feature_extract.bottom_up.network import C4, Bottleneck, PreactivatedBottleneck, Stem
from feature_extract.bottom_up.pictures import prepare

CAFFE, DETECTRON2 = OF_KIND["caffe"], OF_KIND["detectron2"]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def randomise(module, seed=0):
    """Weights of a size that lets numbers through, statistics that are not the identity."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if name.endswith(("norm.weight", "running_var")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif name != "anchors":
            few = name.startswith(("rpn.anchor_deltas", "cls_score", "bbox_pred"))
            tensor.normal_(0, 0.002 if few else 0.3, generator=generator)
    return module.eval()


def random_boxes(rng, count, width=100, height=80):
    corners = rng.uniform(0, [width, height, width, height], (count, 4))
    return np.concatenate([np.minimum(corners[:, :2], corners[:, 2:]), np.maximum(corners[:, :2], corners[:, 2:])], 1)


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_blue_green_red_less_their_means():
    pixels, _ = prepare(Image.new("RGB", (40, 30), (10, 20, 30)), CAFFE)
    np.testing.assert_allclose(pixels[0, :, 5, 7].numpy(), [30 - 102.9801, 20 - 115.9465, 10 - 122.7717], rtol=1e-6)
    pixels, _ = prepare(Image.new("RGB", (40, 30), (10, 20, 30)), replace(DETECTRON2, deviations=(2.0, 4.0, 8.0)))
    np.testing.assert_allclose(pixels[0, :, 5, 7].numpy(), [(30 - 103.53) / 2, (20 - 116.28) / 4, (10 - 123.675) / 8],
                               rtol=1e-6)


@pytest.mark.parametrize(
    ("size", "opencv", "pillow"),
    [((640, 480), (600, 800), (600, 800)),
     ((480, 640), (800, 600), (800, 600)),
     ((1000, 300), (300, 1000), (300, 1000)),  # the longer side rules
     ((333, 400), (721, 600), (721, 600)),
     ((1600, 1201), (600, 799), (600, 799)),
     ((2000, 1001), (500, 1000), (501, 1000)),  # 500.5 rounds to even, and up
     ((1201, 1200), (600, 600), (600, 601)),
     ((400, 240), (600, 1000), (600, 1000))],
)
def test_sizes_and_their_rounding(size, opencv, pillow):
    picture = Image.new("RGB", size)
    assert prepare(picture, CAFFE)[0].shape[2:] == opencv
    assert prepare(picture, DETECTRON2)[0].shape[2:] == pillow


@pytest.mark.parametrize("size", [(37, 53), (90, 60), (1300, 700)])
def test_resizing_as_opencv_does(size, rng):
    how = replace(CAFFE, short_side=45, long_side=61)
    rgb = rng.integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    pixels, (scale, _) = prepare(Image.fromarray(rgb), how)
    source = rgb[:, :, ::-1] - np.array(how.means)
    for y, x in ((0, 0), (3, 11), (20, 30), (pixels.shape[2] - 1, pixels.shape[3] - 1)):
        row = min(max((y + 0.5) / scale - 0.5, 0), size[1] - 1)
        column = min(max((x + 0.5) / scale - 0.5, 0), size[0] - 1)
        np.testing.assert_allclose(pixels[0, :, y, x].numpy(), bilinear(source, row, column), atol=1e-3)


def test_resizing_as_pillow_does(rng):
    picture = Image.fromarray(rng.integers(256, size=(70, 130, 3), dtype=np.uint8))
    pixels, scales = prepare(picture, replace(DETECTRON2, short_side=33, long_side=100))
    resized = np.asarray(picture.resize((61, 33), Image.Resampling.BILINEAR))[:, :, ::-1].astype(np.float32)
    np.testing.assert_array_equal(pixels[0].permute(1, 2, 0).numpy(), resized - np.float32(DETECTRON2.means))
    assert scales == (61 / 130, 33 / 70)


def bilinear(values, row, column):
    """Four neighbours of a place in (H, W, ...), weighted."""
    y, x = int(row), int(column)
    down, right = min(y + 1, values.shape[0] - 1), min(x + 1, values.shape[1] - 1)
    above = values[y, x] * (1 - (column - x)) + values[y, right] * (column - x)
    below = values[down, x] * (1 - (column - x)) + values[down, right] * (column - x)
    return above * (1 - (row - y)) + below * (row - y)


# --- convolutions -----------------------------------------------------------------------------------------------------


def folded(x, convolution, stride, padding=0, dilation=1, epsilon=1e-5):
    """A convolution and its norm as one convolution, in float64."""
    norm = convolution.norm
    scale = norm.weight.double() / (norm.running_var.double() + epsilon).sqrt()
    weight = convolution.weight.double() * scale[:, None, None, None]
    bias = norm.bias.double() - norm.running_mean.double() * scale
    return functional.conv2d(x, weight, bias, stride, padding, dilation)


@torch.inference_mode()
@pytest.mark.parametrize("in_1x1", [True, False])
@pytest.mark.parametrize(("stride", "dilation"), [(2, 1), (1, 2)])
def test_stride_lies_in_the_first_or_the_middle_convolution(in_1x1, stride, dilation):
    block = randomise(Bottleneck(6, 4, 10, stride, dilation, replace(CAFFE, stride_in_1x1=in_1x1)))
    x = torch.randn(1, 6, 9, 11, generator=torch.Generator().manual_seed(1))
    first, middle = (stride, 1) if in_1x1 else (1, stride)
    inner = folded(x.double(), block.conv1, first).relu()
    inner = folded(inner, block.conv2, middle, dilation, dilation).relu()
    expected = (folded(inner, block.conv3, 1) + folded(x.double(), block.shortcut, stride)).relu()
    np.testing.assert_allclose(block(x), expected, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("normed", [True, False])
def test_norms_before_convolutions(normed):
    how = OF_KIND["preactivated"]
    block = randomise(PreactivatedBottleneck(6, 4, 10, 2, 1, how, normed))
    x = torch.randn(1, 6, 9, 11, generator=torch.Generator().manual_seed(1)).double()

    def before(x, norm):
        return functional.batch_norm(x, norm.running_mean.double(), norm.running_var.double(), norm.weight.double(),
                                     norm.bias.double(), eps=2e-5).relu()

    seen = x if normed else before(x, block.norm)
    inner = functional.conv2d(seen, block.conv1.weight.double())
    inner = functional.conv2d(before(inner, block.conv2.norm), block.conv2.weight.double(), stride=2, padding=1)
    inner = functional.conv2d(before(inner, block.conv3.norm), block.conv3.weight.double())
    expected = inner + functional.conv2d(seen, block.shortcut.weight.double(), stride=2)
    np.testing.assert_allclose(block(x.float()), expected, atol=1e-5)


@torch.inference_mode()
def test_the_stems_maximum_rounds_up_or_pads():
    pixels = torch.randn(1, 3, 37, 52, generator=torch.Generator().manual_seed(1))
    for padded in (False, True):
        stem = randomise(Stem(4, False, replace(CAFFE, stem_padding=padded)))
        before = folded(pixels.double(), stem.conv1, 2, 3).relu()[0].numpy()
        out = stem(pixels)[0].numpy()
        assert out.shape[1:] == ((10, 13) if padded else (9, 13))
        for y, x in ((0, 0), (4, 7), (8, 12)):
            top, left = 2 * y - padded, 2 * x - padded
            window = before[:, max(top, 0):top + 3, max(left, 0):left + 3]
            np.testing.assert_allclose(out[:, y, x], window.max(axis=(1, 2)), atol=1e-5)


# --- boxes ------------------------------------------------------------------------------------------------------------


def test_py_faster_rcnns_anchors():
    anchors = boxes.cell_anchors(CAFFE)
    assert anchors.shape == (12, 4)
    np.testing.assert_array_equal(anchors[[1, 2, 3, 5, 6, 9, 10]], [
        [-84, -40, 99, 55], [-176, -88, 191, 103], [-360, -184, 375, 199], [-56, -56, 71, 71], [-120, -120, 135, 135],
        [-36, -80, 51, 95], [-80, -168, 95, 183]])


def test_centred_anchors_size_by_size():
    anchors = boxes.cell_anchors(DETECTRON2).numpy()
    assert anchors.shape == (15, 4)
    for number, (size, ratio) in enumerate((size, ratio) for size in (32, 64, 128, 256, 512) for ratio in (0.5, 1, 2)):
        width, height = anchors[number, 2:] - anchors[number, :2]
        np.testing.assert_allclose([width * height, height / width], [size**2, ratio], rtol=1e-5)
        np.testing.assert_allclose(anchors[number, :2], -anchors[number, 2:])


def test_anchors_of_a_map_row_by_row():
    cell = boxes.cell_anchors(CAFFE)
    expected = [anchor + torch.tensor([x, y, x, y]) * 16.0 for y in range(3) for x in range(4) for anchor in cell]
    np.testing.assert_array_equal(boxes.grid_anchors(cell, 3, 4), torch.stack(expected))


@pytest.mark.parametrize("inclusive", [True, False])
def test_decoding_with_weights_and_a_limit(inclusive, rng):
    before, changes = random_boxes(rng, 50), rng.normal(0, 1, (50, 4))
    changes[0, 2:] = 99
    expected = []
    for (x1, y1, x2, y2), (dx, dy, dw, dh) in zip(before, changes, strict=True):
        width, height = x2 - x1 + inclusive, y2 - y1 + inclusive
        x, y = x1 + width / 2 + dx / 10 * width, y1 + height / 2 + dy / 10 * height
        width *= min(math.exp(dw / 5), 62.5)
        height *= min(math.exp(dh / 5), 62.5)
        expected.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    decoded = boxes.decode(torch.tensor(changes), torch.tensor(before), (10, 10, 5, 5), inclusive)
    np.testing.assert_allclose(decoded, expected, rtol=1e-6)


def overlaps(one, other, inclusive):
    """Intersection over union, a loop's way."""
    def area(x1, y1, x2, y2):
        return max(x2 - x1 + inclusive, 0) * max(y2 - y1 + inclusive, 0)

    common = area(*np.maximum(one[:2], other[:2]), *np.minimum(one[2:], other[2:]))
    return common / (area(*one) + area(*other) - common)


def greedy(candidates, scores, most, inclusive):
    """Suppression as it is told: the best box, then the next that overlaps none kept by more than `most`."""
    kept = []
    for number in np.argsort(-scores, kind="stable"):
        if all(overlaps(candidates[number], candidates[other], inclusive) <= most for other in kept):
            kept.append(number)
    return kept


@pytest.mark.parametrize("how", [CAFFE, DETECTRON2], ids=["caffe", "detectron2"])
def test_proposals_are_cut_sifted_ordered_and_suppressed(how, rng):
    how = replace(how, proposals_before=40, proposals=12, proposal_overlap=0.3)
    size, scale, inclusive = (80, 100), 0.6, how.inclusive
    anchors = random_boxes(rng, 90, 130, 110) - 15
    changes, objectness = rng.normal(0, 0.3, (90, 4)), rng.normal(size=90)
    decoded = boxes.decode(torch.tensor(changes), torch.tensor(anchors), (1, 1, 1, 1), inclusive).numpy()
    edges = np.array([100, 80, 100, 80]) - inclusive
    cut = np.clip(decoded, 0, edges)
    sides = cut[:, 2:] - cut[:, :2]
    large = (sides > 0).all(1) & (sides + inclusive > (16 * scale if inclusive else 0)).all(1)
    order = np.argsort(-objectness, kind="stable")
    order = order[large[order]][:40] if inclusive else order[:40][large[order[:40]]]
    expected = cut[order][greedy(cut[order], objectness[order], 0.3, inclusive)][:12]
    found = boxes.propose(torch.tensor(objectness), torch.tensor(changes), torch.tensor(anchors), size, scale, how)
    assert len(expected) > 3 and not large.all()
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_confidence_is_the_best_score_that_survives_in_its_class(rng):
    candidates = np.repeat(random_boxes(rng, 8), 5, axis=0) + rng.normal(size=(40, 4))
    scores = rng.dirichlet(np.full(30, 0.05), 8).repeat(5, axis=0) * rng.uniform(0.5, 1, (40, 1))
    expected = np.zeros(40)
    for column in range(30):
        kept = greedy(candidates, scores[:, column], 0.3, True)
        expected[kept] = np.maximum(expected[kept], scores[kept, column])
    for most in (3, 10, 40, 100):
        confidence, classes = boxes.strongest(torch.tensor(candidates), torch.tensor(scores), most, CAFFE)
        best = np.argsort(-expected, kind="stable")[:most]
        np.testing.assert_array_equal(np.sort(confidence)[::-1][:most], expected[best])
        alive = best[expected[best] > 0]
        np.testing.assert_array_equal(scores[alive, classes[alive]], expected[alive])
    assert (expected < scores.max(axis=1)).any()  # suppression did something


def test_no_proposals_have_no_confidence():
    confidence, classes = boxes.strongest(torch.zeros(0, 4), torch.zeros(0, 5), 10, Conventions())
    assert confidence.shape == classes.shape == (0,)


# --- regions of the map -----------------------------------------------------------------------------------------------


def shapes(classes=6, attributes=5):
    """A narrow C4's shapes by short names."""
    found = {"stem.conv1.weight": (4, 3, 7, 7)}
    width = 4
    for stage, inner in (("res2", 2), ("res3", 4), ("res4", 6), ("res5", 8)):
        found |= {f"{stage}.0.conv1.weight": (inner, width, 1, 1), f"{stage}.0.conv2.weight": (inner, inner, 3, 3),
                  f"{stage}.0.conv3.weight": (inner * 4, inner, 1, 1)}
        width = inner * 4
    found |= {"rpn.conv.weight": (8, 24, 3, 3), "rpn.objectness_logits.weight": (24, 8, 1, 1),
              "rpn.anchor_deltas.weight": (48, 8, 1, 1), "cls_score.weight": (classes, 32),
              "bbox_pred.weight": (classes * 4, 32), "attributes.obj_embed.weight": (classes, 3),
              "attributes.fc.weight": (7, 35), "attributes.score.weight": (attributes, 7)}
    return {name: torch.Size(shape) for name, shape in found.items()}


@torch.inference_mode()
def test_aligned_pooling_samples_half_a_cell_further_up_and_left(rng):
    network = randomise(C4(shapes(), replace(CAFFE, pooling="align", pooling_samples=2)))
    network.res5 = torch.nn.Identity()
    values = rng.normal(size=(9, 12, 3)).astype(np.float32)
    x1, y1, x2, y2 = box = (19.0, 30.0, 140.0, 111.0)
    samples = []
    for row in range(14):
        for column in range(14):
            for part_y in (0.25, 0.75):
                for part_x in (0.25, 0.75):
                    y = y1 / 16 - 0.5 + (row + part_y) * (y2 - y1) / 16 / 14
                    x = x1 / 16 - 0.5 + (column + part_x) * (x2 - x1) / 16 / 14
                    samples.append(bilinear(values, max(y, 0), max(x, 0)))
    pooled = network.features(torch.tensor(values).permute(2, 0, 1)[None], torch.tensor([box]))
    np.testing.assert_allclose(pooled[0], np.mean(samples, axis=0), atol=1e-5)


@torch.inference_mode()
def test_maximum_pooling_on_whole_cells(rng):
    network = randomise(C4(shapes(), CAFFE))
    network.res5 = torch.nn.Identity()
    values = rng.normal(size=(3, 30, 40)).astype(np.float32)
    x1, y1, x2, y2 = box = (23.0, 40.0, 600.0, 333.0)
    left, top, right, bottom = (math.floor(side / 16 + 0.5) for side in (x1, y1, x2, y2))
    width, height = (right - left + 1) / 14, (bottom - top + 1) / 14
    cells = [values[:, math.floor(row * height) + top:math.ceil((row + 1) * height) + top,
                    math.floor(column * width) + left:math.ceil((column + 1) * width) + left].max(axis=(1, 2))
             for row in range(14) for column in range(14)]
    pooled = network.features(torch.tensor(values)[None], torch.tensor([box]))
    np.testing.assert_allclose(pooled[0], np.mean(cells, axis=0), atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize(("dilated", "cells"), [(True, 14), (False, 7)])
def test_stage_5_keeps_14_cells_or_halves_them(dilated, cells):
    network = randomise(C4(shapes(), replace(CAFFE, res5_dilated=dilated)))
    seen = {}
    network.res5.register_forward_hook(lambda *call: seen.update(pooled=call[1][0], out=call[2]))
    x = torch.randn(1, 24, 9, 12, generator=torch.Generator().manual_seed(0))
    features = network.features(x, torch.tensor([[0.0, 0, 100, 90], [20, 10, 180, 140]]))
    assert seen["pooled"].shape == (2, 24, 14, 14) and seen["out"].shape == (2, 32, cells, cells)
    np.testing.assert_allclose(features, seen["out"].numpy().mean(axis=(2, 3)), atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("where", ["first", "last", "none"])
def test_attributes_of_a_feature_and_its_best_class(where, rng):
    """The class is the best with the background among them, in the checkpoint's own order."""
    network = randomise(C4(shapes(), replace(CAFFE, attribute_background=where, short_side=160)))
    network.attributes.obj_embed.weight.mul_(30)  # the class tells, and the softmax does not saturate
    network.attributes.fc.weight.mul_(0.03)
    picture = Image.fromarray(rng.integers(256, size=(80, 120, 3), dtype=np.uint8))
    pixels, scale = prepare(picture, network.how)
    found = network(pixels, scale[0])
    head, features = network.attributes, found.features.numpy()
    best = (features @ network.cls_score.weight.numpy().T + network.cls_score.bias.numpy()).argmax(1)
    both = np.concatenate([features, head.obj_embed.weight.numpy()[best]], axis=1)
    hidden = np.maximum(both @ head.fc.weight.numpy().T + head.fc.bias.numpy(), 0)
    logits = hidden @ head.score.weight.numpy().T + head.score.bias.numpy()
    logits = logits[:, :-1] if where == "last" else logits
    expected = np.exp(logits - logits.max(1, keepdims=True))
    expected /= expected.sum(1, keepdims=True)
    np.testing.assert_allclose(found.attributes, expected[:, 1:] if where == "first" else expected, atol=1e-5)
    assert len(features) > 3


@torch.inference_mode()
def test_changed_boxes_are_those_of_the_best_class(rng):
    how = replace(OF_KIND["caffe"], boxes="regressed", short_side=160)
    network = randomise(C4(shapes(), how))
    picture = Image.fromarray(rng.integers(256, size=(80, 120, 3), dtype=np.uint8))
    pixels, scale = prepare(picture, how)
    found = network(pixels, scale[0])
    network.how = replace(how, boxes="proposals")
    proposals = network(pixels, scale[0]).boxes
    changes = network.bbox_pred(found.features).unflatten(1, (6, 4))[:, 1:]  # the background is first
    changes = torch.stack([row[column] for row, column in zip(changes, found.scores.argmax(1), strict=True)])
    moved = boxes.decode(changes, proposals, (1, 1, 1, 1), True)
    np.testing.assert_array_equal(found.boxes, moved.clamp(min=0).minimum(torch.tensor([239.0, 159, 239, 159])))


@torch.inference_mode()
def test_caffes_objectness_is_the_second_half_of_two():
    network = randomise(C4(shapes(), CAFFE))
    x = torch.randn(1, 24, 2, 3, generator=torch.Generator().manual_seed(0))
    hidden = network.rpn.conv(x).relu()
    logits, changes = network.rpn.objectness_logits(hidden)[0], network.rpn.anchor_deltas(hidden)[0]
    objectness, found = network.rpn(x)
    for number in (0, 13, 71):
        row, column, anchor = number // 36, number // 12 % 3, number % 12
        two = logits[[anchor, anchor + 12], row, column].softmax(0)
        assert objectness[number] == pytest.approx(float(two[1]), abs=1e-6)
        np.testing.assert_array_equal(found[number], changes[anchor * 4:anchor * 4 + 4, row, column])
