"""From archive to batch: sources, decoding, shards, colour statistics, sampling and the prefetching loader."""
