"""What is installed on request: `pip install 'd2lora[EXTRA]'`."""

from collections.abc import Iterable
from importlib.util import find_spec

from d2lora.errors import SettingsError

EXTRAS = {
    "embeddings": ("sentence_transformers",),
    "gguf": ("gguf",),
    "lm-eval": ("lm_eval",),
    "metrics": ("sacrebleu",),
    "mlflow": ("mlflow",),
    "quantization": ("bitsandbytes",),
    "ray": ("ray",),
    "report": ("altair", "vl_convert"),
    "select": ("faiss", "py3langid", "rensa", "sklearn"),
    "tensorboard": ("tensorboard",),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
"""Extra -> the modules that it brings."""


def need_trackers(names: Iterable[str]) -> None:
    """Check that trackers are installed, each of which is an extra.

    Raises:
        SettingsError: As `need_extra`.
    """
    for name in names:
        need_extra(name, f"--track {name}")


def need_extra(extra: str, what: str) -> None:
    """Check that the packages of an extra are installed.

    Args:
        extra: A name of `EXTRAS`.
        what: What they are needed for, as the subject of the message.

    Raises:
        SettingsError: With the command that installs them.
    """
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise SettingsError(
            f"{what} needs {', '.join(missing)}, not installed here: pip install 'd2lora[{extra}]'"
        )
