"""Each method chooses what it says, the choice can be traced, and it feeds a warm-up."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2lora import (
    DataError,
    RunError,
    SelectSettings,
    SettingsError,
    WarmupSettings,
    select,
    warm_up,
)
from d2lora.adapters.base import load_base
from d2lora.cli import main
from d2lora.data.batches import collate
from d2lora.data.encode import Encoder
from d2lora.data.rows import Example, Message
from d2lora.embedded import general_rows, title_rows
from d2lora.runtime.console import Reporter
from d2lora.scoring.scorer import TokenScorer
from d2lora.selection.cache import FeatureCache, unit_rows
from d2lora.selection.datacard import distinct_grams, vendi_score
from d2lora.selection.gradients import GradientFeatures, Sketch
from d2lora.selection.methods import METHODS, Pick, Request, choose
from d2lora.settings import BaseSettings
from support import read_rows, write_rows

N_KINDS = 4


class Clusters:
    """A pool of four kinds of rows, 25 each, and a task like the last kind."""

    n_pool = 100

    def __init__(self, n_task: int = 4, n_files: int = 1) -> None:
        rng = np.random.default_rng(0)
        centres = np.eye(N_KINDS, 16)
        self.kinds = np.arange(self.n_pool) % N_KINDS
        noise = rng.normal(size=(self.n_pool + n_task, 16)) * 0.05
        wanted = np.full(n_task, N_KINDS - 1) if n_files == 1 else np.arange(n_task) % n_files
        vectors = unit_rows((centres[[*self.kinds, *wanted]] + noise).astype(np.float32))
        self._pool, self._task = vectors[: self.n_pool], vectors[self.n_pool :]
        self._files = [0] * n_task if n_files == 1 else wanted.tolist()

    def sources(self) -> list[str]:
        return ["rare" if index < 5 else "common" for index in range(self.n_pool)]

    def task_files(self) -> list[int]:
        return self._files

    def texts(self) -> tuple[list[str], list[str]]:
        words = ["red apple pie", "deep blue sea", "old stone bridge", "fast green train"]
        pool = [f"{words[kind]} {words[kind]} number{i}" for i, kind in enumerate(self.kinds)]
        return pool, [words[-1]] * len(self._task)

    def embeddings(self) -> tuple[Any, Any]:
        return self._pool, self._task

    gradients = embeddings

    def losses(self) -> Any:
        return np.arange(self.n_pool, dtype=np.float32)


def picks(method: str, m: int = 12, features: Clusters | None = None, **request: Any) -> list[Pick]:
    return choose(method, features or Clusters(), Request(m, **{"seed": 0, **request}))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_m_distinct_rows_the_same_for_the_same_seed(method: str) -> None:
    first = picks(method)
    assert len({pick.index for pick in first}) == 12
    assert first == picks(method)
    assert len({pick.index for pick in picks(method, 100)}) == 100


@pytest.mark.parametrize("method", ["random", "stratified", "dsir", "diverse", "perplexity"])
def test_another_seed_gives_another_choice(method: str) -> None:
    assert picks(method) != picks(method, seed=1)


@pytest.mark.parametrize("method", ["similar", "dsir", "gradient"])
def test_methods_that_see_the_task_choose_its_kind(method: str) -> None:
    kinds = Clusters().kinds[[pick.index for pick in picks(method)]]
    assert (kinds == N_KINDS - 1).mean() >= 0.9


def test_diverse_covers_every_kind_with_as_few_rows_as_there_are_kinds() -> None:
    kinds = Clusters().kinds[[pick.index for pick in picks("diverse", N_KINDS)]]
    assert set(kinds) == set(range(N_KINDS))


def test_the_knob_of_mixture_goes_from_coverage_to_likeness() -> None:
    shares = []
    for relevance in (0.0, 0.5, 1.0):
        chosen = picks("mixture", 16, relevance=relevance)
        shares.append(float((Clusters().kinds[[p.index for p in chosen]] == N_KINDS - 1).mean()))
    assert shares[0] <= 0.5 < shares[2]
    assert shares == sorted(shares)
    assert picks("mixture", 16, relevance=0.0) == picks("diverse", 16)


def test_several_task_files_have_an_equal_part() -> None:
    features = Clusters(n_task=6, n_files=2)
    kinds = features.kinds[[pick.index for pick in picks("similar", 10, features)]]
    assert sorted(kinds) == [0] * 5 + [1] * 5


def test_stratified_takes_sources_alike_and_small_ones_whole() -> None:
    rare = [pick.index for pick in picks("stratified", 8) if pick.index < 5]
    assert len(rare) == 4
    assert {pick.index for pick in picks("stratified", 20)} >= set(range(5))


def test_perplexity_leaves_out_the_easiest_and_the_hardest() -> None:
    assert {pick.index for pick in picks("perplexity", 60)} == set(range(20, 80))


@pytest.mark.parametrize("method", ["similar", "dsir", "gradient", "mixture"])
def test_a_method_that_needs_a_task_says_so(method: str) -> None:
    with pytest.raises(SettingsError, match="--for"):
        picks(method, 3, Clusters(n_task=0))


def test_a_missing_task_is_reported_before_anything_is_computed(tmp_path: Path) -> None:
    asked = SelectSettings(data=("nowhere",), m=2, method="gradient", out=tmp_path / "chosen")
    with pytest.raises(SettingsError, match="--method gradient needs examples of the task"):
        select(asked)


def test_the_vendi_score_counts_kinds() -> None:
    assert vendi_score(np.eye(7, dtype=np.float32)) == pytest.approx(7)
    assert vendi_score(np.ones((7, 7), dtype=np.float32)) == pytest.approx(1)
    two = np.kron(np.eye(2), np.ones((5, 5))).astype(np.float32)
    assert vendi_score(two) == pytest.approx(2)


def test_distinct_grams_are_a_share() -> None:
    assert distinct_grams(["a b c", "a b d"], 2) == pytest.approx(3 / 4)


def test_a_sketch_keeps_inner_products_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 3000, generator=generator)
    mixed = one + other
    found = [float(s(one) @ s(mixed)) for s in (Sketch.of(3000, 256, seed) for seed in range(200))]
    error = np.std(found) / len(found) ** 0.5
    assert np.mean(found) == pytest.approx(float(one @ mixed), abs=4 * error)
    assert error < 0.02 * float(one @ mixed)


@pytest.fixture
def warmed(tiny_base: str) -> Any:
    base = load_base(BaseSettings(base=tiny_base))
    encoder = Encoder.of(base, None)
    rows = [
        Example((Message("user", row["prompt"]),), row["completion"])
        for row in general_rows("train", 8)
    ]
    features = GradientFeatures(
        base, encoder, rows, n_steps=3, width=4096, max_tokens=128, seed=0,
        reporter=Reporter(quiet=True), fast_when=True,
    )  # fmt: skip
    yield base, encoder, rows, features
    features.close()


def test_a_gradient_predicts_how_the_loss_moves(warmed: Any) -> None:
    base, encoder, rows, features = warmed
    gradient = features.gradient(rows[0])
    batch = collate([encoder.encode(rows[0])], base.pad_id)
    parameters = [p for p in features.model.parameters() if p.requires_grad]
    scorer = TokenScorer(features.model)

    def moved(size: float) -> float:
        begin = 0
        with torch.no_grad():
            for parameter in parameters:
                part = gradient[begin : begin + parameter.numel()].view_as(parameter)
                parameter.add_(part, alpha=size)
                begin += parameter.numel()
            return float(-scorer(batch).mean())

    step = 1e-3
    up, down = moved(step), moved(-2 * step)
    moved(step)
    assert (up - down) / (2 * step) == pytest.approx(float(gradient.square().sum()), rel=0.02)


def test_the_direction_is_the_step_that_adam_takes(warmed: Any) -> None:
    _, _, rows, features = warmed
    moments, gradient = features.moments, features.gradient(rows[0])
    parameter = torch.nn.Parameter(torch.zeros_like(gradient))
    adam = torch.optim.Adam([parameter], lr=1.0, betas=moments.betas)
    adam.state[parameter] = {
        "step": torch.tensor(float(moments.step)),
        "exp_avg": moments.first.clone(),
        "exp_avg_sq": moments.second.clone(),
    }
    parameter.grad = gradient
    adam.step()
    torch.testing.assert_close(moments.direction(gradient), -parameter.detach())


def test_a_block_of_features_is_computed_once(tmp_path: Path) -> None:
    rows = [Example((Message("user", str(i)),), "a") for i in range(300)]
    seen: list[int] = []

    def lengths(block: Any) -> Any:
        seen.append(len(block))
        return np.array([[len(row.prompt[0].content)] for row in block], dtype=np.float32)

    def ask(fingerprint: str, examples: list[Example]) -> Any:
        cache = FeatureCache(tmp_path, Reporter(quiet=True))
        return cache.rows("lengths", fingerprint, examples, 1, lengths)

    first = ask("a", rows)
    assert seen == [256, 44]
    np.testing.assert_array_equal(ask("a", rows), first)
    assert seen == [256, 44]
    ask("a", [*rows, rows[0]])
    assert seen == [256, 44, 45]
    ask("b", rows)
    assert seen == [256, 44, 45, 256, 44]


@pytest.fixture
def pool(tmp_path: Path) -> str:
    rows = [{**row, "source": f"kind {i % 3}"} for i, row in enumerate(general_rows("train", 60))]
    rows += [
        {"prompt": f"Write a title for this text.\n\n{row['text']}", "completion": row["title"]}
        for row in title_rows("train", 20)
    ]
    return write_rows(tmp_path / "pool.jsonl", rows)


def settings(folder: Path, base: str, pool: str, **values: Any) -> SelectSettings:
    own = {"out": folder / "chosen", "cache": folder / "cache", "quiet": True, "m": 8}
    return SelectSettings(**{**own, "base": base, "data": (pool,), **values})


@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_select_writes_chosen_rows_reasons_and_a_card(
    tmp_path: Path, tiny_base: str, pool: str, titles: str, method: str
) -> None:
    few = {"gradient_steps": 2, "gradient_width": 64} if method == "gradient" else {}
    asked = settings(tmp_path, tiny_base, pool, method=method, for_task=(titles,), **few)
    chosen = select(asked)
    rows, reasons = read_rows(chosen.data), read_rows(chosen.path / "reasons.jsonl")
    original = read_rows(Path(pool))
    assert len(rows) == 8
    assert [original[reason["line"] - 1] for reason in reasons] == rows
    assert json.loads((chosen.path / "done.json").read_text()) == {"kind": "selection", "m": 8}
    card = json.loads((chosen.path / "card.json").read_text())
    assert card["m"] == 8
    assert card["n_clean"] + sum(card["rejected"].values()) == card["n_pool"] == 80
    assert 1 <= card["vendi_score"]["chosen"] <= 8
    again = select(asked.changed(out=tmp_path / "again"))
    assert read_rows(again.data) == rows


def test_the_method_follows_from_whether_there_is_a_task(
    tmp_path: Path, tiny_base: str, pool: str, titles: str
) -> None:
    asked = settings(tmp_path, tiny_base, pool)
    assert select(asked).card["method"] == "stratified"
    named = asked.changed(for_task=(titles,), out=tmp_path / "named")
    assert select(named).card["method"] == "dsir"


def test_similar_finds_the_rows_of_the_task_in_a_mixed_pool(
    tmp_path: Path, tiny_base: str, pool: str, titles: str
) -> None:
    chosen = select(
        settings(tmp_path, tiny_base, pool, for_task=(titles,), method="similar", embedding="words")
    )
    assert all("Write a title" in row["prompt"] for row in read_rows(chosen.data))
    likeness = chosen.card["similarity_to_task"]
    assert likeness["chosen"] > likeness["random"]


def test_texts_of_rows_stay_inside_their_fence(tmp_path: Path, tiny_base: str) -> None:
    nasty = "```\n# A heading of the row\n<script>alert(1)</script>"
    rows = write_rows(tmp_path / "pool.jsonl", [{"prompt": nasty, "response": "Closed.\n"}])
    chosen = select(settings(tmp_path, tiny_base, rows, m=1))
    page = (chosen.path / "README.md").read_text()
    before, _, after = page.partition("````text\n")
    assert "# A heading" not in before
    assert after.index("# A heading") < after.index("\n````")


def test_asking_for_more_rows_than_are_clean_is_reported(
    tmp_path: Path, tiny_base: str, pool: str
) -> None:
    with pytest.raises(SettingsError, match=r"only \d+ rows are left"):
        select(settings(tmp_path, tiny_base, pool, m=1000))
    assert not (tmp_path / "chosen").exists()


def test_a_pool_of_test_rows_leaves_nothing(tmp_path: Path, tiny_base: str, pool: str) -> None:
    with pytest.raises(DataError, match="no row of the pool is left"):
        select(settings(tmp_path, tiny_base, pool, keep_out=(pool,)))


def test_a_finished_choice_is_not_overwritten(tmp_path: Path, tiny_base: str, pool: str) -> None:
    asked = settings(tmp_path, tiny_base, pool)
    select(asked)
    with pytest.raises(RunError, match="finished run"):
        select(asked)


def test_an_embedding_that_is_not_installed_names_the_extra(
    tmp_path: Path, tiny_base: str, pool: str, titles: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    named: dict[str, Any] = {"method": "similar", "embedding": "no/such-model"}
    asked = settings(tmp_path, tiny_base, pool, for_task=(titles,), **named)
    with pytest.raises(SettingsError, match=r"pip install 'd2lora\[embeddings\]'"):
        select(asked)


def test_an_embedding_that_the_method_would_not_look_at_is_an_error(
    tmp_path: Path, tiny_base: str, pool: str, titles: str
) -> None:
    named: dict[str, Any] = {"for_task": (titles,), "embedding": "words"}
    with pytest.raises(SettingsError, match=r"diverse, similar or mixture alone"):
        settings(tmp_path, tiny_base, pool, **named)
    select(settings(tmp_path, tiny_base, pool, method="mixture", **named))


def test_the_command_takes_a_pool_first_and_short_options(
    tmp_path: Path, tiny_base: str, pool: str, titles: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D2LORA_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "chosen"
    words = ["select", pool, "--for", titles, "-m", "5", "--base", tiny_base, "--out", str(out)]
    words += ["--method", "similar"]
    assert main([*words, "--quiet"]) == 0
    assert len(read_rows(out / "data.jsonl")) == 5
    assert any((tmp_path / "cache" / "features").glob("*.npy"))
    again = tmp_path / "again"
    assert main(["select", str(out / "settings.yaml"), "--out", str(again)]) == 0
    assert read_rows(again / "data.jsonl") == read_rows(out / "data.jsonl")


def test_a_warm_up_says_how_its_rows_were_chosen(
    tmp_path: Path, tiny_base: str, pool: str, titles: str
) -> None:
    chosen = select(settings(tmp_path, tiny_base, pool, for_task=(titles,)))
    common: dict[str, Any] = {"base": tiny_base, "max_steps": 1, "rank": 2, "quiet": True}
    apart = warm_up(
        WarmupSettings(**common, data=(str(chosen.data),), out=tmp_path / "apart")
    )  # fmt: skip
    assert "8 rows selected by dsir" in apart.manifest.selection
    at_once = warm_up(
        WarmupSettings(
            **common, data=(pool,), m=8, select="stratified", out=tmp_path / "at-once",
        )
    )  # fmt: skip
    assert "8 rows selected by stratified" in at_once.manifest.selection
    assert at_once.manifest.data[0]["rows"] == 8
    assert (tmp_path / "at-once" / "selection" / "README.md").is_file()


@pytest.mark.parametrize(
    ("values", "message"),
    [({"select": "random"}, "needs -m"), ({"for_task": ("x",)}, "add one, as in --select")],
)
def test_half_a_choice_in_warmup_is_an_error(
    tmp_path: Path, tiny_base: str, general: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        warm_up(
            WarmupSettings(
                base=tiny_base, data=(general,), out=tmp_path / "w", quiet=True, **values
            )
        )
