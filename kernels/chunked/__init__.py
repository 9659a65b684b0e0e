"""The chunked backend: one reused workspace, any device, any dtype. Imports nothing but its neighbours."""
