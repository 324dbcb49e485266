"""Settings that can have no effect where they are given are errors, in words."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from d2lora.cli import main
from d2lora.commands import COMMANDS
from d2lora.errors import SettingsError
from d2lora.settings import DATA_INITS, AdaptSettings, ConvertSettings, Settings
from d2lora.study.heeded import faults_of_own, faults_of_shared
from d2lora.study.plan import StudyPlan
from d2lora.study.read_plan import read_plan, shipped
from d2lora.study.recipes import adapt_settings
from d2lora.training.data_initialization import DATA_DRIVEN

ADAPT = "adapt --data d.jsonl --out out"
WARMUP = "warmup --data d.jsonl --out out"
SELECT = "select d.jsonl -m 5 --out out"
EVALUATE = "evaluate --out out"
CONVERT = "convert --adapter a --out out"
INSPECT = "inspect"
FIT = "fit --data d.jsonl --out out"

IDLE = {
    "beta": f"{ADAPT} --beta 0.5",
    "beta, at its default": f"{WARMUP} --beta 0.1",
    "label_smoothing": f"{ADAPT} --objective orpo --label-smoothing 0.1",
    "reference": f"{ADAPT} --objective orpo --reference base",
    "orpo_prompt_loss": f"{ADAPT} --objective dpo --orpo-prompt-loss",
    "replay_n": f"{ADAPT} --replay-n 1000",
    "replay_loss": f"{FIT} --replay-loss kl",
    "keep_out_words": f"{ADAPT} --keep-out-words 8",
    "keep_out_words, of a pool": f"{SELECT} --keep-out-words 13",
    "keep_out_words, of a fit": f"{FIT} --keep-out-words 8",
    "stop_step": f"{ADAPT} --max-steps 5 --stop-step 6",
    "eval_every": f"{ADAPT} --eval-every 5",
    "patience": f"{ADAPT} --patience 2",
    "fold": f"{ADAPT} --validation-data v.jsonl --fold 0 4",
    "validation_fraction": f"{ADAPT} --validation-fraction 0.2 --fold 0 4",
    "validation_fraction, at its default": f"{WARMUP} --validation-fraction 0.02 --fold 0 4",
    "init_samples": f"{ADAPT} --init pissa --init-samples 8",
    "init_scale": f"{ADAPT} --init pissa --init-scale 0.5",
    "seed_init": f"{ADAPT} --init warm --seed-init 1",
    "seed_dropout": f"{ADAPT} --seed-dropout 1",
    "track_project": f"{ADAPT} --track-project d2lora",
    "meta_rows": f"{WARMUP} --meta-rows 16",
    "shots": f"{WARMUP} --objective orpo --shots 2",
    "for_task": f"{WARMUP} --for t.jsonl",
    "for_card": f"{WARMUP} --select random --for-card titles",
    "for_card, of a selection": f"{SELECT} --for-card titles",
    "embedding": f"{SELECT} --method dsir --embedding words",
    "relevance": f"{SELECT} --method similar --relevance 0.4",
    "gradient_steps": f"{SELECT} --method perplexity --gradient-steps 9",
    "gradient_width": f"{SELECT} --gradient-width 128",
    "feature_tokens": f"{SELECT} --method diverse --embedding words --feature-tokens 64",
    "quantization": f"{SELECT} --method dsir --quantization nf4",
    "limit": f"{EVALUATE} --general-text g.jsonl --limit 3",
    "task": f"{EVALUATE} --general-text g.jsonl --task titles",
    "max_new_tokens": f"{EVALUATE} --data lm_eval:piqa --max-new-tokens 9",
    "max_new_tokens, without a task": f"{EVALUATE} --general-text g.jsonl --max-new-tokens 9",
    "chat_format, of the harness": f"{EVALUATE} --choices lm_eval:piqa --chat-format plain",
    "shots_seed": f"{EVALUATE} --data d.jsonl --shots-seed 1",
    "top_p": "generate --prompt x --top-p 0.5",
    "seed": "generate --prompt x --seed 0",
    "mix_weights": f"{CONVERT} --rank 4 --mix-weights 1 1",
    "mix_method": f"{CONVERT} --rank 4 --mix-method cat",
    "shard_size": f"{CONVERT}.gguf --merge --shard-size 1MB",
    "base": f"{CONVERT} --rank 4 --base embedded",
    "quantization, of an adapter": f"{CONVERT} --scale 0.5 --quantization nf4",
    "seed, of a scale": f"{CONVERT} --scale 0.5 --seed 1",
    "other": f"{INSPECT} --data d.jsonl --other a",
    "plot": f"{INSPECT} --data d.jsonl --plot p.png",
    "chat_format": f"{INSPECT} --adapter a --chat-format plain",
    "revision": f"{INSPECT} --adapter a --revision main",
    "n_test": f"{FIT} --n-test 3",
    "address": f"{FIT} --address auto",
    "workers": "study quick --executor inline --workers 2",
}


def refused(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that is to be refused; return what it says, without line ends and boxes."""
    try:
        code: object = main(line.split())
    except SystemExit as stopped:  # tyro ends the process itself
        code = stopped.code
    assert code == 2
    return " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().err).split())


