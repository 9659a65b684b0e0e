"""The algorithms, one file each: what stands here differs between them, everything else is shared."""
