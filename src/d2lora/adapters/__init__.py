"""The base and what is put on it: files, fingerprints, shape, manifest, algebra of adapters.

Above runtime and settings; data and everything after it build on this room.
"""
