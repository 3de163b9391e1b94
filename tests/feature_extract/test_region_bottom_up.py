"""Bottom-up attention from a checkpoint file to regions. Narrow networks of random weights, written as each publisher
names and pickles them; what the network computes is in test_region_conventions.py."""

import json
import pickle
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from feature_extract.audio import AudioSettings
from feature_extract.backends import bottom_up
from feature_extract.bottom_up.boxes import cell_anchors, suppress
from feature_extract.bottom_up.conventions import OF_KIND
from feature_extract.bottom_up.network import C4
from feature_extract.bottom_up.pictures import prepare
from feature_extract.extractors import open_extractors, reopen
from feature_extract.regions import BEST_ATTRIBUTES, RegionSettings
from opt.config import UserError

CLASSES, ATTRIBUTES = 9, 7
SMALL = "short_side=160,long_side=260,proposals=40"


def picture(seed=0, size=(220, 160)):
    coarse = np.random.default_rng(seed).integers(256, size=(8, 11, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def shapes(kind, blocks=(1, 1, 2, 2), width=4, classes=CLASSES, attributes=ATTRIBUTES):
    """A C4's shapes as the publisher of a kind names them. width: of res2's inner convolutions; 64 in a real one."""
    caffe, preactivated = kind in ("caffe", "preactivated"), kind == "preactivated"
    found, before = {"backbone.stem.conv1.weight": (width, 3, 7, 7), "backbone.stem.conv1.norm.weight": (width,)}, width
    if preactivated:
        found |= {"backbone.stem.norm.weight": (3,), "roi_heads.res5_bn.weight": (width * 32,)}
    for number, count in enumerate(blocks):
        inner = width * 2**number
        for block in range(count):
            name = f"{'roi_heads' if number == 3 else 'backbone'}.res{number + 2}.{block}"
            sizes = {"conv1": (inner, before, 1, 1), "conv2": (inner, inner, 3, 3), "conv3": (inner * 4, inner, 1, 1)}
            if before != inner * 4:
                sizes["shortcut"] = (inner * 4, before, 1, 1)
            found |= {f"{name}.{part}.weight": size for part, size in sizes.items()}
            if preactivated:
                found |= {f"{name}.norm.weight": (before,), f"{name}.conv2.norm.weight": (inner,),
                          f"{name}.conv3.norm.weight": (inner,)}
            else:
                found |= {f"{name}.{part}.norm.weight": size[:1] for part, size in sizes.items()}
            before = inner * 4
    for name in [name for name in found if name.endswith(("norm.weight", "bn.weight"))]:
        found |= {name.replace("weight", other): found[name] for other in ("bias", "running_mean", "running_var")}
    anchors, hidden = (15, before // 2) if kind == "detectron2" else (12, before // 4)
    head, box = "proposal_generator.rpn_head", "roi_heads.box_predictor"
    embedding, inner, score = {
        "converted": (f"{box}.cls_embedding", f"{box}.fc_attr", f"{box}.attr_score"),
        "detectron2": tuple(f"roi_heads.attribute_predictor.{name}" for name in ("obj_embed", "fc.0", "attr_score")),
    }.get(kind, (f"{box}.cls_embed", f"{box}.attr_linear1", f"{box}.attr_linear2"))
    layers = {
        f"{head}.conv": (hidden, before // 2, 3, 3), f"{head}.anchor_deltas": (anchors * 4, hidden, 1, 1),
        f"{head}.objectness_logits": (anchors * (1 + caffe), hidden, 1, 1),
        f"{box}.cls_score": (classes + 1, before), f"{box}.bbox_pred": ((classes + caffe) * 4, before),
        inner: (width * 8, before + width * 4), score: (attributes + (kind != "detectron2"), width * 8),
    }
    found |= {f"{name}.weight": size for name, size in layers.items()}
    found |= {f"{name}.bias": size[:1] for name, size in layers.items()}
    return found | {f"{embedding}.weight": (classes + 1, width * 4)}


def random_state(kind, **sizes):
    """Random weights of those shapes that neither explode nor saturate."""
    rng, state = np.random.default_rng(1), {}
    for name, size in shapes(kind, **sizes).items():
        if name.endswith(("norm.weight", "bn.weight", "running_var")):
            state[name] = rng.uniform(0.3, 0.6, size)
        else:
            few = 0.01 if any(part in name for part in ("rpn_head.anchor", "rpn_head.obj", "bbox_pred")) else 1
            state[name] = rng.normal(0, few / np.sqrt(np.prod(size[1:])) if len(size) > 1 else 0.1, size)
    return {name: array.astype(np.float32) for name, array in state.items()}


def save(folder, kind, suffix=".pkl", **more):
    """A checkpoint with names of its classes and attributes beside it."""
    state, path = {**random_state(kind), **more}, folder / f"{kind}{suffix}"
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps({"model": state, "__author__": "random"}))
    elif suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"model": tensors, "iteration": 3}, path)
    path.with_suffix(".classes.txt").write_text("".join(f"class {n},other name\n" for n in range(CLASSES)))
    path.with_suffix(".attributes.txt").write_text("".join(f"attribute {n}\n" for n in range(ATTRIBUTES)))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bottom_up")
    return {kind: save(folder, kind) for kind in OF_KIND}


def load(path, words=SMALL, **settings):
    return bottom_up.load(f"{path},{words}" if words else str(path), RegionSettings(**settings), "cpu")


def assert_same(one, other):
    for name in ("features", "boxes", "classes", "scores", "attributes", "attribute_scores"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("kind", OF_KIND)
def test_each_kind_is_known_by_its_shapes(files, kind):
    expected = OF_KIND[kind]
    if kind == "detectron2":  # whose attribute head came with two samples
        expected = replace(expected, pooling_samples=2)
    assert load(files[kind], "").network.how == expected


@pytest.mark.parametrize("kind", OF_KIND)
def test_regions_keep_the_contract(files, kind):
    extractor = load(files[kind], min_regions=12, max_regions=20, top_classes=3)
    found = extractor(picture())
    count = len(found.scores)
    assert 12 <= count <= 20 and found.features.shape == (count, 128) and found.features.dtype == np.float16
    assert found.boxes.dtype == np.float32 and found.boxes.min() >= 0 and found.boxes.max() <= 1
    assert (found.boxes[:, 2:] > found.boxes[:, :2]).all() and (np.diff(found.scores) <= 0).all()
    assert found.classes.dtype == np.int16 and 0 <= found.classes.min() <= found.classes.max() < CLASSES
    assert found.top_classes.shape == found.top_scores.shape == (count, 3)
    assert (np.diff(found.top_scores.astype(np.float32), axis=1) <= 0).all()
    assert found.attributes.shape == found.attribute_scores.shape == (count, BEST_ATTRIBUTES)
    assert found.attributes.dtype == np.int16 and found.attribute_scores.dtype == np.float16
    assert 0 <= found.attributes.min() <= found.attributes.max() < ATTRIBUTES
    assert extractor.classes[3] == "class 3" and extractor.attributes[6] == "attribute 6"


@pytest.mark.parametrize("kind", ["caffe", "detectron2"])
@pytest.mark.parametrize(("least", "most", "threshold"), [(10, 25, 0.13), (18, 18, 0.2), (1, 40, 0.12), (0, 40, 0.99)])
@torch.inference_mode()
def test_the_choice_is_bottom_up_attentions(files, kind, least, most, threshold):
    """As generate_tsv.py chooses: each box's best score among classes in which it survives; so many of the best."""
    extractor = load(files[kind], min_regions=least, max_regions=most, score_threshold=threshold)
    seen = picture(size=(311, 103))
    pixels, scale = prepare(seen, extractor.network.how)
    every = extractor.network(pixels, min(scale))
    candidates = every.boxes / torch.tensor([*scale, *scale])
    confidence = np.zeros(len(candidates), np.float32)
    for column in range(CLASSES):
        kept = suppress(candidates, every.scores[:, column], 0.3, kind == "caffe").numpy()
        confidence[kept] = np.maximum(confidence[kept], every.scores[kept, column].numpy())
    rows = np.where(confidence >= threshold)[0]
    if len(rows) < least:
        rows = np.argsort(-confidence, kind="stable")[:least]
    elif len(rows) > most:
        rows = np.argsort(-confidence, kind="stable")[:most]
    rows = rows[np.argsort(-confidence[rows], kind="stable")]
    found = extractor(seen)
    np.testing.assert_array_equal(found.scores, confidence[rows])
    np.testing.assert_array_equal(found.features, every.features[rows].numpy().astype(np.float16))
    size = np.array([*seen.size, *seen.size], np.float32)
    np.testing.assert_array_equal(found.boxes, np.clip(candidates[rows].numpy() / size, 0, 1))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_formats_are_one_network(files, tmp_path, suffix):
    first, other = load(files["converted"]), load(save(tmp_path, "converted", suffix))
    assert first.describe()["weights_sha256"] == other.describe()["weights_sha256"]
    assert_same(first(picture()), other(picture()))


def test_a_picture_is_the_same_alone_among_others_and_again(files):
    extractor = load(files["caffe"], min_regions=20)
    first = extractor(picture())
    extractor(picture(1, (90, 200)))
    assert_same(first, extractor(picture()))
    assert_same(first, load(files["caffe"], min_regions=20)(picture()))


def test_anchors_means_and_deviations_that_the_file_holds(tmp_path):
    anchors = cell_anchors(OF_KIND["caffe"]).numpy() + 3
    path = save(tmp_path, "caffe", pixel_mean=np.array([[[1]], [[2]], [[3]]], np.float32),
                pixel_std=np.array([4, 5, 6], np.float32),
                **{"proposal_generator.anchor_generator.cell_anchors.0": anchors})
    network = load(path).network
    np.testing.assert_array_equal(network.anchors, anchors)
    assert network.how.means == (1, 2, 3) and network.how.deviations == (4, 5, 6)


def test_norms_without_statistics_are_scale_and_shift(files, tmp_path):
    state = random_state("converted")
    path = tmp_path / "folded.pkl"
    path.write_bytes(pickle.dumps({"model": {name: one for name, one in state.items() if "running" not in name}}))
    for name in ("classes", "attributes"):
        path.with_suffix(f".{name}.txt").write_text(files["converted"].with_suffix(f".{name}.txt").read_text())
    norm = load(path).network.stem.conv1.norm
    assert set(norm.running_mean.tolist()) == {0} and set(norm.running_var.tolist()) == {1}


def test_conventions_given_with_the_file_change_features_and_are_recorded(files):
    first = load(files["caffe"], min_regions=20)
    other = load(files["caffe"], f"{SMALL},stride_in_1x1=false,pooling=align,means=[0,0,0]", min_regions=20)
    about = other.describe()
    assert about["conventions"]["stride_in_1x1"] is False and about["conventions"]["means"] == [0, 0, 0]
    assert about["conventions"]["pooling"] == "align" and json.loads(json.dumps(about)) == about
    assert about["weights"].endswith("means=[0,0,0]") and about["settings"]["min_regions"] == 20
    assert not np.array_equal(first(picture()).features, other(picture()).features)


def test_extractors_are_rebuilt_from_their_description(files):
    settings = RegionSettings(max_regions=30, min_regions=20, top_classes=2)
    first = open_extractors(f"bottom_up:{files['caffe']},{SMALL}", "none", "none", settings, AudioSettings(), "cpu")
    again = reopen(first.describe(), "cpu")
    assert again.describe() == first.describe()
    assert_same(first.regions(picture()), again.regions(picture()))


def test_vocabularies_beside_the_file(files, tmp_path):
    path = tmp_path / "model.pkl"
    path.write_bytes(files["detectron2"].read_bytes())
    with pytest.raises(UserError, match=r"9 classes without names: .*model.classes.txt, or .*objects_vocab.txt"):
        load(path)
    (tmp_path / "objects_vocab.txt").write_text("\n".join("abcdefghi"))
    with pytest.raises(UserError, match=r"7 attributes without names: .*attributes_vocab.txt"):
        load(path)
    (tmp_path / "attributes_vocab.txt").write_text("gray,grey\n" * 6)
    with pytest.raises(UserError, match="has 7 attributes and .* has 6 names"):
        load(path)
    (tmp_path / "attributes_vocab.txt").write_text("gray,grey\n" * 7)
    assert load(path).classes == tuple("abcdefghi") and load(path).attributes == ("gray",) * 7


def test_without_an_attribute_head(tmp_path):
    state = {name: one for name, one in random_state("converted").items() if "attr" not in name and "embed" not in name}
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(state))
    path.with_suffix(".classes.txt").write_text("\n".join("abcdefghi"))
    extractor = load(path)
    assert extractor.attributes == () and extractor(picture()).attributes is None


@pytest.mark.parametrize(
    ("words", "said"),
    [("stride=2", "unknown key 'stride'"), ("proposals=many", "proposals: expected int"),
     ("pooling=minimum", "expected maximum or align"), ("anchor_sizes=[64]", "it has 12 anchors a cell")],
)
def test_wrong_conventions_are_clear_errors(files, words, said):
    with pytest.raises(UserError, match=said):
        load(files["converted"], words)


def test_other_networks_are_clear_errors(files, tmp_path):
    with pytest.raises(UserError, match="could not be read|not a pickle"):
        load(tmp_path / "missing.pkl")
    state = random_state("caffe")
    wrong = {
        "pyramid": ({"backbone.fpn_lateral2.weight": np.zeros(3, np.float32)}, "holds no"),
        "grouped": ({**state, "backbone.res2.0.conv2.weight": np.zeros((4, 2, 3, 3), np.float32)}, "grouped"),
        "more": ({**state, "backbone.res2.0.conv9.weight": np.zeros(3, np.float32)}, r"does not fit .*conv9"),
        "less": ({name: one for name, one in state.items() if "res4.1.conv2" not in name}, r"does not fit .*conv2"),
    }
    for name, (content, said) in wrong.items():
        path = tmp_path / f"{name}.pkl"
        path.write_bytes(pickle.dumps({"model": content}))
        with pytest.raises(UserError, match=said):
            load(path)


def test_pictures_too_narrow_to_resize(files):
    with pytest.raises(ValueError, match="4,000 x 10 pixels is too narrow"):
        load(files["caffe"])(picture(size=(4000, 10)))


@pytest.mark.parametrize(("depth", "blocks"), [(101, (3, 4, 23, 3)), (152, (3, 8, 36, 3))])
def test_real_depths_have_the_published_size(depth, blocks):
    """Parameters of torchvision's ResNet of that depth without its classifier, built without memory for them."""
    from torchvision.models import get_model

    names = {name: torch.Size(size) for name, size in shapes("converted", blocks, 64, 1600, 400).items()}
    from opt.weights.detectron2 import _short

    with torch.device("meta"):
        network = C4({_short(name): size for name, size in names.items()}, OF_KIND["converted"])
        reference = get_model(f"resnet{depth}", weights=None)
    stages = [network.stem, network.res2, network.res3, network.res4, network.res5]
    count = sum(tensor.numel() for stage in stages for name, tensor in stage.state_dict().items()
                if name.endswith(("weight", "bias")))
    assert count == sum(one.numel() for one in reference.parameters()) - 2048 * 1000 - 1000
    assert network.cls_score.weight.shape == (1601, 2048) and network.attributes.score.weight.shape == (401, 512)


@pytest.mark.slow
def test_a_real_size_network_from_its_file(tmp_path, capsys):
    """R-101, 1,600 classes, 400 attributes, random weights: reads 260 MB, and says how long a picture takes."""
    path = tmp_path / "model.pkl"
    state = random_state("caffe", blocks=(3, 4, 23, 3), width=64, classes=1600, attributes=400)
    path.write_bytes(pickle.dumps({"model": state}))
    path.with_suffix(".classes.txt").write_text("".join(f"class {n}\n" for n in range(1600)))
    path.with_suffix(".attributes.txt").write_text("".join(f"attribute {n}\n" for n in range(400)))
    extractor = bottom_up.load(str(path), RegionSettings(max_regions=36, min_regions=36), "cpu")
    proposals = []
    extractor.network.res5.register_forward_hook(lambda *call: proposals.append(len(call[2])))
    begin = time.perf_counter()
    found = extractor(picture(size=(640, 480)))
    with capsys.disabled():
        print(f"\nR-101, 640 x 480, one thread: {time.perf_counter() - begin:.1f} s for {sum(proposals)} proposals")
    assert found.features.shape == (36, 2048) and np.isfinite(found.features).all() and sum(proposals) == 300
