"""What systems share beside blocks and objectives: rows of a batch, contrasts over three modalities. No system."""
