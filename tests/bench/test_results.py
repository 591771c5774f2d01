"""What a result records, a neighbour that is seen and flagged, and figures that must follow from their samples."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cxr_fast
from cxr_fast.bench import measure, results
from cxr_fast.errors import CxrFastError, InputError, SchemaError
from tests.helpers import states

WHOLE = "file to probabilities"


def latency(**changed: Any) -> dict[str, Any]:
    """A sound result of kind latency on made-up samples: 0.01 to 0.70 seconds."""
    samples = [k / 100 for k in range(1, 71)]
    limit = results.budget(1.0, 90)
    model = dict.fromkeys(("model", "model_sha256", "variant", "provenance", "device", "provider", "where", "why"), "x")
    return {
        **results.head(results.LATENCY),
        **model,
        "threads": 1,
        "images": {},
        "cold": {},
        "gpus": {"before": [], "after": []},
        "noise": {"share": 0.0, "noisy": False, "stretches": []},
        "n": 70,
        "samples": {WHOLE: samples},
        "summary": {WHOLE: results.summary(samples)},
        "budget": limit,
        "verdict": results.verdict(samples, limit) | {"slowest_stage": "model"},
        **changed,
    }


def server(**changed: Any) -> dict[str, Any]:
    limit, samples = results.budget(1.0, 90), [0.5] * 64
    trial = {"rate": 2.0, "n": 64, "served": 64, "samples": samples, "verdict": results.verdict(samples, limit)}
    found = {"scenario": "server", "seconds": 9.0, "workers": 1, "service": [0.1], "simulated": {}, "capacity": 9.0}
    base = {k: v for k, v in latency().items() if k not in ("n", "samples", "summary", "cold")}
    head = results.head(results.THROUGHPUT)
    return {
        **base,
        **head,
        **found,
        "trials": [trial],
        "rate": 2.0,
        "budget": limit,
        "verdict": trial["verdict"],
        **changed,
    }


def offline(**changed: Any) -> dict[str, Any]:
    arm = {"rates": [1.0, 3.0, 2.0], "rate": 2.0}
    point = {"batch": 1, "peak_rss": None, "model only": arm, "from files": dict(arm)}
    others = ("trials", "rate", "budget", "verdict", "service", "capacity", "simulated")
    base = {k: v for k, v in server().items() if k not in others}
    return {**base, "scenario": "offline", "points": [point], "knee": {}, "best": {}, **changed}


# ------------------------------------------------------------------------------------------------ read and write


@pytest.mark.parametrize("made", [latency, server, offline])
def test_a_sound_result_comes_back_as_it_was(made: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    result = made()
    results.write(result, tmp_path / "r.json")
    assert results.read(tmp_path / "r.json") == json.loads(json.dumps(result))


def changed(made: Callable[[], dict[str, Any]], path: str, value: Any) -> dict[str, Any]:
    """A result with one entry replaced, or left out where `value` is `...`."""
    result = copy.deepcopy(made())
    *way, last = path.split("/")
    inner: Any = result
    for step in way:
        inner = inner[int(step) if isinstance(inner, list) else step]
    key = int(last) if isinstance(inner, list) else last
    if value is ...:
        del inner[key]
    else:
        inner[key] = value
    return result


@pytest.mark.parametrize(
    ("made", "path", "value", "said"),
    [
        (latency, "kind", "cxr-fast doctor", "not a benchmark result"),
        (latency, "kind", ["x"], "not a benchmark result"),
        (latency, "machine", ..., "machine is missing"),
        (latency, "machine/cores", ..., "cores is missing"),
        (latency, "noise/noisy", 1, "noisy is missing or of the wrong kind"),
        (latency, "commit", "abc", "commit is missing or of the wrong kind"),
        (latency, "n", True, "n is missing or of the wrong kind"),
        (latency, "n", 71, "n is 71 and file to probabilities has 70"),
        (latency, f"samples/{WHOLE}/3", 0.5, "summary of file to probabilities is not that of its samples"),
        (latency, f"samples/{WHOLE}/3", "fast", "samples are not times"),
        (latency, f"samples/{WHOLE}/3", float("nan"), "samples are not times"),
        (latency, f"samples/{WHOLE}", [], "samples are not times"),
        (latency, f"summary/{WHOLE}/percentiles/90", 0.1, "summary of"),
        (latency, f"summary/{WHOLE}/bounds/90", 0.1, "summary of"),
        (latency, "samples", {}, "samples are not times"),
        (latency, "budget/seconds", 0.5, "verdict is not that of the samples"),
        (latency, "verdict/result", "FAIL", "verdict is not that of the samples"),
        (server, "scenario", "burst", "no scenario 'burst'"),
        (server, "rate", 3.0, "its last trial does not confirm the rate"),
        (server, "rate", None, "its last trial does not confirm the rate"),
        (server, "trials", [], "its last trial does not confirm the rate"),
        (server, "trials/0/served", 63, "samples are not as many as it says"),
        (server, "trials/0/samples/0", 1.5, "verdict is not that of the samples"),
        (offline, "points/0/from files/rates", [1.0, 2.0], "batch 1 from files has no 3 rates"),
        (offline, "points/0/from files/rates/0", 0, "has no 3 rates"),
        (offline, "points/0/model only/rate", 3.0, "is not the median of its rates"),
        (offline, "points/0/batch", ..., "batch is missing"),
    ],
)
def test_a_result_that_does_not_follow_from_its_samples_is_refused(
    made: Callable[[], dict[str, Any]], path: str, value: Any, said: str, tmp_path: Path
) -> None:
    (tmp_path / "r.json").write_text(json.dumps(changed(made, path, value)))
    with pytest.raises(InputError, match=said) as caught:
        results.read(tmp_path / "r.json")
    assert str(tmp_path / "r.json") in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("schema", [None, 1, 99, "2"])
def test_another_schema_is_refused_with_who_wrote_it(schema: Any, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(latency(schema=schema, written_by="cxr-fast 9.9")))
    with pytest.raises(SchemaError, match=r"schema .*, written by cxr-fast 9\.9; this version reads 2"):
        results.read(tmp_path / "r.json")


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"kind": 1}'])
def test_what_is_no_result_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_bytes(data)
    with pytest.raises(InputError):
        results.read(tmp_path / "r.json")
    with pytest.raises(InputError, match=r"gone\.json: cannot read it"):
        results.read(tmp_path / "gone.json")


def test_no_entry_can_be_missing_and_nothing_crashes(tmp_path: Path) -> None:
    for made in (latency, server, offline):
        for field in made():
            for value in (..., None, 0, "x", [], {}, [None]):
                if field == "commit" and value in (None, {}):
                    continue
                try:
                    results.check(changed(made, field, value), "r")
                except CxrFastError:
                    continue
                assert value is not ..., f"{field} may be left out"


def test_a_result_that_is_wrong_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        results.write(latency(n=3), tmp_path / "r.json")
    assert list(tmp_path.iterdir()) == []


def test_where_it_cannot_be_written_is_known_beforehand(tmp_path: Path) -> None:
    results.writable(None, "--json")
    results.writable(tmp_path / "r.json", "--json")
    results.writable(tmp_path / "r.PNG", "--plot", ".png")
    for out in (tmp_path, tmp_path / "gone" / "r.json"):
        with pytest.raises(InputError, match="--json: cannot write"):
            results.writable(out, "--json")
        with pytest.raises(InputError, match="--json: cannot write"):
            results.write(latency(), out)
    with pytest.raises(InputError, match=r"--plot: .* is to end in \.png"):
        results.writable(tmp_path / "r.pdf", "--plot", ".png")


# ----------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("n", [1, 2, 3, 4, 10, 64, 100])
def test_windows_are_thirds_in_order(n: int) -> None:
    expected = [part.tolist() for part in np.array_split(np.arange(n), 3) if len(part)]
    assert [list(part) for part in results.windows(range(n))] == expected


def test_a_summary_shows_only_what_n_supports() -> None:
    for n, held in ((1, []), (11, [50]), (63, [50]), (64, [50, 90]), (130, [50, 90, 95]), (662, [50, 90, 95, 99])):
        samples = [float(k) for k in range(n)]
        found = results.summary(samples)
        assert found["bounds"] == {str(q): measure.bound(samples, q) for q in held}
        assert list(found["percentiles"]) == [str(q) for q in (held or [50])]


def test_least_and_spare_are_the_verdicts_own() -> None:
    for q in (50, 90, 95, 99):
        n = measure.least(q)
        assert q in measure.supported(n)
        assert q not in measure.supported(n - 1)
        for more in (n, 3 * n):
            spare = measure.spare(more, q)
            assert measure.verdict([1.0] * (more - spare) + [3.0] * spare, 2.0, q).result == "PASS"
            assert measure.verdict([1.0] * (more - spare - 1) + [3.0] * (spare + 1), 2.0, q).result != "PASS"


# ------------------------------------------------------------------------------------------------------- noise


class Shares:
    """Stands in for `OtherCpu`: the shares that are told, one after the other; the first is the whole run's."""

    threshold = 0.1

    def __init__(self, shares: list[float | None]) -> None:
        self.shares, self.share = shares, None

    def __call__(self) -> Any:
        made = copy.copy(self)
        made.share = self.shares.pop(0)
        return made

    def start(self) -> Any:
        return self

    def stop(self) -> float | None:
        return self.share

    @property
    def noisy(self) -> bool:
        return self.share is not None and self.share > self.threshold


