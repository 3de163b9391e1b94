"""FID and KID against computations that share no line with them."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm

from eval.pictures import distances, fidelity
from eval.pictures.distances import Moments, frechet_distance, kernel_distance, squared_mmd
from eval.pictures.fidelity import Fidelity
from eval.pictures.gallery import REAL, TRUE_CODES, Seen
from eval.pictures.networks import PictureNetwork, open_networks
from opt.config import UserError


def features(count, width, shift=0.0, seed=0):
    random = np.random.default_rng(seed)
    return (random.normal(size=(count, width)) @ random.normal(size=(width, width)) + shift).astype(np.float32)


def moments(features_ND, batch):
    taken = Moments(features_ND.shape[1])
    for first in range(0, len(features_ND), batch):
        taken.add(features_ND[first : first + batch])
    return taken


def direct_frechet(one, other):
    """As Heusel et al. write it, with a matrix square root of a product that is not symmetric."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    first, second = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    root = sqrtm(first @ second)
    return np.square(one.mean(0) - other.mean(0)).sum() + np.trace(first + second - 2 * np.real(root))


@pytest.mark.parametrize("batch", [1, 7, 200])
def test_moments_are_those_of_all_pictures_at_once(batch):
    some = features(200, 6, shift=1e4)  # where sums of squares lose the covariance in float32
    taken = moments(some, batch)
    assert taken.count == 200 and np.allclose(taken.mean, some.astype(np.float64).mean(0), rtol=1e-14)
    assert np.allclose(taken.covariance(), np.cov(some.astype(np.float64), rowvar=False), rtol=1e-7)
    both = moments(some[:50], 9).joined(moments(some[50:], 200))
    assert np.allclose(both.covariance(), taken.covariance()) and both.count == 200
    with pytest.raises(ValueError, match="two"):
        moments(some[:1], 1).covariance()


def test_the_frechet_distance_is_that_of_a_direct_computation():
    one, other = features(300, 24), features(250, 24, shift=0.3, seed=1)
    assert frechet_distance(moments(one, 64), moments(other, 64)) == pytest.approx(direct_frechet(one, other), rel=1e-9)
    assert frechet_distance(moments(one, 64), moments(one, 300)) == pytest.approx(0, abs=1e-6)


def test_the_frechet_distance_of_gaussians_with_known_covariances():
    # along each axis (m1 - m2)^2 + (s1 - s2)^2
    corners = np.array([[x, y] for x in (-1.0, 1.0) for y in (-1.0, 1.0)]) * np.sqrt(3 / 4)
    one, other = moments(corners * [1, 2], 4), moments(corners * [3, 5] + [4, 0], 4)
    assert frechet_distance(one, other) == pytest.approx(16 + 2**2 + 3**2)


def test_fewer_pictures_than_features_have_a_distance_too():
    one, other = features(20, 48), features(20, 48, shift=0.2, seed=1)
    root = np.sqrt(np.clip(np.linalg.eigvals(np.cov(one, rowvar=False) @ np.cov(other, rowvar=False)).real, 0, None))
    apart = np.square(one.mean(0) - other.mean(0)).sum()
    direct = apart + np.trace(np.cov(one, rowvar=False) + np.cov(other, rowvar=False)) - 2 * root.sum()
    assert frechet_distance(moments(one, 8), moments(other, 8)) == pytest.approx(direct, rel=1e-4)


def direct_mmd(one, other):
    def kernel(x, y):
        return (float(x.astype(np.float64) @ y.astype(np.float64)) / len(x) + 1) ** 3

    def within(some):
        return np.mean([kernel(x, y) for i, x in enumerate(some) for j, y in enumerate(some) if i != j])

    return within(one) + within(other) - 2 * np.mean([kernel(x, y) for x in one for y in other])


def test_the_kernel_distance_is_that_of_a_direct_computation():
    one, other = features(9, 5), features(7, 5, shift=0.5, seed=1)
    assert squared_mmd(one, other) == pytest.approx(direct_mmd(one, other), rel=1e-12)


def test_the_kernel_distance_is_unbiased_and_its_interval_covers():
    random = np.random.default_rng(0)
    found = [kernel_distance(random.normal(size=(60, 4)), random.normal(size=(60, 4)), seed) for seed in range(60)]
    values = np.array([one.value for one in found])
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(60)  # two sets of one distribution: 0, on both sides of it
    covered = np.mean([one.interval[0] <= 0 <= one.interval[1] for one in found])
    assert covered > 0.85 and {one.size for one in found} == {30}


def test_subsets_are_the_papers_where_there_are_enough_pictures(monkeypatch):
    monkeypatch.setattr(distances, "SUBSET_SIZE", 10)
    one, other = features(80, 3), features(90, 3, shift=1.0, seed=1)
    found = kernel_distance(one, other, 0)
    assert found.size == 10 and found.value == pytest.approx(squared_mmd(one, other), rel=0.2)
    assert found.interval[1] - found.value == pytest.approx(1.96 * found.deviation * np.sqrt(10 / 70))
    with pytest.raises(ValueError, match="four"):
        kernel_distance(one[:3], other, 0)


def test_kernel_distances_are_those_of_torch_fidelity():
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    one, other = features(50, 16), features(50, 16, shift=0.2, seed=1)
    settings = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None,
                "kid_kernel_poly_coef0": 1}  # fmt: skip
    assert squared_mmd(one, other) == pytest.approx(kid.kernel_mmd(one.astype(float), other.astype(float), **settings))


def picture(number):
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (90, 64, 3), np.uint8))


def brightness():
    """A network whose features are the means of the three colours and their squares."""
    def run(pixels):
        means = pixels.float().mean((2, 3)) / 255
        return torch.cat([means, means**2], 1)

    return PictureNetwork("bright", 6, "no", "three colours", run)


