"""One root seed, split into named streams, so that each source of randomness is independent."""

import hashlib

from d2lora.settings.sections import TrainSettings


def stream_seed(root: int, stream: str) -> int:
    """Return the seed of one named source of randomness, split off the root seed."""
    digest = hashlib.sha256(f"{root}/{stream}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def seed_of(settings: TrainSettings, stream: str) -> int:
    """Return the seed of one source of randomness: its own setting, or split off the root."""
    own: int | None = getattr(settings, f"seed_{stream}")
    return stream_seed(settings.seed, stream) if own is None else own