def test_a_noisy_stretch_is_flagged_where_the_mean_hides_it() -> None:
    """Half a second of a busy neighbour in two quiet ones: 8 % of the whole, below the limit, and still said."""
    clock = iter(np.arange(0, 100, 0.1).tolist())
    shares = Shares([0.08, 0.01, 0.3, 0.0, None])
    with results.Watch(0.45, other=shares, clock=lambda: next(clock)) as watch:
        for _ in range(13):
            watch.tick()
    noise = watch.noise()
    assert (noise["share"], noise["worst"], noise["noisy"]) == (0.08, 0.3, True)
    assert [s["noisy"] for s in noise["stretches"]] == [False, True, False]
    assert [s["first"] for s in noise["stretches"]] == [0, 5, 10]
    assert (noise["samples"], noise["noisy_samples"]) == (13, 5)


def test_nothing_known_is_nothing_flagged() -> None:
    with results.Watch(other=Shares([None] * 3)) as watch:
        watch.tick()
    assert (watch.noise()["share"], watch.noise()["worst"], watch.noise()["noisy"]) == (None, None, False)


def test_the_warm_up_is_forgotten() -> None:
    with results.Watch(60, other=Shares([0.0, 0.9, 0.0, 0.0])) as watch:
        watch.tick()
        watch.restart()
        watch.tick()
    assert [(s["samples"], s["share"]) for s in watch.stretches] == [(1, 0.0)]


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc/stat on this system")
@pytest.mark.skipif((os.cpu_count() or 1) not in range(2, 9), reason="one core of many is under the threshold")
def test_a_real_neighbour_makes_a_noisy_stretch() -> None:
    with states.busy_core() as burner, results.Watch(0.3) as watch:
        while states.cpu_seconds(burner) < 1:
            time.sleep(0.1)
            watch.tick()
    noise = watch.noise()
    # Whatever else ran, that neighbour or what kept it from running took time that was not ours.
    assert noise["noisy"]
    assert noise["noisy_samples"] > 0
    assert noise["worst"] > 0.1


