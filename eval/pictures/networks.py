"""The networks whose features FID and KID compare: each is named, for a distance means nothing without its network.

    tiny            the embedded detector's backbone, mean over places, 128 numbers; needs no download
    inception:FILE  the Inception of FID (TensorFlow, 2015), 2,048 numbers, FILE as pytorch-fid and torch-fidelity have

A figure by `tiny` is called fid_tiny, for nobody's FID can be compared with it. Shape legend: B pictures, D features.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eval.pictures.gallery import squeezed
from feature_extract.description import weights_sha256
from opt.config import UserError, extra
from opt.files import sha256
from opt.weights.state import read_state

PUBLISHED = "6726825d"
"""What the SHA-256 of the published Inception file begins with; its name says so."""
AT_ONCE = 8
"""Pictures in one call: on a CPU more of them are slower."""
HOW_TO_GET = (
    f"--fid-network inception:FILE gives it, FILE the pt_inception-2015-12-05-{PUBLISHED}.pth of pytorch-fid's releases"
)


@dataclass(frozen=True)
class PictureNetwork:
    """A network that turns pictures into features."""

    name: str
    width: int
    resize: str
    """How it brings 64 x 64 pixels to the size it sees."""
    about: str
    """Which network with which weights."""
    run: Callable[[Tensor], Tensor]
    """Pixels uint8 (B, 3, 64, 64) -> features float32 (B, D)."""

    @torch.inference_mode()
    def features(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Features (B, D) float32 of RGB pictures, each squeezed to 64 x 64 pixels first."""
        pixels = np.stack([np.asarray(squeezed(picture)) for picture in pictures])
        pieces = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().split(AT_ONCE)
        return torch.cat([self.run(piece).float().cpu() for piece in pieces]).numpy()


def open_networks(words: Sequence[str], device: str = "cpu") -> list[PictureNetwork]:
    """Open each by its word. Raises UserError for a word or a file that is none, or a package that is missing."""
    networks = []
    for word in dict.fromkeys(words):
        name, _, file = word.partition(":")
        if word == "tiny":
            networks.append(_tiny(device))
        elif name == "inception" and file:
            networks.append(_inception(Path(file), device))
        else:
            raise UserError(f"--fid-network {word}: expected tiny or inception:FILE")
    if twice := [one.name for place, one in enumerate(networks) if one.name in {two.name for two in networks[:place]}]:
        raise UserError(f"--fid-network names {twice[0]} twice; give one file of it")
    return networks


def _tiny(device: str) -> PictureNetwork:
    from feature_extract.tiny.regions import load_regions

    detector = load_regions().eval().requires_grad_(False).to(device)

    def run(pixels: Tensor) -> Tensor:
        images, _ = detector.transform(list(pixels.to(device).float() / 255))
        return detector.backbone(images.tensors)["0"].mean((2, 3))

    about = f"embedded detector's backbone, mean over places, SHA-256 {weights_sha256(detector)[:12]}"
    return PictureNetwork("tiny", detector.backbone.out_channels, "bilinear to 128 x 128", about, run)


def _inception(file: Path, device: str) -> PictureNetwork:
    """torch-fidelity's port, resize of TensorFlow 1 included, with the weights of `file`.

    The library unpickles the file it is given. So it is given another: the tensors that we read without running
    anything, written anew.
    """
    if not file.is_file():
        raise UserError(f"--fid-network inception:{file}: there is no such file; {HOW_TO_GET}")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError(f"--fid-network inception needs torch-fidelity: {extra('eval')}") from error
    written = io.BytesIO()
    torch.save(read_state(file), written)
    written.seek(0)
    try:
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=written)
    except RuntimeError as error:
        raise UserError(f"--fid-network inception:{file}: these weights are not those of the Inception of FID, which "
                        f"differs from torchvision's; {HOW_TO_GET}") from error  # fmt: skip
    digest = sha256(file)
    kept = "the published weights" if digest.startswith(PUBLISHED) else "not the published weights"
    about = f"Inception of FID (TensorFlow, 2015-12-05), torch-fidelity's port, {kept}, file SHA-256 {digest[:12]}"
    network = network.to(device)
    resize = "bilinear to 299 x 299 as TensorFlow 1 does, without antialiasing"
    return PictureNetwork("inception", 2048, resize, about, lambda pixels: network(pixels.to(device))[0])
