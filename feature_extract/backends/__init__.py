"""Backends: the networks behind each extractor, imported only when asked for."""
