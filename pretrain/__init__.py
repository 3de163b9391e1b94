"""Pretraining: one loop for every system."""
