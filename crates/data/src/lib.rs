//! Text to token shards, and shards to batches: read, shard, pack, load, resume.