def looked_at(counts):
    judge = Fidelity(brightness(), seed=0, drawn="greedy decoding")
    for kind, count in counts.items():
        for first in range(0, count, 5):
            seen = [Seen(n, picture(n + len(kind)), None) for n in range(first, min(first + 5, count))]
            judge.look(kind, seen)
    return judge.judged()


def test_fidelity_compares_each_kind_with_the_true_pictures():
    metrics, absent = looked_at({"": 11, TRUE_CODES: 9, REAL: 13})
    found = {metric.name: metric for metric in metrics}
    network = brightness()
    true = network.features([picture(n + len(REAL)) for n in range(13)])
    mine = network.features([picture(n) for n in range(11)])
    fid = found["text_to_image.fid_bright"]
    assert fid.value == pytest.approx(direct_frechet(mine, true), rel=1e-4) and fid.n == 11
    assert (fid.better, fid.unit, fid.protocol) == ("lower", "score", "fid/bright") and fid.interval is None
    assert "11 generated against 13 true pictures" in fid.candidates and "read KID" in fid.note
    assert fid.note.endswith("greedy decoding") and "greedy" not in found["text_to_image.fid_bright_real"].note
    halves = found["text_to_image.fid_bright_real"]
    assert halves.value == pytest.approx(direct_frechet(true[::2], true[1::2]), rel=1e-4) and halves.n == 7
    kid = found["text_to_image.kid_bright"]
    assert kid.value == kernel_distance(mine, true, 0).value and kid.interval and "subsets of 5" in kid.note
    assert len(metrics) == 6 and not absent


def test_many_pictures_need_the_memory_of_few(monkeypatch):
    monkeypatch.setattr(fidelity, "KEPT_FOR_KID", 20)
    monkeypatch.setattr(fidelity, "JOINED", 16)
    kept, some = fidelity.Features(REAL, 3), features(97, 3)
    for first in range(0, 97, 7):
        kept.add(some[first : first + 7])
    assert np.array_equal(np.concatenate(kept.kept), some[:20]) and len(kept.kept) == 3 and kept.count == 97
    for half, mine in zip(kept.halves(), (some[::2], some[1::2]), strict=True):
        assert half.count == len(mine) and np.allclose(half.covariance(), np.cov(mine, rowvar=False))
    assert np.allclose(kept.whole().covariance(), np.cov(some, rowvar=False)) and kept.whole().count == 97


def test_too_few_pictures_have_no_distance_but_a_reason():
    metrics, absent = looked_at({"": 3, REAL: 7})
    assert not metrics and len(absent) == 6 and "too few pictures: 3" in absent["text_to_image.fid_bright"]


def test_the_tiny_network_gives_a_picture_the_same_features_in_any_company():
    network = open_networks(["tiny"])[0]
    together = network.features([picture(n) for n in range(9)])
    assert together.shape == (9, network.width) and np.ptp(together, 0).max() > 0
    assert np.allclose(together[8], network.features([picture(8)])[0], atol=1e-6)
    assert "backbone" in network.about


@pytest.mark.parametrize(
    ("words", "said"),
    [(["nonsense"], "expected tiny or inception:FILE"), (["inception"], "expected tiny or inception:FILE"),
     (["inception:/nowhere/weights.pth"], "no such file"), (["clip:x"], "expected tiny")],
)
def test_networks_that_there_are_not_are_refused(words, said):
    with pytest.raises(UserError, match=said):
        open_networks(words)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """The weights of an Inception that learned nothing, in the layout of the published file."""
    library = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library.torch, "load", lambda *_, **__: {})
        patch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = library.FeatureExtractorInceptionV3("i", ["2048"], feature_extractor_weights_path="none")
    state = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
    for value in state.values():
        if value.ndim == 4:  # usual beginnings fade through fifty layers
            value.normal_(std=(2 / value[0].numel()) ** 0.5)
    torch.save(state, path)
    return path


def test_the_inception_of_a_file_says_which_weights_it_has(inception_file):
    network = open_networks([f"inception:{inception_file}"])[0]
    assert network.name == "inception" and "not the published weights" in network.about
    found = network.features([picture(0), picture(1)])
    assert found.shape == (2, 2048) and np.isfinite(found).all() and not np.allclose(found[0], found[1], rtol=0.1)


def test_the_inception_is_that_of_pytorch_fid(inception_file, monkeypatch):
    library = pytest.importorskip("pytorch_fid.inception")
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as enlarge

    monkeypatch.setattr(library, "load_state_dict_from_url", lambda *_, **__: torch.load(inception_file))
    other = library.InceptionV3(resize_input=False, normalize_input=False).eval()
    squeezed = torch.from_numpy(np.asarray(picture(0).resize((64, 64), Image.Resampling.BICUBIC)).copy())
    pixels = enlarge(squeezed.permute(2, 0, 1)[None].float(), size=(299, 299), align_corners=False)
    with torch.inference_mode():
        expected = other((pixels - 128) / 128)[0][0, :, 0, 0].numpy()
    found = open_networks([f"inception:{inception_file}"])[0].features([picture(0)])[0]
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_a_file_of_other_weights_or_a_program_is_refused(tmp_path):
    pytest.importorskip("torch_fidelity")
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="not those of the Inception of FID"):
        open_networks([f"inception:{tmp_path / 'other.pth'}"])
    torch.save({"fc.weight": Image.new("RGB", (2, 2))}, tmp_path / "program.pth")
    with pytest.raises(UserError, match="has no place in such a file; nothing was run"):
        open_networks([f"inception:{tmp_path / 'program.pth'}"])
