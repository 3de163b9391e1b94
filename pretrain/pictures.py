"""Pictures of a run: what a system has to show when a state is saved, in pictures/step-N.png."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image

from opt.data.batch import Batch
from opt.files import write_atomic
from opt.systems.system import System


def save_picture(system: System, batch: Batch, path: Path) -> None:
    """What the system shows of this batch, as a PNG; nothing for a system without pictures.

    Drawn in evaluation mode and from a generator of its own: training goes on as if it had not been.
    """
    system.eval()
    with torch.random.fork_rng(), torch.no_grad():
        picture = system.illustrate(batch)
    system.train()
    if picture is None:
        return
    content = io.BytesIO()
    Image.fromarray(picture.cpu().numpy()).save(content, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content.getvalue())
