"""What a run leaves: a plain PEFT adapter, a manifest of how it was made, a card.

adapter_config.json, adapter_model.safetensors   PEFT's own format, loadable without d2lora
warm_start.json or adapter.json                  the manifest
trained_rows.json                                which rows it was trained on, see `trained_rows`
README.md                                        the model card, see `card`
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from peft import LoraConfig, PeftModel
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from d2lora.adapters.base import Base
from d2lora.adapters.base_files import EMBEDDED, SMOLLM2, SMOLLM2_HUB_ID
from d2lora.adapters.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter_config, token_ids
from d2lora.adapters.fingerprints import Identity, fingerprint_of
from d2lora.adapters.lora import BESIDE, PARTIAL, LoraShape
from d2lora.errors import ModelError, WarmStartError
from d2lora.runtime.run_folder import read_json, sha256_of

FORMAT_VERSION = 1
MANIFESTS = {"warm start": "warm_start.json", "adapter": "adapter.json"}


def _data_record(values: dict[str, Any]) -> dict[str, Any]:
    kinds: dict[str, type] = {"file": str, "rows": int, "sha256": str}
    if wrong := [n for n, kind in kinds.items() if not isinstance(values.get(n), kind)]:
        raise ValueError(f"`{wrong[0]}` must be of type {kinds[wrong[0]].__name__}")
    return values


def _cost_record(values: dict[str, Any]) -> dict[str, Any]:
    names = ("n_steps", "n_tokens", "elapsed_s") if values else ()
    if wrong := [n for n in names if not isinstance(values.get(n), int | float)]:
        raise ValueError(f"`{wrong[0]}` must be a number")
    return values


DataRecord = Annotated[dict[str, Any], AfterValidator(_data_record)]
CostRecord = Annotated[dict[str, Any], AfterValidator(_cost_record)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseRecord(_Part):
    """Which base an adapter belongs to."""

    id: str
    revision: str | None
    fingerprint: str
    """Of its weights; empty where an adapter's maker did not record it."""
    quantization: str | None = None
    """How its weights are quantized, or were where they come from, such as GGUF; None: not."""
    unquantized: str = ""
    """Fingerprint of the weights that quantization leaves alone; empty: not recorded."""
    saved_quantized: bool = False
    """Whether its files hold quantized weights."""

    @property
    def identity(self) -> Identity:
        """What other bases are compared with."""
        return Identity(self.fingerprint, self.unquantized, self.saved_quantized)