# ---------------------------------------------------------------------------------------------- what is recorded


def test_every_result_says_where_it_is_from() -> None:
    head = results.head(results.LATENCY)
    assert (head["kind"], head["schema"], head["written_by"]) == (
        results.LATENCY,
        2,
        f"cxr-fast {cxr_fast.__version__}",
    )
    assert head["date"].endswith("+00:00")
    assert head["versions"].keys() >= {"cxr-fast", "numpy", "pillow"}
    assert any(name.startswith("onnxruntime") for name in head["versions"])
    assert json.loads(json.dumps(head)) == head


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_is_the_packages_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "checkout" / "package"
    package.mkdir(parents=True)

    def git(*words: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(package), *who, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert results.commit(package) is None
    git("init", "-q", str(package.parent))
    (package / "__init__.py").write_text("")
    assert results.commit(package) is None, "an installed package inside somebody's checkout"
    git("add", ".")
    git("commit", "-qm", "first")
    head = git("rev-parse", "HEAD")
    assert results.commit(package) == {"revision": head, "dirty": False}
    (package.parent / "notes.txt").write_text("beside the package")
    assert results.commit(package) == {"revision": head, "dirty": False}
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    (package / "__init__.py").write_text("x = 1")
    assert results.commit(package) == {"revision": head, "dirty": True}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert results.commit(package) is None, "no git"
