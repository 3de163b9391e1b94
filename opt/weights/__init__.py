"""Published checkpoints to our networks: one file a source."""
