"""Rows of data sets that the library `datasets` reads: of the hub, and of folders that are here."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from d2lora.data.files import READERS
from d2lora.data.rows import kind_of
from d2lora.errors import DataError, did_you_mean, first_line

TRAIN = "train"
_SAVED = ("state.json", "dataset_dict.json")
"""What `save_to_disk` writes into the folder of a data set, and of several splits."""


class DataFolder(NamedTuple):
    """A folder of a data set, and one of its splits."""

    path: Path
    split: str


def folder_of(name: str) -> DataFolder | None:
    """Return the folder and the split that `FOLDER` or `FOLDER:split` names; None of other names.

    A folder that is named like a file of rows is none.
    """
    for path, split in ((name, TRAIN), name.rpartition(":")[::2]):
        if path and kind_of(Path(path)) not in READERS and Path(path).is_dir():
            return DataFolder(Path(path), split)
    return None


def of_hub(name: str) -> bool:
    """Say whether a name is written as that of a hub data set."""
    parts = name.partition(":")[0].split("/")
    return len(parts) in (2, 3) and all(parts) and not name.startswith((".", "/"))


def rows_of_set(name: str) -> Iterable[Any]:
    """Return the rows of a data set.

    Args:
        name: `owner/name:split` or `owner/name/config:split` of the hub, or `FOLDER:split` of a
            folder as the hub has it or as `save_to_disk` writes it. Without a split: train.

    Raises:
        DataError: If there is none, or it cannot be loaded.
    """
    folder = folder_of(name)
    if folder is None and not of_hub(name):
        raise DataError(
            f"{name}: no such file, and not a hub data set (`owner/name:split` or "
            "`owner/name/config:split`)"
        )
    from datasets import exceptions

    try:
        return _of_hub(name) if folder is None else _of_folder(folder)
    except (exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        said = isinstance(error, exceptions.DatasetGenerationError)  # only that there is a cause
        reason = first_line((said and error.__cause__) or error)
        if "scripts are no longer supported" in reason:
            reason = (
                "it is a script, and d2lora runs no code from the hub; give a data set of data "
                "files (many have a branch `refs/convert/parquet`: download a file of it)"
            )
        what = "hub data set" if folder is None else "folder"
        raise DataError(f"{name}: the {what} cannot be loaded: {reason}") from None


def _of_hub(name: str) -> Iterable[Any]:
    from datasets import load_dataset

    repository, _, split = name.partition(":")
    owner, own, *config = repository.split("/")
    return load_dataset(f"{owner}/{own}", config[0] if config else None, split=split or TRAIN)


def _of_folder(folder: DataFolder) -> Iterable[Any]:
    from datasets import Dataset, load_dataset, load_from_disk

    if not any((folder.path / file).is_file() for file in _SAVED):
        return load_dataset(str(folder.path), split=folder.split)
    saved: Any = load_from_disk(str(folder.path))
    if isinstance(saved, Dataset):
        if folder.split not in (TRAIN, str(saved.split)):
            raise ValueError(f"it was saved without splits, and {folder.split!r} is asked for")
        return saved
    if folder.split not in saved:
        raise ValueError(
            f"it has no split {folder.split!r}.{did_you_mean(folder.split, saved)} It has "
            f"{', '.join(map(str, saved))}"
        )
    return saved[folder.split]
