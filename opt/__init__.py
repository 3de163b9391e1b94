"""opt: pretrain on pictures, text and speech together.

The library under three applications: `feature_extract` writes shards, `pretrain` reads them, `eval` turns
checkpoints into numbers. Nothing is imported here, so that `python -m opt --help` answers at once.
"""

__version__ = "0.1.0"
