"""Generated pictures and what judges them: `opt eval text-to-image`."""
