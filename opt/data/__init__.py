"""Data: records in shards, drawn as samples, planned into batches."""
