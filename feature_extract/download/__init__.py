"""Published corpora from their public buckets, in the layout that feature_extract/sources reads."""
