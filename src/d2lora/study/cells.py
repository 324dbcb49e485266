"""The cells of a study: arm x task x n x seed."""

from dataclasses import dataclass

from d2lora.study.plan import StudyPlan

BASE = "base"
"""The arm of the base alone, without examples: what forgetting is measured against."""


@dataclass(frozen=True)
class Cell:
    """Arm x task x n x seed. n is 0 where no task row is used."""

    arm: str
    task: str
    n: int
    seed: int

    def __str__(self) -> str:
        return f"{self.arm}, {self.task}, n = {self.n}, seed {self.seed}"


def cells_of(plan: StudyPlan) -> list[Cell]:
    """Return all cells of a plan; the base alone comes first of every task."""
    cells: list[Cell] = []
    for task in plan.tasks:
        cells.append(Cell(BASE, task, 0, 0))
        for arm in plan.arms:
            if arm.kind == "warm_only":
                n_seeds = plan.warm_up_seeds_of(arm.warm_up or "")
                cells += [Cell(arm.name, task, 0, seed) for seed in range(n_seeds)]
                continue
            sizes = (plan.shots,) if arm.kind == "few_shot" else plan.sizes
            cells += [Cell(arm.name, task, n, seed) for n in sizes for seed in range(plan.seeds)]
    return cells
