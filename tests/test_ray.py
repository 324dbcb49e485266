"""A study on a Ray cluster of two nodes gives the same results, even if one is lost on the way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from d2lora.settings import StudySettings
from d2lora.study.run import run_study
from support import small_plan

pytest.importorskip("ray", reason="Ray is not installed")

# Ray starts processes and threads of its own; apart from pytest they cannot disturb other tests.
DRIVER = """
import json, sys, threading, time
from pathlib import Path
from ray.cluster_utils import Cluster

from d2lora.settings import StudySettings
from d2lora.study.run import run_study

plan, out, store = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
other = cluster.add_node(num_cpus=1)

def lose_a_node():
    while len(list(Path(store).glob("*/result.json"))) < 3:
        time.sleep(0.1)
    cluster.remove_node(other, allow_graceful=False)
    Path(out).with_name("lost").write_text("one node is gone")

threading.Thread(target=lose_a_node, daemon=True).start()
study = run_study(
    StudySettings(
        plan=(plan,), out=Path(out), store=Path(store), executor="ray", address=cluster.address,
        quiet=True, report=False,
    )
)
print(json.dumps(study.failures))
"""


@pytest.mark.slow
def test_a_study_on_ray_survives_the_loss_of_a_node(
    tmp_path: Path, tiny_base: str, general: str, titles: str
) -> None:
    plan = {
        **small_plan(tmp_path, tiny_base, general, titles),
        "learning_rates": [0.01], "epochs": {}, "general_text": [], "choices": [],
    }  # fmt: skip
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan))
    here = run_study(
        StudySettings(
            plan=(str(path),), out=tmp_path / "a" / "study", executor="inline", quiet=True,
            report=False,
        )
    )  # fmt: skip
    out, store = tmp_path / "b" / "study", tmp_path / "b" / "store"
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(path), str(out), str(store)],
        capture_output=True, text=True, check=False, timeout=500,
        env={**os.environ, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.strip().splitlines()[-1]) == {}
    assert (tmp_path / "b" / "lost").exists(), "the study ended before a node was lost"
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    kept = ("arm", "n", "seed", "scores", "learning_rate")
    assert [{k: r[k] for k in kept} for r in rows] == [
        {k: r[k] for k in kept} for r in here.results
    ]
