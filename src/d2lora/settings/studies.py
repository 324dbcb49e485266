"""`d2lora study`, `d2lora report` and `d2lora demo`."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from d2lora.settings.core import Effect, Settings

OF_EXECUTORS = (
    Effect(
        ("address",),
        lambda s: s.executor == "ray",
        "is about a Ray cluster: give --executor ray, too",
    ),
    Effect(
        ("workers",),
        lambda s: s.executor != "inline",
        "is about parallel jobs, and --executor inline runs one after the other",
    ),
)
"""Where the settings of executors have an effect."""


class StudySettings(Settings):
    """`d2lora study PLAN...`: run the missing cells of a study."""

    positional: ClassVar[tuple[str, ...]] = ("plan",)
    settings_file: ClassVar[bool] = False
    plan: tuple[str, ...] = Field(min_length=1)
    """Plan: a YAML file, or the name of a shipped one. A later plan overrides an earlier one."""
    out: Path | None = None
    """Folder of the study. None: studies/NAME, after the plan."""
    store: Path | None = None
    """Folder of finished runs, which studies may share. None: `store` beside the study."""
    set: tuple[str, ...] = ()
    """Overrides of the plan, `name=value`, as in `seeds=3 tasks.titles.n_test=50`."""
    executor: Literal["processes", "inline", "ray"] = "processes"
    """Where jobs run: a pool of processes, this process, or a Ray cluster."""
    workers: int = Field(default=0, ge=0)
    """Parallel jobs. 0: one per GPU, or per core without GPUs."""
    address: str | None = None
    """Ray cluster to join, as in `ray://host:10001` or `auto`. None: start one on this machine."""
    keep_adapters: bool = True
    """Whether to keep the adapters of all cells."""
    dry_run: bool = False
    """List the cells, what is already done and the estimated time left; run nothing."""
    report: bool = True
    """Whether to write the report at the end."""
    quiet: bool = False
    """No progress bar and no messages."""

    effects: ClassVar[tuple[Effect, ...]] = OF_EXECUTORS


class ReportSettings(Settings):
    """`d2lora report STUDY`: write a study's report."""

    positional: ClassVar[tuple[str, ...]] = ("study",)
    settings_file: ClassVar[bool] = False
    study: str
    """Folder of a study."""
    out: Path | None = None
    """Folder to write; an earlier report in it is replaced. None: `report` in the study."""


class DemoSettings(Settings):
    """`d2lora demo`: the whole method in minutes."""

    base: Literal["smollm2", "embedded"] = "smollm2"
    """smollm2: titles of real abstracts with SmolLM2-135M-Instruct and a warm start that comes with
    d2lora; embedded: two tasks of a small invented world, where nothing can be installed."""
    out: Path = Path("demo-out")
    """Folder to write; an earlier demo in it is replaced."""
    sizes: tuple[int, ...] | None = None
    """Task sizes n. None: those of the plan, `demo` or `quick`."""
    seeds: int | None = Field(default=None, ge=1)
    """Seeds per cell. None: the plan's."""
    n_test: int | None = Field(default=None, ge=1)
    """Test rows per task. None: the plan's."""
    workers: int = Field(default=0, ge=0)
    """Parallel processes. 0: one per GPU, or per core without GPUs, on SmolLM2 at most 4."""
