"""Objectives: pure functions over hidden states that return a Term."""
