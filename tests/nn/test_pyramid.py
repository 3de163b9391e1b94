"""Feature pyramid: maps lie where their strides say, see what the system sees, and torchvision's heads take them."""

import numpy as np
import pytest
import torch
from shrunken import made, sample
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator

from opt.data.pixels import picture
from opt.nn.pyramid import Pyramid


def pyramid(**settings) -> Pyramid:
    """Of a small BEiT-3 with patches of 4 pixels on a grid of 8 x 8."""
    return made("beit3.tiny").pyramid(channels=8, **settings)


@torch.no_grad()
def test_patches_are_those_that_the_system_sees() -> None:
    system, some = made("beit3.tiny").eval(), [sample(0), sample(1)]
    seen = [torch.from_numpy(picture(each.pictures[0].jpeg, system.config.sight).copy()) for each in some]
    pictures = torch.stack(seen).permute(0, 3, 1, 2) / 255
    batch = system.preparer().inputs(some, ["image"])
    states = system.encode("image", batch).hidden.view(2, 65, -1)[:, 1:]
    found = system.pyramid().patches(pictures)
    assert found.shape == (2, 16, 8, 8)
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), states, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_maps_of_any_size_lie_where_their_strides_say() -> None:
    made_up = pyramid(strides=(1, 2, 4, 8))
    for high, wide in ((32, 32), (48, 16), (64, 80)):
        maps = made_up(torch.rand(2, 3, high, wide))
        assert {name: tuple(each.shape) for name, each in maps.items()} == {
            str(number): (2, 8, high // stride, wide // stride) for number, stride in enumerate((1, 2, 4, 8))}
    with pytest.raises(ValueError, match="30 x 32"):
        made_up(torch.rand(1, 3, 30, 32))
    with pytest.raises(ValueError, match="stride of 6"):
        pyramid(strides=(4, 6))


@torch.no_grad()
def test_pictures_do_not_see_each_other() -> None:
    made_up, pictures = pyramid().eval(), torch.rand(3, 3, 32, 48)
    together = made_up(pictures)
    for name, alone in made_up(pictures[1:2]).items():
        torch.testing.assert_close(alone, together[name][1:2], rtol=1e-4, atol=1e-5)


def test_a_detector_trains_on_it() -> None:
    torch.manual_seed(0)
    backbone = pyramid(strides=(4, 8))
    detector = FasterRCNN(
        backbone, 3, min_size=32, max_size=64, image_mean=[0.0] * 3, image_std=[1.0] * 3, size_divisible=8,
        rpn_anchor_generator=AnchorGenerator(((8,), (16,)), ((1.0,),) * 2),
    )
    boxes = torch.tensor([[4.0, 4.0, 20.0, 20.0], [10.0, 2.0, 30.0, 26.0]])
    targets = [{"boxes": boxes[:1], "labels": torch.tensor([1])}, {"boxes": boxes, "labels": torch.tensor([1, 2])}]
    losses = detector([torch.rand(3, 32, 32), torch.rand(3, 40, 56)], targets)
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in backbone.levels.parameters())
    image = [parameter.grad for name, parameter in backbone.named_parameters() if "image" in name]
    assert image and all(gradient is not None and gradient.any() for gradient in image if gradient.numel() > 1)
    found = detector.eval()([torch.rand(3, 32, 32), torch.rand(3, 40, 56)])
    assert [set(each) for each in found] == [{"boxes", "labels", "scores"}] * 2
    assert np.isfinite(found[0]["boxes"].detach().numpy()).all()
