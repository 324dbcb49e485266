"""The base and what is put on it: loading, fingerprints, the shape of an adapter, its manifest, its algebra.

Above runtime and settings; data and everything after build on it.
"""
