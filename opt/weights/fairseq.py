"""wav2vec 2.0 and HuBERT checkpoints of fairseq (arXiv 2006.11477, 2106.07447), read without fairseq.

    FILE.pt --Pickled, inert--> model's tensors, cfg or args --read--> FairseqSpeech, by the names of transformers

Pretrained networks and those fine-tuned with CTC are read. HuBERT computes what wav2vec 2.0 does, so both become a
`Wav2Vec2Model`. Sizes are those of the tensors; what tensors cannot tell (heads, strides, where norms stand, how
waveforms are prepared) is what the checkpoint says of itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from opt.config import UserError
from opt.weights.pickled import Node, Pickled

NAMES = (
    "argparse.Namespace", "omegaconf.*", "fairseq.*", "enum.*", "typing.*", "numpy.*", "collections.defaultdict",
    "_codecs.encode", "pathlib.PosixPath", "torch.device", "torch.Size", "torch._utils._rebuild_tensor",
    *(f"{module}.{name}" for module in ("builtins", "__builtin__")
      for name in ("dict", "list", "tuple", "int", "float", "bool", "str", "unicode", "bytes", "object", "long")),
)
"""What stands in fairseq's checkpoints besides tensors: settings, meters, dictionaries. All of it stays inert."""

CONVOLUTION = re.compile(r"feature_extractor\.conv_layers\.(\d+)\.(0|2|2\.1)\.(weight|bias)")
BLOCK = re.compile(r"encoder\.layers\.(\d+)\.(\w+|self_attn\.\w+)\.(weight|bias)")
IN_CONVOLUTION = {"0": "conv", "2": "layer_norm", "2.1": "layer_norm"}
IN_BLOCK = {
    **{f"self_attn.{name}_proj": f"attention.{name}_proj" for name in ("q", "k", "v", "out")},
    "self_attn_layer_norm": "layer_norm", "final_layer_norm": "final_layer_norm",
    "fc1": "feed_forward.intermediate_dense", "fc2": "feed_forward.output_dense",
}
ELSEWHERE = {
    "mask_emb": "masked_spec_embed",
    **{f"{theirs}.{kind}": f"{ours}.{kind}" for kind in ("weight", "bias") for theirs, ours in (
        ("post_extract_proj", "feature_projection.projection"), ("layer_norm", "feature_projection.layer_norm"),
        ("encoder.layer_norm", "encoder.layer_norm"))},
    "encoder.pos_conv.0.bias": "encoder.pos_conv_embed.conv.bias",
    "encoder.pos_conv.0.weight_g": "encoder.pos_conv_embed.conv.parametrizations.weight.original0",
    "encoder.pos_conv.0.weight_v": "encoder.pos_conv_embed.conv.parametrizations.weight.original1",
}
"""Places of weights: fairseq's names, and those of transformers."""
TRAINING_ONLY = ("quantizer.", "project_q.", "final_proj.", "label_embs_concat", "target_glu.")
FINE_TUNED = "w2v_encoder.w2v_model."
"""What stands before the network's names in a checkpoint fine-tuned with CTC; the head beside it is left behind."""


@dataclass(frozen=True)
class FairseqSpeech:
    """A network. `settings`: fields of transformers' Wav2Vec2Config. `weights`: the state of a Wav2Vec2Model, float32.

    normalise: waveforms are standardised before. quantiser: weight (G V, C) and bias (G V,) of the projection to the
    `groups` G of V codes each; empty when the checkpoint has none.
    """

    settings: dict[str, Any]
    weights: dict[str, Tensor]
    normalise: bool
    quantiser: dict[str, Tensor]
    groups: int


def read(path: Path) -> FairseqSpeech:
    """Read a checkpoint. Raises UserError for other files and networks, naming what is not as expected."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    file = Pickled(path, NAMES)
    model = file.root.get("model") if isinstance(file.root, dict) else None
    if not isinstance(model, dict) or not all(isinstance(name, str) for name in model):
        raise UserError(f"{path}: no checkpoint of fairseq; it has no 'model'")
    prefix = FINE_TUNED if any(name.startswith(FINE_TUNED) for name in model) else ""
    said = _Settings(path, file.root, fine_tuned=bool(prefix))
    theirs = {name.removeprefix(prefix): node for name, node in model.items() if name.startswith(prefix)}
    weights = {_our_name(path, name): _tensor(file, name, node) for name, node in theirs.items()
               if not name.startswith(TRAINING_ONLY)}
    quantiser = {kind: _tensor(file, name, theirs[name]) for kind in ("weight", "bias")
                 if (name := f"quantizer.weight_proj.{kind}") in theirs}
    return FairseqSpeech(
        _describe(path, weights, said), weights, bool(said.of_task("normalize")), quantiser,
        int(said["latent_groups"]) if quantiser else 0,
    )


def _our_name(path: Path, name: str) -> str:
    """A weight's name in transformers. Raises UserError for one that neither network has."""
    if match := CONVOLUTION.fullmatch(name):
        return f"feature_extractor.conv_layers.{match[1]}.{IN_CONVOLUTION[match[2]]}.{match[3]}"
    if (match := BLOCK.fullmatch(name)) and match[2] in IN_BLOCK:
        return f"encoder.layers.{match[1]}.{IN_BLOCK[match[2]]}.{match[3]}"
    if name not in ELSEWHERE:
        raise UserError(f"{path}: {name} is part of neither wav2vec 2.0 nor HuBERT; other networks of fairseq "
                        "(conformer, adapters, data2vec) are not read")
    return ELSEWHERE[name]


