"""Sources: each file reads one corpus layout as items."""