class LoraRecord(_Part):
    """The adapter's shape."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    rslora: bool = False
    dora: bool = False
    exclude_targets: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    rank_pattern: tuple[str, ...] = ()
    alpha_pattern: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    add_tokens: tuple[str, ...] = ()

    @classmethod
    def of(cls, shape: LoraShape) -> Self:
        """Return the record of a shape."""
        return cls(**asdict(shape))


class Ancestor(_Part):
    """The warm start that an adapter was initialized from."""

    path: str
    data: list[DataRecord]
    fingerprint: str


class Manifest(_Part):
    """How an adapter was made."""

    format_version: int
    kind: Literal["warm start", "adapter"]
    base: BaseRecord
    objective: str
    chat_format: Literal["auto", "template", "plain"]
    """`auto`: not known, as of an adapter made elsewhere."""
    lora: LoraRecord
    data: list[DataRecord]
    n_examples: int
    selection: str
    settings: dict[str, Any]
    cost: CostRecord
    validation_loss_before: float | None
    validation_loss_after: float | None
    """Of the weights that are kept."""
    lineage: list[Ancestor]
    adapter_fingerprint: str
    provenance: dict[str, Any]
    kept_step: int | None = None
    """Optimizer step whose weights these are: the best by validation loss, else the last."""
    reference: str | None = None
    """The reference policy, where the objective has one: `base` or `warm_start`."""
    initialization: dict[str, Any] | None = None
    """Its initialization, what that cost, and what a conversion changed."""
    conversion: dict[str, Any] | None = None
    """What `d2lora convert` did to it, if anything."""
    kept_out: dict[str, Any] | None = None
    """Evaluation files that the rows were checked against, and how many were removed."""
    chat_template: str | None = None
    """The chat template, where it is another than the tokenizer's own."""
    labels: tuple[str, ...] | None = None
    """What closed answers are chosen from; None: its task has none."""
    before_training: dict[str, Any] | None = None
    """Losses of the base and of the warm start on rows of the task, before any training on it."""
    adapted: str | None = None
    """Which layers have the adapter, and which have none; None: not recorded."""
    fast_passes: list[str] | None = None
    """The fast paths that its training used; empty: none; None: not recorded."""
    warnings: list[str] = []
    """What is likely wrong, with what to try."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the manifest of an adapter folder.

        Raises:
            ModelError: If there is none, or it is not one of ours.
        """
        for name in MANIFESTS.values():
            if (folder / name).is_file():
                return cls.read_file(folder / name)
        raise ModelError(f"{folder}: no manifest ({' or '.join(MANIFESTS.values())})")

    @classmethod
    def of_foreign(cls, folder: Path) -> Self:
        """Return what is known of a plain PEFT adapter that has no manifest.

        Raises:
            ModelError: If it is not a LoRA adapter.
        """
        config = read_adapter_config(folder)
        name = config.base_model_name_or_path or ""
        return cls(
            format_version=FORMAT_VERSION,
            kind="adapter",
            base=BaseRecord(id=name, revision=config.revision, fingerprint=""),
            objective="sft",
            chat_format="auto",
            lora=LoraRecord.of(LoraShape.of(config)),
            data=[],
            n_examples=0,
            selection="",
            settings={},
            cost={},
            validation_loss_before=None,
            validation_loss_after=None,
            lineage=[],
            adapter_fingerprint=fingerprint_of_adapter(folder),
            provenance={},
        )

    @classmethod
    def read_file(cls, path: Path) -> Self:
        """Read a manifest from its file.

        Raises:
            ModelError: If it is not one of ours.
        """
        values = read_json(path)
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise ModelError(
                f"{path}: expected format_version {FORMAT_VERSION}, found {version!r}; it was "
                "written by another version of d2lora"
            )
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise ModelError(f"{path}: `{place}`: {first['msg']}") from None

    def check_base(self, base: Identity, name: str, folder: Path) -> None:
        """Check that a base is the one that this adapter was made on, quantized or not.

        Raises:
            ModelError: If it has other weights; a WarmStartError for a warm start.
        """
        if self.base.fingerprint and not self.base.identity.is_same(base):
            kind = WarmStartError if self.kind == "warm start" else ModelError
            raise kind(
                f"{folder} was made on {self.base.id} (fingerprint {self.base.fingerprint[:12]}), "
                f"but {name} has other weights ({base.fingerprint[:12]}); give --base "
                f"{self.base.id}, or make the {self.kind} again on this base"
            )

    @property
    def shape(self) -> LoraShape:
        """The adapter's shape."""
        lora = self.lora
        return LoraShape(**dict(lora))


