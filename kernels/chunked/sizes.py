"""How large the pieces of the chunked backend are, by kind of device. Data only."""

# Of a sweep in blocks: large enough for the matrix products, small enough for a core's cache.
TILE_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 25}
BLOCK_COLUMNS = {"cpu": 1024, "cuda": 8192}
# Logits, or derivatives by them, stay from forward to backward where they, and one plane more to work on, are
# no larger: a workspace. Beyond it they are made again.
KEEP_BYTES = {"cpu": 1 << 25, "cuda": 1 << 29}
# Derivatives by the hidden states stay where they are no larger: about as much as the gradients themselves.
HIDDEN_BYTES = 1 << 31
# Of whole rows. Every chunk reads the whole heads, so few rows are slow; two planes of a chunk's logits are
# the workspace.
CHUNK_ROWS = 384
PLANE_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 26}
# Planes larger than KEEP_BYTES stay well below the logits of all tokens: these make as many chunks at least.
FEWEST_CHUNKS = 3
# Two threads share a product evenly where its rows come in such groups.
ROW_GROUP = 16
# Elements of one chunk of gathered head rows.
GATHER_ELEMENTS = 1 << 20
