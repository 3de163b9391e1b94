"""Checkpoints in every format, and pickles that would like to be run."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from opt.config import UserError
from opt.weights.state import read_state

ARRAYS = {
    "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "columns": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(3, 2)),
    "big_endian": np.arange(3, dtype=">f4"),
    "half": np.ones(2, np.float16),
    "count": np.array(7),
    "nothing": np.zeros((0, 4), np.float32),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickled_arrays_of_every_protocol(tmp_path, protocol):
    path = tmp_path / "model.pkl"
    content = {"model": ARRAYS, "__author__": "somebody", "iteration": np.int64(3)}
    path.write_bytes(pickle.dumps(content, protocol))
    state = read_state(path)
    assert set(state) == set(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(state[name].numpy(), array)
        assert state[name].numpy().dtype == array.dtype.newbyteorder("=")


def test_names_of_numpy_1_and_2(tmp_path):
    written = pickle.dumps({"a": ARRAYS["weight"]}, 0)
    other = written.replace(b"numpy._core.", b"numpy.core.") if b"_core" in written else written.replace(
        b"numpy.core.", b"numpy._core.")
    assert other != written
    (tmp_path / "model.pkl").write_bytes(other)
    np.testing.assert_array_equal(read_state(tmp_path / "model.pkl")["a"], ARRAYS["weight"])


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_tensors_wrapped_or_bare(tmp_path, suffix):
    state, path = {"weight": torch.arange(4.0)}, tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": {"module.weight": state["weight"]}, "epoch": 2}, path)
    assert {name: one.tolist() for name, one in read_state(path).items()} == {"weight": [0, 1, 2, 3]}


@pytest.mark.filterwarnings("ignore:.*jit.*deprecated")
def test_modules_that_were_saved_whole(tmp_path):
    """As OpenAI publishes CLIP, by torch.jit.save: the tensors are read, the code beside them is not."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Sequential(torch.nn.LayerNorm(4)))
    module.register_buffer("context_length", torch.tensor(77))
    module.half()
    torch.jit.trace(module, torch.randn(2, 3).half()).save(tmp_path / "ViT.pt")
    state = read_state(tmp_path / "ViT.pt")
    assert set(state) == set(module.state_dict())
    for name, tensor in module.state_dict().items():
        assert torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype


class Program:
    """What a hostile file holds: a call."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_nothing_in_a_file_is_run(tmp_path, suffix):
    path, marker = tmp_path / f"model{suffix}", tmp_path / "run"
    content = {"model": {**ARRAYS, "trap": Program(marker)}}
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match="nothing was run|something other than tensors"):
        read_state(path)
    assert not marker.exists()


def test_arrays_of_objects_are_refused(tmp_path):
    path, marker = tmp_path / "model.pkl", tmp_path / "run"
    path.write_bytes(pickle.dumps({"a": np.array([None, 1])}))
    with pytest.raises(UserError, match="could not be read as a checkpoint: an array"):
        read_state(path)
    assert not marker.exists()


def damaged(change):
    written = io.BytesIO()
    pickle.dump({"a": ARRAYS["weight"]}, written, 2)
    return change(written.getvalue())


@pytest.mark.parametrize(
    "content",
    [b"", b"no pickle", damaged(lambda whole: whole[:-20]),
     damaged(lambda whole: whole.replace(b"K\x02K\x03", b"K\x02K\x04")),
     pickle.dumps([1, 2]), pickle.dumps({"a": 3}), pickle.dumps(np.ndarray)],
    ids=["empty", "text", "cut", "sizes", "list", "no tensors", "a class"],
)
def test_what_is_no_checkpoint_is_a_clear_error(tmp_path, content):
    path = tmp_path / "model.pkl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="model.pkl"):
        read_state(path)
