"""From text to batches: records with provenance, filters, dedup, mixture, token shards, curriculum, stream."""
