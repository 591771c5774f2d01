"""A sweep asked for from a run folder is the same sweep, to the bit; flags go before what the file says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_fast.cli.main import main
from cxr_fast.config import SweepSpec, TrainSpec, to_dict
from cxr_fast.data.tables.corrections import describe_source
from cxr_fast.errors import InputError
from cxr_fast.grid.points import make_points
from cxr_fast.recipes import sweep_spec
from cxr_fast.runs.request import describe_changes, grid_flags, lacking_labels, read_request
from tests.helpers.runs import arrays


def sweep(*words: object) -> Result:
    return CliRunner().invoke(main, ["sweep", *map(str, words), "--device", "cpu", "--threads", "1"])


def info(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text(encoding="utf-8"))


@given(
    st.lists(
        st.sampled_from(["lr=1e-5,2e-05,0.003", "ema=0.0,0.99", "flip=true,false", "patience=none,3", "loss=bce,asl"]),
        unique=True,
    )
)
@settings(max_examples=40)
def test_a_grid_is_read_back_as_it_was_asked_for(flags: list[str]) -> None:
    points = make_points(TrainSpec(), flags)
    again = make_points(TrainSpec(), grid_flags([point.changes for point in points]))
    assert again == points


def test_the_same_settings_give_the_same_bits(toy_run: Path, tmp_path: Path) -> None:
    made = sweep("--from", toy_run, "--out", tmp_path / "again")
    assert made.exit_code == 0, made.output
    assert f"settings of {toy_run}, all of them" in made.output
    one, two = arrays(toy_run), arrays(tmp_path / "again")
    assert all(one[key].tobytes() == two[key].tobytes() for key in one)
    assert (toy_run / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()
    assert info(toy_run)["spec"] == info(tmp_path / "again")["spec"]


def test_flags_go_before_the_file_and_a_dry_run_writes_nothing(toy_run: Path, tmp_path: Path) -> None:
    words = ["--from", toy_run / "run.json", "--epochs", "1,2", "--lr", "1e-4", "--dry-run", "--out", tmp_path / "x"]
    planned = sweep(*words, "--grid", "ema=0,0.9")
    assert planned.exit_code == 0, planned.output
    said = "epochs [1, 2] instead of [4, 5, 6]; lr 0.0001 instead of 0.001; grid ema=0,0.9 instead of none"
    assert said in planned.output
    assert "3 folds by group" in planned.output
    assert not list(tmp_path.iterdir())


def test_a_grid_and_a_given_hold_out_come_back(toy_cache: Path, toy_run: Path, tmp_path: Path) -> None:
    flags = ["--epochs", "1", "--folds", "3", "--batch-size", "8"]
    first = sweep(toy_cache, *flags, "--grid", "lr=1e-4,1e-3", "--split-from", toy_run, "--out", tmp_path / "one")
    assert first.exit_code == 0, first.output
    request = read_request(tmp_path / "one")
    assert request.grid == ("lr=1e-4,1e-3",)
    assert request.split_from == tmp_path / "one"
    again = sweep("--from", tmp_path / "one", "--out", tmp_path / "two")
    assert again.exit_code == 0, again.output
    one, two = arrays(tmp_path / "one"), arrays(tmp_path / "two")
    assert all(one[key].tobytes() == two[key].tobytes() for key in one)


def test_draws_and_seeds_come_back(toy_cache: Path, tmp_path: Path) -> None:
    flags = ["--epochs", "1", "--folds", "2", "--train-blocks", "0", "--trials", "2", "--seed", "3"]
    grid = ["--grid", "lr=1e-4..1e-2:log", "--grid", "seed=0..1"]
    first = sweep(toy_cache, *flags, *grid, "--out", tmp_path / "one")
    assert first.exit_code == 0, first.output
    request = read_request(tmp_path / "one")
    assert (request.grid, request.trials) == (("lr=1e-4..1e-2:log", "seed=0..1"), 2)
    planned = sweep("--from", tmp_path / "one", "--out", tmp_path / "two", "--dry-run", "--trials", "3")
    assert "but trials 3 instead of 2" in planned.output
    assert "Configurations to train" in planned.output
    again = sweep("--from", tmp_path / "one", "--out", tmp_path / "two")
    assert again.exit_code == 0, again.output
    assert ", all of them" in again.output
    one, two = arrays(tmp_path / "one"), arrays(tmp_path / "two")
    assert all(one[key].tobytes() == two[key].tobytes() for key in one)


def test_an_unfinished_run_of_draws_says_how_they_are_drawn(tmp_path: Path) -> None:
    folder = tmp_path / "half.partial"
    folder.mkdir()
    plan = {"spec": to_dict(sweep_spec("tuned")), "grid": [{"lr": 1e-4}, {"lr": 1e-5}]}
    (folder / "plan.json").write_text(json.dumps(plan))
    about = {"cache": str(tmp_path / "c.h5"), "grid": ["lr=1e-5..1e-3:log"], "trials": 2}
    (folder / "about.json").write_text(json.dumps(about))
    request = read_request(folder)
    assert (request.grid, request.trials, request.cache) == (("lr=1e-5..1e-3:log",), 2, tmp_path / "c.h5")


def test_an_unfinished_run_goes_on_under_its_own_name(toy_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half.partial"
    folder.mkdir()
    plan = {"spec": to_dict(sweep_spec("tuned")), "grid": [{"lr": 1e-4}, {"lr": 1e-5}]}
    (folder / "plan.json").write_text(json.dumps(plan))
    request = read_request(folder)
    assert (request.out, request.cache, request.spec) == (tmp_path / "half", None, sweep_spec("tuned"))
    assert request.grid == ("lr=0.0001,1e-05",)
    (folder / "about.json").write_text(json.dumps({"cache": str(tmp_path / "gone.h5")}))
    with pytest.raises(InputError, match=r"gone\.h5, the cache of .*half\.partial, is not there; name it"):
        read_request(folder / "plan.json").existing_cache()
    (folder / "plan.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        read_request(folder)


def test_changes_are_named() -> None:
    before = read_request_of(SweepSpec())
    assert describe_changes(before, SweepSpec(), (), None) == []
    assert describe_changes(before, SweepSpec(seed=2), (), None) == ["seed 2 instead of 0"]


def read_request_of(spec: SweepSpec) -> Any:
    from cxr_fast.runs.request import SweepRequest

    return SweepRequest(source=Path("run"), spec=spec, grid=(), cache=None)


def test_what_no_flag_can_ask_for_is_refused(toy_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(toy_run, run)
    own = info(run)
    (run / "run.json").write_text(json.dumps(own | {"custom": {"head": "mine.make_head", "loss": None}}))
    with pytest.raises(InputError, match=r"trained with mine\.make_head, given in Python"):
        read_request(run)
    (run / "run.json").write_text(json.dumps(own | {"cache": own["cache"] | {"labels_from": "new labels"}}))
    assert lacking_labels(run, ()) == "--manifest (new labels)"
    assert lacking_labels(run, ("manifest",)) == ""
    refused = sweep("--from", run)
    assert refused.exit_code == 2
    assert "labels came from --manifest (new labels) too; give it again" in refused.output
    made = {"file": "marks.csv", "sha256": "0", "flipped": 1_200, "unknown": 3}
    for source, said in (("the cache", ""), ("new labels", "--manifest (new labels) and ")):
        labels = {"cache": own["cache"] | {"labels_from": describe_source(source, made)}, "corrections": made}
        (run / "run.json").write_text(json.dumps(own | labels))
        assert lacking_labels(run, ()) == f"{said}--corrections (marks.csv)"
        assert lacking_labels(run, ("manifest", "corrections")) == ""
    both = sweep("--from", toy_run, "--recipe", "tuned")
    assert both.exit_code == 2
    assert "leave one of them out" in both.output
    assert sweep("--from", tmp_path / "nothing").exit_code == 2


def test_a_cache_is_made_as_another_was(toy_data: Path, toy_cache_average: Path, tmp_path: Path) -> None:
    from cxr_fast.activations.cache import open_cache

    words = ["cache", str(toy_data), "--from", str(toy_cache_average), "--out", str(tmp_path / "c.h5"), "--limit", "2"]
    made = CliRunner().invoke(main, [*words, "--views", "plain", "--device", "cpu"])
    assert made.exit_code == 0, made.output
    old, new = (open_cache(path).meta["spec"] for path in (toy_cache_average, tmp_path / "c.h5"))
    assert new == old | {"views": ["plain"]}
