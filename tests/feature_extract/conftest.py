"""A made-up corpus in the Localized Narratives layout: drawn pictures, noise for speech."""

from pathlib import Path

import pytest
from jobs import write_corpus


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    write_corpus(folder)
    return folder
