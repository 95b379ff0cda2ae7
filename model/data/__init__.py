"""Training data: procedural worlds, and real video from folders and shards."""