@dataclass(frozen=True)
class Adapter:
    """A finished adapter on disk."""

    path: Path
    manifest: Manifest

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Open an adapter folder made by d2lora; the weights are read when it is attached."""
        folder = Path(path)
        return cls(folder, Manifest.read(folder))


def has_manifest(folder: Path) -> bool:
    """Say whether a folder holds an adapter made by d2lora."""
    return any((folder / name).is_file() for name in MANIFESTS.values())


def base_for(base: Base, folder: Path | None) -> Base:
    """Return a base with the new tokens of an adapter in its tokenizer; None: the base as it is.

    Raises:
        ModelError: If they are not known, or the tokenizer is another than that of its making.
        SettingsError: If the tokenizer has one of them already.
    """
    if folder is None:
        return base
    known = Manifest.read(folder).lora.add_tokens if has_manifest(folder) else ()
    own, ids = base.with_tokens(known), token_ids(read_adapter_config(folder))
    if unknown := sorted(i for i in ids if i >= len(own.tokenizer)):
        raise ModelError(
            f"{folder}: it was trained with tokens that the tokenizer of {base.name} does not have "
            f"(ids from {unknown[0]:,}): give --base a folder with the tokenizer of its making, "
            "and a row for each of its tokens (resize_token_embeddings of transformers)"
        )
    if known and ids != {*own.new_ids}:
        raise ModelError(
            f"{folder}: its new tokens have the ids {sorted(ids)}, and would get "
            f"{sorted(own.new_ids)} in the tokenizer of {base.name}, which is another than that of "
            "its making"
        )
    return own


def check_fit(folder: Path, base: Base) -> str | None:
    """Check that an adapter, where its manifest says what it was made on, was made on this base.

    Returns:
        A notice where the base is quantized otherwise than it was then, or where PEFT's
        configuration alone names a base, and another; else None.

    Raises:
        ModelError: If it was made on another.
    """
    if has_manifest(folder):
        manifest = Manifest.read(folder)
        manifest.check_base(base.identity, base.name, folder)
        then, now = manifest.base.quantization, base.quantization
        if not manifest.base.fingerprint or then == now:
            return None
        return (
            f"{folder} was made on {manifest.base.id} with {then or 'unquantized'} weights, and "
            f"{base.name} has {now or 'unquantized'} ones here: it works, and its numbers differ "
            "a little from those there"
        )
    named = read_adapter_config(folder).base_model_name_or_path
    if not named or _is_named(base, named):
        return None
    return (
        f"warning: {folder} was made on {named} by its {ADAPTER_CONFIG}, and has no manifest to "
        f"compare with; its scores mean nothing if {base.name} is another model"
    )


def _is_named(base: Base, name: str) -> bool:
    """Say whether a name, a path or a hub id, may well mean a base."""
    if (Path(name) / "config.json").is_file():
        return fingerprint_of(Path(name)) == base.fingerprint
    known = {base.name, hub_id_of(base.name), str(base.folder)}
    return Path(name).name.lower() in {Path(other).name.lower() for other in known}


def ancestor_of(folder: Path, manifest: Manifest) -> Ancestor:
    """Return the record of an adapter that another is initialized from."""
    return Ancestor(path=str(folder), data=manifest.data, fingerprint=manifest.adapter_fingerprint)


def fingerprint_of_adapter(folder: Path) -> str:
    """Return the SHA-256 of an adapter's weights file."""
    return sha256_of(folder / ADAPTER_WEIGHTS)


def save_adapter(model: PeftModel, folder: Path, *, initial: Path | None = None) -> None:
    """Write an adapter in PEFT's format. Only what it trains is written.

    What is written is an ordinary adapter, so nothing of its initialization is left in it.

    Args:
        model: The model with the adapter.
        folder: Where to.
        initial: The adapter as it was initialized: what is written is the difference to it.
    """
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    config.init_lora_weights = True
    config.eva_config = config.corda_config = config.lora_ga_config = None
    config.loftq_config = {}
    # PEFT keeps sets, whose order is another one in every process.
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if isinstance(value, set):
            setattr(config, name, sorted(value))
    model.save_pretrained(
        str(folder),
        save_embedding_layers=False,
        path_initial_model_for_weight_conversion=str(initial) if initial else None,
    )
    readme = folder / "README.md"
    readme.unlink(missing_ok=True)  # PEFT's empty template; ours follows


def base_record(base: Base) -> BaseRecord:
    """Return what a manifest says of a base."""
    return BaseRecord(
        id=base.name,
        revision=base.revision,
        fingerprint=base.fingerprint,
        quantization=base.quantization,
        unquantized=base.identity.unquantized,
        saved_quantized=base.identity.saved_quantized,
    )


def hub_id_of(base: str) -> str:
    """Return the hub id of a base's short name; another name as it is."""
    return {EMBEDDED: "d2lora/embedded", SMOLLM2: SMOLLM2_HUB_ID}.get(base, base)


def differences(wanted: Mapping[str, Any], present: LoraShape) -> dict[str, tuple[Any, Any]]:
    """Return the settings that contradict an adapter's shape: name -> (wanted, present)."""
    names = ("rank", "alpha", "targets", *PARTIAL, *BESIDE)
    have = {name: getattr(present, name) for name in names}
    flags = {"rslora": present.rslora, "dora": present.dora}
    clashes = {
        name: (wanted[name], value)
        for name, value in have.items()
        if wanted[name] is not None and wanted[name] != value
    }
    return clashes | {n: (True, have) for n, have in flags.items() if wanted[n] and not have}
