"""The warm starts that a fit tries: given, found beside the base, or shipped; at one rank."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from d2lora.adapters.base_files import base_folder
from d2lora.adapters.fingerprints import Identity, identity_of
from d2lora.adapters.manifest import MANIFESTS, Manifest
from d2lora.errors import ModelError, SettingsError, listed
from d2lora.runtime.run_folder import DONE
from d2lora.settings import DEFAULT_RANK, ConvertSettings, FitSettings
from d2lora.tools.convert import convert
from d2lora.warmstart import WarmStart

NONE = "none"


def warm_starts_of(settings: FitSettings) -> list[Path]:
    """Return the warm starts to try, checked against the base.

    Raises:
        SettingsError: If some that were named cannot be used; all at once.
    """
    folder = base_folder(settings.base, settings.revision, settings.gguf_file)
    identity = identity_of(folder)
    if settings.warm_starts is None:
        return [path for path in _beside(settings.base) if _fits(path, identity)]
    if settings.warm_starts == (NONE,):
        return []
    faults: list[str] = []
    for name in settings.warm_starts:
        try:
            start = WarmStart.load(name)
            start.manifest.check_base(identity, settings.base, start.path)
        except ModelError as error:
            faults.append(str(error))
    if faults:
        raise SettingsError(f"--warm-starts:\n{listed(faults)}")
    return [Path(name) for name in settings.warm_starts]


def names_of(starts: Sequence[Path]) -> list[str]:
    """Return a short name for each warm start: its folder's, or its path where two are alike."""
    names = [path.resolve().name for path in starts]
    return [
        name if names.count(name) == 1 else str(path)
        for name, path in zip(names, starts, strict=True)
    ]


def at_rank(start: Path, rank: int, folder: Path) -> Path:
    """Return a warm start of that rank: itself, or a conversion of it, which is made once."""
    manifest = WarmStart.load(start).manifest
    if manifest.lora.rank == rank:
        return start
    out = folder / f"{manifest.adapter_fingerprint[:12]}-rank-{rank}"
    if not (out / DONE).is_file():
        convert(ConvertSettings(adapter=str(start), rank=rank, out=out))
    return out


def rank_of(settings: FitSettings, starts: Sequence[Path]) -> int:
    """Return the rank that all candidates have."""
    if settings.rank is not None:
        return settings.rank
    return WarmStart.load(starts[0]).manifest.lora.rank if starts else DEFAULT_RANK


def _beside(base: str) -> list[Path]:
    """Return the warm starts that lie in one folder with the base, or come with it."""
    if base == "smollm2":
        return [Path(str(resources.files("d2lora") / "shipped" / "smollm2-warm-start"))]
    folder = Path(base)
    if not folder.exists():
        return []
    beside = folder.absolute().parent
    return sorted(path.parent for path in beside.glob(f"*/{MANIFESTS['warm start']}"))


def _fits(path: Path, identity: Identity) -> bool:
    return Manifest.read(path).base.identity.is_same(identity)
