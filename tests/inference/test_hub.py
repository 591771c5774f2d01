"""Models to the Hugging Face hub and back, over HTTP to a stand-in of it; nothing of a patient goes."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from cxr_fast.cli.main import main
from cxr_fast.config import NOTICE
from cxr_fast.data.disclosure import Secrets, read_names
from cxr_fast.errors import DeviceError, InputError
from cxr_fast.inference import hub as hub_addresses
from cxr_fast.inference.predictor import Predictor, golden_pixels
from cxr_fast.system import hardware, huggingface
from tests.helpers.hub_server import READER, TOKEN, HubServer

REPO = "anna/lungs"
ADDRESS = f"hf-hub:{REPO}"
CLASSES = ("Opacity", "Effusion")
IMAGES = 36


@pytest.fixture(scope="module")
def patient_run(tmp_path_factory: pytest.TempPathFactory, lively_weights: Path, phantoms: Path) -> Path:
    """An exported run whose manifest names patients, films, studies and wards that no text may hold."""
    import torch

    from cxr_fast.activations import build
    from cxr_fast.activations.encoder import with_size
    from cxr_fast.activations.job import CacheJob
    from cxr_fast.config import CacheSpec, SweepOptions, SweepSpec, TrainSpec
    from cxr_fast.data.manifest import read_dataset
    from cxr_fast.export.entries.settings import ExportSpec
    from cxr_fast.export.variants import export_run
    from cxr_fast.models import backbone
    from cxr_fast.report.writer import write_report
    from cxr_fast.training.sweep import SweepJob

    root = tmp_path_factory.mktemp("clinic") / "ward of Dr Winter"
    (root / "films").mkdir(parents=True)
    rows: list[list[Any]] = [["image", "group", "study", "view", "meta:sex", "meta:ward", *CLASSES]]
    for i, film in enumerate(sorted((phantoms / "images").iterdir())[:IMAGES]):
        name = f"films/Smith_John_{i:04d}.png"
        shutil.copy(film, root / name)
        ward = ("ward-north-7", "ward-south-3")[i // 3 % 2]
        rows.append(
            [name, f"Patient-{i // 2:05d}-Q", f"ACC{i:07d}", "Frontal", "MF"[i % 2], ward, i // 2 % 2, i // 4 % 2]
        )
    with open(root / "clinic.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    weights = root / "secret weights"
    shutil.copytree(lively_weights, weights)
    torch.set_num_threads(1)  # two that wait for each other by spinning are slow on a busy machine
    tower = backbone.load(str(weights))
    spec = with_size(CacheSpec(weights=str(weights)), tower)
    manifest, cache = read_dataset(root / "clinic.csv"), root / "clinic.h5"
    build.run(CacheJob(manifest=manifest, backbone=tower, spec=spec, out=cache, device="cpu", workers=1))
    sweep = SweepSpec(epochs=(2,), folds=2, train=TrainSpec(lr=1e-3, batch_size=4))
    SweepJob(cache, root / "run", sweep, SweepOptions(device="cpu")).run()
    export_run(root / "run", ExportSpec(variants=("fp32", "fp16"), count=8))
    write_report(root / "run", resamples=20)
    return root / "run"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A stand-in of the hub, asked instead of the real one by this process, with an empty cache and a token."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    server = HubServer()
    point_to(monkeypatch, server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(hardware, "int8_flags", lambda: ())  # the preferred file of a CPU is then the float32 one
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    disable_progress_bars()
    huggingface_hub.close_session()
    yield server
    huggingface_hub.close_session()
    server.close()


def point_to(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Make huggingface_hub ask `url`."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def pushed(hub: HubServer, patient_run: Path) -> HubServer:
    """The stand-in after a push."""
    push(patient_run)
    return hub


def cxr(*words: object) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(main, list(map(str, words)), catch_exceptions=False)


def push(run: Path, *flags: object, repo: str = REPO) -> Result:
    """Push a run and require that it worked."""
    result = cxr("push", run, repo, *flags)
    assert result.exit_code == 0, result.output
    return result


def refused(*words: object) -> str:
    """The one line of a command that ends with exit code 2."""
    result = cxr(*words)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


def commit_of(server: HubServer, branch: str = "main") -> str:
    return server.repos[REPO].branches[branch]


# There and back.


def test_what_is_pushed_is_taken_back_and_answers_alike(pushed: HubServer, patient_run: Path, tmp_path: Path) -> None:
    model = Predictor(ADDRESS, device="cpu")
    assert model.path.is_relative_to(tmp_path / "cache")
    assert model.source == f"{ADDRESS}/model.fp32.onnx@{commit_of(pushed)}"
    pixels = golden_pixels(model.spec.size)
    here = Predictor(patient_run / "model.fp32.onnx", device="cpu")
    assert model.probabilities(pixels).tobytes() == here.probabilities(pixels).tobytes()
    taken = [line for line in pushed.requests if line.startswith("GET") and "/resolve/" in line]
    assert len(taken) == 1, "only the needed variant is downloaded"


def test_the_record_of_a_prediction_names_the_address_with_the_commit(
    pushed: HubServer, patient_run: Path, tmp_path: Path
) -> None:
    film = next((patient_run.parent / "films").iterdir())
    for model, out in ((patient_run, "here.csv"), (ADDRESS, "hub.csv")):
        result = cxr("predict", model, film, "--out", tmp_path / out, "--device", "cpu")
        assert result.exit_code == 0, result.output
    assert (tmp_path / "here.csv").read_bytes() == (tmp_path / "hub.csv").read_bytes()
    record = json.loads((tmp_path / "hub.run.json").read_text())
    assert record["model"] == f"{ADDRESS}/model.fp32.onnx@{commit_of(pushed)}"
    assert str(tmp_path / "cache") not in json.dumps(record)
    again = cxr("predict", record["model"], film, "--out", tmp_path / "hub.csv", "--device", "cpu")
    assert "nothing new; 1 row" in again.output, "the record's address takes the same model, so a run resumes"


def test_every_command_that_takes_a_model_takes_an_address(pushed: HubServer, tmp_path: Path, phantoms: Path) -> None:
    named = f"{ADDRESS}/model.fp32.onnx@{commit_of(pushed)}"
    found = cxr("verify", ADDRESS, "--device", "cpu")
    assert found.exit_code == 0, found.output
    assert found.stdout.startswith(f"{named}: fp32")
    assert found.stdout.endswith("PASS\n")
    assert named in cxr("info", ADDRESS).stdout
    images = phantoms / "images"
    for words in (
        ["latency", ADDRESS, "--repeats", 3, "--warmup", 0, "--budget-ms", 1e9],
        ["throughput", ADDRESS, "--seconds", 0.01, "--max-batch", 1],
    ):
        out = tmp_path / f"{words[0]}.json"
        result = cxr("bench", *words, "--images", images, "--device", "cpu", "--threads", 1, "--json", out)
        assert result.exit_code in (0, 3), result.output
        assert json.loads(out.read_text())["model"] == named


def test_a_comparison_takes_addresses(pushed: HubServer, patient_run: Path, tmp_path: Path) -> None:
    from cxr_fast.bench import comparison

    arms = comparison.against_torch(Path(ADDRESS), patient_run, threads=1)
    assert str(arms[0].path) == f"{ADDRESS}/model.fp32.onnx@{commit_of(pushed)}"
    about, _ = comparison._open_onnx(arms[0])
    assert about.name == str(arms[0].path)
    with pytest.raises(InputError, match="--run"):
        comparison.against_torch(Path(ADDRESS), None)


def test_the_whole_way_by_environment_alone(hub: HubServer, patient_run: Path, tmp_path: Path) -> None:
    """As a user's shell has it: HF_ENDPOINT, HF_HOME, HF_TOKEN; another machine is another cache."""
    film = next((patient_run.parent / "films").iterdir())
    quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}

    def run(home: str, *words: object, offline: bool = False) -> str:
        named = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / home), "HF_HUB_OFFLINE": str(int(offline))}
        found = subprocess.run(
            [sys.executable, "-m", "cxr_fast", *map(str, words)],
            env={**os.environ, **quiet, **named, "HF_TOKEN": TOKEN},
            capture_output=True,
            text=True,
        )
        assert found.returncode == 0, found.stderr
        return found.stdout

    said = run("a", "push", patient_run, REPO, "--device", "cpu")
    command = said.strip().splitlines()[-1].split()
    assert command[:2] == ["cxrfast", "predict"]
    assert command[2] == f"{ADDRESS}@{commit_of(hub)}"
    run("b", "predict", command[2], film, "--out", tmp_path / "p.csv", "--device", "cpu")
    asked = len(hub.requests)
    run("b", "predict", command[2], film, "--out", tmp_path / "q.csv", "--device", "cpu", offline=True)
    assert len(hub.requests) == asked
    assert (tmp_path / "p.csv").read_bytes() == (tmp_path / "q.csv").read_bytes()


