"""Building blocks: packed tokens, attention, embedders, decoders."""
