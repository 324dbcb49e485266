"""Run a study from Python and read what it found.

    python examples/study.py PLAN.yaml OUT

PLAN.yaml holds what differs from the defaults; `d2lora schema plan` has its keys.
"""

import sys
from pathlib import Path

from d2lora import StudySettings, read_findings, run_study

plan, out = sys.argv[1:3]
study = run_study(StudySettings(plan=(plan,), out=Path(out), executor="inline", quiet=True))
for cell, reason in study.failures.items():
    print(f"failed: {cell}: {reason}")
for sentence in read_findings(study.path).verdicts():
    print(sentence)
