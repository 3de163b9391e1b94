"""Offline extractors: raw pictures and recordings become shards of features."""
