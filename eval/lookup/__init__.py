"""An index of vectors on disk, and searches in it."""
