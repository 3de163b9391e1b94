"""Evaluation: checkpoint + shards -> numbers with their protocol -> report."""
