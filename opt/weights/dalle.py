"""OpenAI's image tokenizer (arXiv 2102.12092): encoder.pkl and decoder.pkl, whole pickled modules, to one file of ours.

    encoder.pkl, decoder.pkl --Pickled, listed names only--> tensors by our names --safetensors--> `load` -> DALLE

The files' packages need not be installed, and nothing in the files is run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from opt import config as configuration
from opt.config import UserError
from opt.files import sha256, write_atomic
from opt.nn.dalle import DALLE, DALLEConfig
from opt.weights.pickled import Node, Pickled

NAMES = (
    "dall_e.encoder.Encoder", "dall_e.encoder.EncoderBlock", "dall_e.decoder.Decoder", "dall_e.decoder.DecoderBlock",
    "dall_e.utils.Conv2d", "torch.device", "torch.nn.modules.activation.ReLU", "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Identity", "torch.nn.modules.pooling.MaxPool2d", "torch.nn.modules.upsampling.Upsample",
)
"""Every class of the published modules."""


@dataclass(frozen=True)
class DALLEFiles:
    """OpenAI's two files, and where to put ours."""

    encoder: Path
    """The published encoder.pkl."""
    decoder: Path
    """The published decoder.pkl."""
    out: Path
    """The safetensors file to write."""


def convert(config: DALLEFiles) -> None:
    """Turn DALL-E's published image tokenizer into a file that extraction reads; nothing in the pickles is run.

    Example: opt convert dalle --encoder encoder.pkl --decoder decoder.pkl --out dalle.safetensors

    Then: opt extract ... --codes dalle:dalle.safetensors
    """
    for path in (config.encoder, config.decoder):
        if not path.is_file():
            raise UserError(f"{path}: there is no such file")
        if config.out.resolve() == path.resolve():
            raise UserError(f"--out {config.out} is an input, and would be written over: name another file")
    encoder, decoder = Pickled(config.encoder, NAMES), Pickled(config.decoder, NAMES)
    network = _describe(encoder, decoder)
    with torch.device("meta"):
        shapes = DALLE(network)
    weights = {**_weights(encoder, shapes.encoder, "encoder"), **_weights(decoder, shapes.decoder, "decoder")}
    sources = {"encoder": sha256(config.encoder), "decoder": sha256(config.decoder)}
    metadata = {"config": json.dumps(configuration.to_dict(network)), "sources_sha256": json.dumps(sources)}
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(config.out, save(weights, metadata))
    print(f"wrote {config.out}: {sum(tensor.numel() for tensor in weights.values()):,} parameters, "
          f"{network.codebook:,} codes")


def load(path: Path) -> DALLE:
    """The network of a file that `convert` wrote, in evaluation mode. Raises UserError for any other file."""
    try:
        with safe_open(path, "pt") as file:
            network = configuration.from_dict(DALLEConfig, json.loads(file.metadata()["config"]), str(path))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        dalle = DALLE(network)
        dalle.load_state_dict(weights)
    except Exception as error:  # missing file, another format, another network: one answer to all
        raise UserError(f"{path}: not DALL-E's tokenizer as `opt convert dalle` writes it "
                        f"({str(error).splitlines()[0]})") from error
    return dalle.eval()


def _describe(encoder: Pickled, decoder: Pickled) -> DALLEConfig:
    """The sizes, from the shapes of the first and last convolutions. Raises UserError for other modules."""
    for file, name in ((encoder, "dall_e.encoder.Encoder"), (decoder, "dall_e.decoder.Decoder")):
        if not isinstance(file.root, Node) or file.root.name != name:
            raise UserError(f"{file.path}: holds no {name}")
    group = _node(encoder, ("blocks", "group_1"))
    return DALLEConfig(
        codebook=len(_tensor(encoder, ("blocks", "output", "conv", "b"))),
        width=len(_tensor(encoder, ("blocks", "input", "b"))),
        decoder_width=len(_tensor(decoder, ("blocks", "input", "b"))),
        blocks=sum(name.startswith("block_") for name in group.state["_modules"]),
    )


def _weights(file: Pickled, module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Every weight of our module by our name, in float32. Raises UserError when one is missing or of another size."""
    weights = {}
    for name, wanted in module.state_dict().items():
        tensor = _tensor(file, _published(name))
        if tensor.shape != wanted.shape:
            raise UserError(f"{file.path}: {name} has shape {tuple(tensor.shape)}, expected {tuple(wanted.shape)}")
        weights[f"{prefix}.{name}"] = tensor.float().contiguous()
    return weights


def _published(name: str) -> tuple[str, ...]:
    """Where a weight of ours lies in the published module: groups.0.1.convolutions.2.bias is
    blocks, group_1, block_2, res_path, conv_3, b."""
    *parts, leaf = name.split(".")
    letter = {"weight": "w", "bias": "b"}[leaf]
    if parts[0] == "groups":
        _, group, block, place, *number = parts
        inside = ("res_path", f"conv_{int(number[0]) + 1}") if place == "convolutions" else ("id_path",)
        return "blocks", f"group_{int(group) + 1}", f"block_{int(block) + 1}", *inside, letter
    return "blocks", *{"stem": ("input",), "head": ("output", "conv")}[parts[0]], letter


def _node(file: Pickled, place: tuple[str, ...]) -> Node:
    node = file.root
    try:
        for name in place:
            node = node.child(name)
    except (KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{file.path}: there is no {'.'.join(place)} in it") from error
    return node


def _tensor(file: Pickled, place: tuple[str, ...]) -> Tensor:
    try:
        return file.tensor(_node(file, place))
    except Exception as error:  # what stands in the file may be anything
        raise UserError(f"{file.path}: {'.'.join(place)} is damaged ({error})") from error