# Revisions.


def test_a_commit_stays_what_it_was_when_the_branch_moves(pushed: HubServer) -> None:
    first = commit_of(pushed)
    tree = pushed.files(REPO)
    pushed.repos[REPO].commit("main", {**tree, "model.fp32.onnx": tree["model.fp32.onnx"][:-9]})
    assert Predictor(f"{ADDRESS}@{first}", device="cpu").source.endswith(f"@{first}")
    with pytest.raises(InputError):
        Predictor(ADDRESS, device="cpu")


def test_a_branch_of_its_own(pushed: HubServer, copied: Path) -> None:
    before = commit_of(pushed)
    (card := copied / "MODEL_CARD.md").write_text(card.read_text() + "\n<!-- again -->\n")
    push(copied, "--revision", "trial")
    assert commit_of(pushed) == before
    assert commit_of(pushed, "trial") != before
    assert Predictor(f"{ADDRESS}@trial", device="cpu").source.endswith(f"@{commit_of(pushed, 'trial')}")


def test_a_second_push_removes_what_an_earlier_model_left(pushed: HubServer, patient_run: Path) -> None:
    tree = pushed.files(REPO)
    pushed.repos[REPO].commit("main", {**tree, "model.int8.onnx": b"of an earlier model", "notes.md": b"the user's"})
    commits = len(pushed.repos[REPO].commits)
    said = push(patient_run).stdout
    assert "removed there, of an earlier model: model.int8.onnx" in said
    (replaced,) = re.findall("^replaced there: (.*)$", said, re.MULTILINE)
    assert set(replaced.split(", ")) == set(tree) - {".gitattributes"}
    assert "README.md" in replaced
    assert set(pushed.files(REPO)) == {*tree, "notes.md"}
    assert len(pushed.repos[REPO].commits) == commits + 1, "one commit for all"


