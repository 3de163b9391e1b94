"""A made-up corpus in the Localized Narratives layout, and torch on one thread: the last bits depend on the number."""

from pathlib import Path

import pytest
import torch
from jobs import write_corpus


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    write_corpus(folder)
    return folder
