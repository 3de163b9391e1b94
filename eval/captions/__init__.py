"""Measures of captions against references, as coco-caption has them."""