# Damage, and no network.


def damaged(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def test_a_file_damaged_on_the_hub_is_refused(pushed: HubServer) -> None:
    tree = pushed.files(REPO)
    pushed.repos[REPO].commit("main", {**tree, "model.fp32.onnx": damaged(tree["model.fp32.onnx"])})
    with pytest.raises(InputError, match="damaged or edited") as caught:
        Predictor(ADDRESS, device="cpu")
    assert str(caught.value).startswith(f"{ADDRESS}/model.fp32.onnx@{commit_of(pushed)}: ")
    assert "content" in (found := cxr("verify", ADDRESS, "--device", "cpu")).stdout
    assert found.exit_code == 1


def test_a_file_damaged_in_the_cache_is_refused_and_what_is_said_mends_it(pushed: HubServer) -> None:
    pinned = f"{ADDRESS}@{commit_of(pushed)}"
    blob = Predictor(pinned, device="cpu").path.resolve()
    blob.write_bytes(damaged(blob.read_bytes()))
    with pytest.raises(InputError, match="damaged or edited") as caught:
        Predictor(pinned, device="cpu")
    named = re.search("delete (.*) and run again", str(caught.value))
    assert named is not None
    Path(named[1]).unlink()
    Predictor(pinned, device="cpu")


def test_what_is_in_the_cache_needs_no_network(pushed: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = f"{ADDRESS}@{commit_of(pushed)}"
    Predictor(ADDRESS, device="cpu")
    asked = len(pushed.requests)
    Predictor(pinned, device="cpu")
    assert len(pushed.requests) == asked, "a commit never changes, so nothing is asked"
    point_to(monkeypatch, "http://127.0.0.1:9")
    for address in (ADDRESS, pinned, f"{ADDRESS}/model.fp32.onnx"):
        assert Predictor(address, device="cpu").source.endswith(f"model.fp32.onnx@{commit_of(pushed)}")
    assert "from the cache (the hub does not answer" in Predictor(ADDRESS, device="cpu").why
    monkeypatch.setattr(huggingface, "hub_resolves", lambda: False)
    assert "does not resolve" in Predictor(ADDRESS, device="cpu").why


def test_a_hub_out_of_order_is_no_network(pushed: HubServer) -> None:
    Predictor(ADDRESS, device="cpu")
    pushed.broken = 503
    assert "from the cache (the hub answers 503)" in Predictor(ADDRESS, device="cpu").why


@pytest.mark.parametrize("status", [407, 408, 429])
def test_a_hub_or_proxy_that_refuses_for_now_is_no_network(pushed: HubServer, patient_run: Path, status: int) -> None:
    Predictor(ADDRESS, device="cpu")
    pushed.broken = status
    assert f"{status})" in Predictor(ADDRESS, device="cpu").why.partition("from the cache (")[2]
    assert str(status) in refused("push", patient_run, REPO)


@pytest.mark.parametrize("answer", [b"<html>please log in</html>", b"\xff\xfe", [], {"error": "x"}], ids=str)
def test_an_answer_that_is_not_of_the_hub_is_no_network(pushed: HubServer, patient_run: Path, answer: Any) -> None:
    Predictor(ADDRESS, device="cpu")
    pushed.instead = answer
    assert f"from the cache ({huggingface.NOT_THE_HUB})" in Predictor(ADDRESS, device="cpu").why
    assert huggingface.NOT_THE_HUB in refused("push", patient_run, REPO)
    assert huggingface.NOT_THE_HUB in refused("info", "hf-hub:anna/other")


def test_a_hub_that_never_answers_is_no_network(
    pushed: HubServer, patient_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Predictor(ADDRESS, device="cpu")
    monkeypatch.setattr(huggingface, "QUESTION_SECONDS", 0.2)
    pushed.delay = 5
    assert "from the cache (the hub does not answer, ReadTimeout)" in Predictor(ADDRESS, device="cpu").why
    assert "does not answer" in refused("push", patient_run, REPO)


def test_an_upload_that_gets_no_answer_ends(hub: HubServer, patient_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "UPLOAD_SECONDS", 0.2)
    hub.delay, hub.slow = 5, "repos/create"
    assert "the upload failed: the hub does not answer" in refused("push", patient_run, REPO)


def test_a_cache_that_cannot_be_written_is_named(
    pushed: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    assert f"the cache of downloads cannot be used (Not a directory: {tmp_path}" in refused("info", ADDRESS)


def test_an_address_that_is_none_of_a_hub_is_one_line_without_its_password(
    pushed: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wrong in (
        "http://anna:PASS@hub.example:99999",
        "http://hub.example:abc",
        "hub.example:80",
        "ftp://hub.example",
    ):
        point_to(monkeypatch, wrong)
        said = refused("info", ADDRESS)
        assert "HF_ENDPOINT is no address of a hub" in said
        assert "PASS" not in said


def test_a_token_with_other_characters_is_named(pushed: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_ä")
    assert "HF_TOKEN holds a character that no token has" in refused("info", ADDRESS)


def test_info_needs_no_onnx_runtime(pushed: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("session", "runtime"):
        monkeypatch.delitem(sys.modules, f"cxr_fast.inference.{name}")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for address in (ADDRESS, f"{ADDRESS}/model.fp16.onnx"):
        found = cxr("info", address)
        assert found.exit_code == 0, found.output
        name = "fp16" if "fp16" in address else "fp32"
        assert f"{ADDRESS}/model.{name}.onnx@{commit_of(pushed)}" in found.stdout
    assert "holds no model.int8.onnx" in refused("info", f"{ADDRESS}/model.int8.onnx")


def test_no_network_and_nothing_in_the_cache_is_one_line(
    hub: HubServer, patient_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_to(monkeypatch, "http://127.0.0.1:9")
    assert "the hub does not answer" in refused("info", ADDRESS)
    assert "the hub does not answer" in refused("push", patient_run, REPO)
    monkeypatch.setattr(huggingface, "hub_resolves", lambda: False)
    assert "does not resolve" in refused("info", ADDRESS)
    assert "does not resolve" in refused("push", patient_run, REPO)


# Mistakes.


def test_an_address_that_is_not_there_is_one_line(pushed: HubServer) -> None:
    pushed.repos["anna/other"] = other = type(pushed.repos[REPO])(private=False)
    other.commit("main", {"pytorch_model.bin": b"x"})
    assert "no such repository" in refused("info", "hf-hub:anna/nothing")
    assert "no such revision" in refused("info", f"{ADDRESS}@v9")
    assert "no such revision" in refused("info", f"{ADDRESS}@{'0' * 40}")
    assert "holds no model.fp16.onnx or model.fp32.onnx or model.int8.onnx" in refused("info", "hf-hub:anna/other")
    assert "holds no model.int8.onnx" in refused("info", f"{ADDRESS}/model.int8.onnx")
    for wrong in ("hf-hub:", "hf-hub:lungs", "hf-hub:a/b/c", "hf-hub:/b", "hf-hub:a/b@"):
        assert "no address of a model" in refused("info", wrong)
    assert re.search(r"allows no such name \(.*: 'a\.\.b/c'\.?\)\.$", refused("info", "hf-hub:a..b/c"))


def test_a_private_repository_without_a_token_is_one_line(pushed: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pushed.repos[REPO].private, "a new repository is private unless --public is given"
    monkeypatch.delenv("HF_TOKEN")
    assert "private" in refused("info", ADDRESS)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "does not know this token" in refused("info", ADDRESS)


def test_a_push_that_cannot_be_is_one_line(
    hub: HubServer, patient_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    assert "no run here" in refused("push", tmp_path / "empty", REPO)
    assert "no run here" in refused("push", tmp_path / "absent", REPO)
    for wrong in ("lungs", "a/b/c", "a..b/c", "a/b c", "/b"):
        assert "no repository of the hub" in refused("push", patient_run, wrong)
    for wrong, write in (
        (ADDRESS, REPO),
        (f"{REPO}@main", f"{REPO} --revision main"),
        (f"{ADDRESS}/model.fp32.onnx@v1", f"{REPO} --revision v1"),
    ):
        assert refused("push", patient_run, wrong).endswith(f"to push there, write {write}.")
    for wrong in ("0" * 40, "a b", "", "a..b", "x.lock", "x.lock/y", "a/", "a//b", "/a", "a/.b", "a.", "-a", "HEAD"):
        assert "no name of a branch" in refused("push", patient_run, REPO, "--revision", wrong)
    assert "may not do this" in refused("push", patient_run, "somebody/lungs")
    monkeypatch.setenv("HF_TOKEN", READER)
    assert "may not do this" in refused("push", patient_run, REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "does not know this token" in refused("push", patient_run, REPO)
    monkeypatch.delenv("HF_TOKEN")
    assert "no Hugging Face token" in refused("push", patient_run, REPO)
    assert hub.repos == {}


def test_visibility_is_never_changed_silently(pushed: HubServer, patient_run: Path) -> None:
    assert "exists and is private" in refused("push", patient_run, REPO, "--public")
    pushed.repos[REPO].private = False
    assert "exists and is public" in refused("push", patient_run, REPO)
    assert "public repository" in push(patient_run, "--public").stdout


def test_a_dry_run_asks_nothing_and_sends_nothing(
    hub: HubServer, patient_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    said = push(patient_run, "--dry-run").stdout
    assert "dry run: nothing was sent" in said
    assert "README.md too, will be replaced" in said
    assert re.search(r"^model\.fp32\.onnx +\d+ (kB|MB)$.*^model\.fp32\.onnx: verified on CPU", said, re.M | re.S)
    assert hub.requests == []


def test_without_huggingface_hub_one_line_names_the_extra(patient_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "the extra hub brings it: " in refused("push", patient_run, REPO)
    assert "the extra hub brings it: " in refused("info", ADDRESS)


def test_a_variant_that_the_device_does_not_run_is_refused_by_its_address(pushed: HubServer) -> None:
    with pytest.raises(DeviceError, match=f"^{ADDRESS}/model.fp16.onnx@.*of this repository"):
        Predictor(f"{ADDRESS}/model.fp16.onnx", device="cpu")


# What goes, and what does not.


@pytest.fixture
def copied(patient_run: Path, tmp_path: Path) -> Path:
    """The run, to be damaged."""
    return Path(shutil.copytree(patient_run, tmp_path / "copied"))


def test_nothing_of_a_patient_or_of_this_machine_reaches_the_hub(hub: HubServer, patient_run: Path) -> None:
    card = (patient_run / "MODEL_CARD.md").read_text()
    assert "ward-north-7" not in card, "not even the card that stays here names small subgroups"
    assert str(patient_run.parent) not in card
    assert "Dr Winter" not in card
    assert "backbone: secret weights," in card
    said = push(patient_run, "--public").stdout
    got = bytes(hub.received)
    assert NOTICE.encode() in got
    assert CLASSES[0].encode() in got
    with np.load(patient_run / "predictions.npz") as file:
        planted = {str(value) for name in ("image", "group", "study", "sha256") for value in file[name]}
    planted |= {Path(name).name for name in planted} | {"Smith_John", "Patient-", "ACC00", "ward-north", "ward-south"}
    planted |= {str(patient_run), str(patient_run.parent), "Dr Winter", str(Path.home()) + "/", "meta:", "by sex"}
    assert len(planted) > 4 * IMAGES
    for secret in planted:
        assert secret.encode() not in got, secret
    assert set(hub.files(REPO)) == {
        *(".gitattributes", "README.md", "model.fp32.onnx", "model.fp16.onnx"),
        *("figures.csv", "per_class.csv", "confusion.csv"),
    }
    for name in hub.files(REPO):
        assert name == ".gitattributes" or name in said
    assert "predictions.npz" in said.partition("stays here: ")[2]


def test_films_of_a_review_stay_here(hub: HubServer, copied: Path) -> None:
    (copied / "review").mkdir()
    names = ("review.html", "review.csv", "review/0a.webp", "suspects.csv", "near_twins.csv")
    for name in names:
        (copied / name).write_bytes(b"a film of somebody")
    said = push(copied, "--public").stdout
    assert b"a film of somebody" not in bytes(hub.received)
    assert not [name for name in hub.files(REPO) if "review" in name or "suspects" in name or "twins" in name]
    kept = said.partition("stays here: ")[2].splitlines()[0].split(", ")
    assert {name.partition("/")[0] for name in names} <= set(kept)


def test_the_card_keeps_its_notice_and_says_how_the_model_is_taken(pushed: HubServer) -> None:
    card = pushed.files(REPO)["README.md"].decode()
    assert NOTICE in card
    assert f"cxrfast predict {ADDRESS} films/ --out predictions.csv" in card
    assert "backbone: secret weights," in card


def test_tables_are_sums_over_all_images(pushed: HubServer) -> None:
    figures = list(csv.DictReader(pushed.files(REPO)["figures.csv"].decode().splitlines()))
    assert {row["part"] for row in figures} >= {"holdout", "out_of_fold"}
    assert "by" not in figures[0]
    classes = csv.DictReader(pushed.files(REPO)["per_class.csv"].decode().splitlines())
    assert [row["class"] for row in classes] == list(CLASSES)


def test_a_model_that_does_not_verify_is_not_sent(hub: HubServer, copied: Path) -> None:
    (model := copied / "model.fp32.onnx").write_bytes(damaged(model.read_bytes()))
    assert "does not verify (content" in refused("push", copied, REPO)
    model.write_bytes(b"\x08 no model")
    assert "not an ONNX file of ours" in refused("push", copied, REPO)
    model.unlink()
    (copied / "model.fp16.onnx").unlink()
    assert "no model.*.onnx" in refused("push", copied, REPO)
    assert hub.repos == {}


def test_a_model_with_a_path_in_its_metadata_is_not_sent(hub: HubServer, copied: Path) -> None:
    import onnx

    from cxr_fast.inference import model_file

    def rewrite(change: dict[str, Any], foreign: str = "") -> None:
        model = onnx.load(copied / "model.fp32.onnx")
        kept = {e.key: e.value for e in model.metadata_props if e.key != "cxr.content_sha256"}
        del model.metadata_props[:]
        for key, value in (kept | {f"cxr.{k}": json.dumps(v) for k, v in change.items()}).items():
            model.metadata_props.add(key=key, value=value)
        if foreign:
            model.metadata_props.add(key=foreign, value="x")
        model_file.write(copied / "model.fp32.onnx", model.SerializeToString())

    (copied / "model.fp16.onnx").unlink()
    rewrite({"weights": "/srv/anna/weights"})
    assert "cxr.weights holds the path /srv/anna/weights" in refused("push", copied, REPO)
    rewrite({"weights": "w", "provenance": "seen on Patient-00003-Q"})
    assert "cxr.provenance holds 'Patient-00003-Q'" in refused("push", copied, REPO)
    rewrite({"provenance": ""}, foreign="exported from")
    assert "another program wrote 'exported from'" in refused("push", copied, REPO)
    assert hub.repos == {}


def test_a_card_with_a_patient_or_of_another_model_is_not_sent(hub: HubServer, copied: Path) -> None:
    card = (copied / "MODEL_CARD.md").read_text()

    def with_card(text: str) -> str:
        (copied / "MODEL_CARD.md").write_text(text)
        return refused("push", copied, REPO)

    assert "'Patient-00003-Q'" in with_card(card + "\nsee Patient-00003-Q\n")
    assert "'Smith_John_0005'" in with_card(card + "\nsee Smith_John_0005.png\n")
    assert "lacks the notice" in with_card(card.replace(NOTICE, ""))
    assert "of another model" in with_card(re.sub("model [0-9a-f]{16}", "model " + "0" * 16, card))
    (copied / "MODEL_CARD.md").unlink()
    assert "`cxrfast report" in refused("push", copied, REPO)
    (copied / "predictions.npz").write_bytes(b"x")
    assert "cannot be read" in refused("push", copied, REPO)
    assert hub.repos == {}


def test_a_table_with_something_else_in_it_is_not_sent(hub: HubServer, copied: Path) -> None:
    table = copied / "per_class.csv"
    table.write_text(table.read_text().replace(CLASSES[0], "Patient-00003-Q"))
    assert "in the column class, which is no figure" in refused("push", copied, REPO)
    assert hub.repos == {}


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("weights: /home/anna/w/biomed, cut 10", "weights: biomed, cut 10"),
        (r"see C:\Users\anna\w.", r"see w."),
        ("`~/films/x.png` and file:///srv/y", "`x.png` and y"),
        ("ward of Dr Winter: /srv/a b/run.json", "ward of Dr Winter: run.json"),
        ("tp/fp, https://hub.co/a/b, hf-hub:a/b, i*j//16, and/or", None),
    ],
)
def test_paths_become_their_last_part(text: str, clean: str | None) -> None:
    secrets = Secrets(paths=("/srv/a b/run.json",), names=())
    assert secrets.clean(text) == (text if clean is None else clean)
    assert bool(secrets.find(text)) == (clean is not None)


def test_words_that_any_text_may_hold_are_not_names(tmp_path: Path) -> None:
    columns = {
        "image": ["a/0001.png"],
        "group": ["12"],
        "study": ["Opacity"],
        "view": ["Frontal"],
        "meta:ward": ["north"],
        "meta:bed": ["bed-12"],
        "sha256": ["ab" * 32],
    }
    np.savez(tmp_path / "p.npz", **{name: np.array(values) for name, values in columns.items()})  # type: ignore[arg-type]
    found = read_names(tmp_path / "p.npz", CLASSES)
    assert found == ("0001.png", "a/0001.png", "ab" * 32, "bed-12")


def test_an_address_is_read_and_written_alike() -> None:
    for text in ("hf-hub:a/b@main", "hf-hub:a/b/model.int8.onnx@v1", "hf-hub:a/b@refs/pr/1"):
        assert str(hub_addresses.parse_address(text)) == text
    assert hub_addresses.parse_address("hf-hub:a/b").revision == "main"