@pytest.mark.parametrize("case", list(IDLE))
def test_an_option_without_effect_is_refused_even_at_its_default(
    case: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = case.partition(",")[0]
    assert f"wrong settings: - {name} " in refused(IDLE[case], capsys)
    assert not list(tmp_path.iterdir())


def test_all_of_them_are_told_at_once_and_a_settings_file_is_no_way_around(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"data: d.jsonl\nout: {tmp_path / 'out'}\nbeta: 0.5\npatience: 2\n")
    error = refused(f"adapt {file} --replay-weight 1", capsys)
    assert all(f" - {name} " in error for name in ("beta", "patience", "replay_weight"))


def test_resolved_settings_hold_all_defaults_and_are_taken_back() -> None:
    settings = AdaptSettings(data=("d",), out=Path("o"))
    assert AdaptSettings(**yaml.safe_load(settings.to_yaml())) == settings


def test_what_has_an_effect_is_taken() -> None:
    own: dict[str, Any] = {"data": ("d",), "out": Path("o")}
    taken: list[dict[str, Any]] = [
        {"objective": "dpo", "beta": 0.5, "label_smoothing": 0.1, "reference": "base"},
        {"objective": "orpo", "beta": 0.5, "orpo_prompt_loss": True},
        {"validation_data": ("v",), "patience": 2, "eval_every": 5},
        {"fold": (0, 4), "patience": 2},
        {"max_steps": 5, "stop_step": 5},
        {"init": "warm", "init_scale": 0.5, "seed_dropout": 1, "dropout": 0.1},
        {"dropout": 0.1, "seed_dropout": 1, "seed_init": 1},
        {"init": "eva", "init_samples": 8},
        {"keep_best": False, "measure_start": False},  # nothing happens, as is asked for
    ]
    for values in taken:
        assert AdaptSettings(**own, **values).max_length == 1024
    merged = ConvertSettings(adapter="a", out=Path("o"), merge=True, base="b", quantization="nf4")
    assert merged.base == "b"


def test_every_effect_is_about_settings_that_there_are() -> None:
    kinds: list[type[Settings]] = [StudyPlan, *(command.kind for command in COMMANDS.values())]
    for kind in kinds:
        for parent in kind.__mro__:
            for effect in vars(parent).get("effects", ()):
                assert set(effect.names) <= kind.model_fields.keys()
    assert set(DATA_INITS) == DATA_DRIVEN.keys()


def plan_file(folder: Path, text: str) -> str:
    file = folder / "plan.yaml"
    file.write_text(text)
    return str(file)


IDLE_IN_PLANS = {
    "shots": ("shots: 2", "shots is about the arm `few_shot`"),
    "pairs": ("pairs: {samples: 2}", "every objective here is sft"),
    "warm-ups of no arm": ("arms: [fresh, few_shot]\nwarm_up_seeds: 2", "no arm has one"),
    "warm-ups made before": (
        "warm_ups: {a: {path: x}}\nwarm_up_seeds: 3", "all are made already",
    ),
    "held-out rows for nothing": (
        "steps: {}\nlearning_rates: [0.001]\nfolds: 2", "nothing is chosen",
    ),
    "a fraction beside folds": ("folds: 2\nvalidation_fraction: 0.5", "not heeded beside folds"),
    "a warm-up of a fresh arm": (
        "arms: [{kind: fresh, warm_up: general}, warm]", "warm_up is of arms that have one",
    ),
    "training of an untrained arm": (
        "arms: [fresh, {kind: few_shot, adapt: {rank: 3}}]", "adapt is of arms that are trained",
    ),
    "one objective's setting with another": (
        "adapt: {beta: 0.5}", "adapt: beta is a setting of --objective dpo and orpo",
    ),
    "an arm's own": (
        "arms: [fresh, {kind: warm, adapt: {init_samples: 8}}]",
        "arms, warm: adapt: init_samples is about",
    ),
    "the shape of a warm start": (
        "arms: [fresh, {kind: warm, adapt: {rank: 4}}]", "rank is the warm start's",
    ),
    "a strength of nothing": (
        "arms: [fresh, {kind: warm_a, adapt: {init_scale: 0.5}}]", "init_scale is 0",
    ),
    "an order of averaged runs": (
        "arms: [{kind: fresh, average_of: 2, adapt: {seed_order: 1}}]", "seed_order is another",
    ),
    "a warm-up's own": ("warm_ups: {a: {meta_rows: 4}}", "warm_ups.a: meta_rows is a setting of"),
    "a learning rate that the study chooses": (
        "adapt: {learning_rate: 0.1}", "`learning_rate` is set by the study itself",
    ),
    "a mixture of a warm-up in tokens": (
        "arms: [fresh, mixed]\nwarm_up: {max_tokens: 500}", "cannot be mixed with a task's rows",
    ),
    "small tasks of a mixture": (
        "arms: [fresh, mixed]\nwarm_up: {meta_steps: 8}", "(meta_steps) cannot be mixed",
    ),
    "shots of a mixture": (
        "arms: [fresh, mixed]\nwarm_up: {shots: 2}", "(shots) cannot be mixed",
    ),
    "a mixture of a warm-up at a higher rank": (
        "arms: [fresh, mixed]\nwarm_up: {train_rank: 64}", "(train_rank) cannot be mixed",
    ),
    "two lengths": (
        "epochs: {16: 3}\nadapt: {max_steps: 5}", "`max_steps` and the plan's `epochs` both set",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(IDLE_IN_PLANS))
def test_a_plan_is_refused_for_what_no_run_of_it_heeds(case: str, tmp_path: Path) -> None:
    text, message = IDLE_IN_PLANS[case]
    with pytest.raises(SettingsError) as raised:
        read_plan(plan_file(tmp_path, text))
    assert message in str(raised.value)


def test_a_plan_shares_settings_between_arms_of_which_some_heed_them(tmp_path: Path) -> None:
    text = """
adapt: {beta: 0.5, init_scale: 0.5, rank: 4, patience: 2}
arms:
  - fresh
  - {kind: warm, adapt: {objective: dpo}}
"""
    plan = read_plan(plan_file(tmp_path, text))
    assert faults_of_own(plan) == faults_of_shared(plan) == []
    (fresh, warm) = plan.arms
    plain = adapt_settings(plan, fresh, "titles", 16, 0, Path())
    assert (plain.beta, plain.init_scale, plain.rank, plain.patience) == (0.1, 1.0, 4, 0)
    held = adapt_settings(plan, warm, "titles", 16, 0, Path(), validation_fraction=0.25)
    assert (held.beta, held.init_scale, held.patience) == (0.5, 0.5, 2)


def test_a_later_plan_may_say_what_the_arms_of_an_earlier_one_have_no_use_for(
    tmp_path: Path,
) -> None:
    plan = plan_file(tmp_path, "shots: 2\n")
    with pytest.raises(SettingsError, match="few_shot"):
        read_plan(plan)
    assert read_plan("scarcity", plan).shots == 2
    with pytest.raises(SettingsError, match="few_shot"):
        read_plan("scarcity", plan, changes=("shots=2",))


def test_a_plan_may_be_narrowed_to_some_of_its_arms(tmp_path: Path) -> None:
    plan = plan_file(tmp_path, "arms: [fresh, few_shot]\nshots: 2\nadapt: {rank: 4}\n")
    assert len(read_plan(plan, changes=("arms=[warm]",)).arms) == 1


@pytest.mark.parametrize("name", shipped())
def test_a_resolved_plan_is_taken_back_as_it_is(name: str, tmp_path: Path) -> None:
    plan = read_plan(name)
    path = tmp_path / "plan.yaml"
    path.write_text(plan.to_yaml(), encoding="utf-8")
    assert read_plan(str(path)) == plan


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_plan_heeds_all_that_it_says(name: str) -> None:
    assert read_plan(name).arms