def _describe(path: Path, weights: dict[str, Tensor], said: _Settings) -> dict[str, Any]:
    """The fields of Wav2Vec2Config. Raises UserError where weights are missing or settings are not wav2vec 2.0's."""
    try:
        convolutions = [weights[f"feature_extractor.conv_layers.{number}.conv.weight"]
                        for number in range(sum(name.endswith(".conv.weight") for name in weights))]
        layers = len({name.split(".")[2] for name in weights if name.startswith("encoder.layers.")})
        positions = weights[ELSEWHERE["encoder.pos_conv.0.weight_v"]]
        inner = len(weights["encoder.layers.0.feed_forward.intermediate_dense.weight"])
    except KeyError as error:
        raise UserError(f"{path}: lacks {error.args[0]} (its name in transformers)") from error
    strides = conv_strides(path, said["conv_feature_layers"])
    if len(strides) != len(convolutions):
        raise UserError(f"{path}: says {len(strides)} convolutions and has {len(convolutions)}")
    if (activation := said["activation_fn"]) not in ("gelu", "relu"):
        raise UserError(f"{path}: activation_fn is {activation!r}; expected gelu or relu")
    return {
        "conv_dim": [len(weight) for weight in convolutions],
        "conv_kernel": [weight.shape[2] for weight in convolutions],
        "conv_stride": strides,
        "conv_bias": "feature_extractor.conv_layers.0.conv.bias" in weights,
        "feat_extract_norm": "layer" if "feature_extractor.conv_layers.1.layer_norm.weight" in weights else "group",
        "hidden_size": len(positions),
        "num_hidden_layers": layers,
        "num_attention_heads": int(said["encoder_attention_heads"]),
        "intermediate_size": inner,
        "hidden_act": activation,
        "do_stable_layer_norm": bool(said["layer_norm_first"]),
        "num_conv_pos_embeddings": positions.shape[2],
        "num_conv_pos_embedding_groups": len(positions) // positions.shape[1],
    }


def conv_strides(path: Path, layers: Any) -> list[int]:
    """The strides in "[(512, 10, 5)] + [(512, 3, 2)] * 4": lists of (width, kernel, stride), which fairseq evaluates.

    Raises UserError for any other expression.
    """
    triple = r"\(\s*\d+\s*,\s*\d+\s*,\s*(\d+)\s*\)"
    term = rf"\[\s*{triple}(?:\s*,\s*{triple})*\s*,?\s*\](?:\s*\*\s*(\d\d?))?"
    strides: list[int] = []
    for part in str(layers).split("+"):
        if not re.fullmatch(term, part.strip()):
            raise UserError(f"{path}: conv_feature_layers is {layers!r}; expected lists of (width, kernel, stride)")
        times = re.search(r"\*\s*(\d+)\s*$", part)
        strides += [int(stride) for stride in re.findall(triple, part)] * (int(times[1]) if times else 1)
    return strides


def _tensor(file: Pickled, name: str, node: Any) -> Tensor:
    try:
        return file.tensor(node).float()
    except Exception as error:  # what stands in the file may be anything
        raise UserError(f"{file.path}: {name} is damaged ({error})") from error


class _Settings:
    """What a checkpoint says of its network: `cfg` of newer ones (dictionaries or omegaconf's), `args` of older ones.

    fine_tuned: the settings of the network lie inside those of the recogniser, as w2v_args.
    """

    def __init__(self, path: Path, root: dict[str, Any], fine_tuned: bool) -> None:
        self.path = path
        whole = _fields(root.get("cfg")) or _fields(root.get("args"))
        self.model, self.task = _parts(whole)
        if fine_tuned:
            outer_task = self.task
            self.model, self.task = _parts(_fields(self.model.get("w2v_args")))
            self.task = {**outer_task, **self.task}

    def __getitem__(self, name: str) -> Any:
        return self._value(self.model, name)

    def of_task(self, name: str) -> Any:
        """A setting of the task: how recordings are prepared."""
        return self._value(self.task, name)

    def _value(self, table: dict[str, Any], name: str) -> Any:
        value = _open(table.get(name))
        if not isinstance(value, str | int | float):
            raise UserError(f"{self.path}: its settings (cfg or args) lack {name}, without which the network cannot be "
                            "built; use the checkpoint as it was published")
        return value


def _parts(whole: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of the model and of the task: separate in cfg, together in args."""
    if "model" in whole and "task" in whole:
        return _fields(whole["model"]), _fields(whole["task"])
    return whole, whole


def _fields(value: Any) -> dict[str, Any]:
    """The fields of a dictionary, a Namespace or a DictConfig; none for anything else."""
    value = _open(value)
    if isinstance(value, Node):
        value = value.state
    return value if isinstance(value, dict) else {}


def _open(value: Any) -> Any:
    """What an omegaconf node holds (a DictConfig's `_content`, a leaf's `_val`); any other value itself."""
    if isinstance(value, Node) and isinstance(value.state, dict):
        return value.state.get("_content", value.state.get("_val", value))
    return value
