"""Checkpoints from a folder and from the hub: what is read, what is refused and how, and that nothing in them runs."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cxr_fast.errors import InputError
from cxr_fast.models import backbone, weights
from tests.helpers.encoders import DINOV2, dinov2_tensors, write_plain
from tests.helpers.weights import BIN, MEAN, SAFE, biomedclip_config, refused, toy_tensors, write_folder


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Toy tensors gain nothing from a second thread, and lose a lot to it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# What is refused, and how.


class Evil:
    """Runs code when unpickled: creates the file it was given."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["torch archive", "bare pickle", "inside a good checkpoint"])
def test_a_checkpoint_holding_code_is_refused_and_not_run(tmp_path: Path, how: str) -> None:
    evil = Evil(tmp_path / "ran")
    if how == "torch archive":
        content: Any = evil
    elif how == "bare pickle":
        content = pickle.dumps({"visual.head.proj.weight": evil})
    else:
        content = {**toy_tensors(), "extra": evil}
    message = refused(write_folder(tmp_path / "weights", content, biomedclip_config("test_vit")))
    assert not (tmp_path / "ran").exists()
    assert "more than tensors" in message
    assert "weights_only" not in message, "torch's advice to allow any code must not reach the user"


def test_the_malicious_file_would_run_if_it_were_unpickled(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Evil(tmp_path / "ran")))
    assert (tmp_path / "ran").is_dir()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("seed", range(4))
def test_damaged_bytes_are_refused_or_read_but_never_a_traceback(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    good = [
        Path(write_folder(tmp_path / name, toy_tensors(), biomedclip_config("test_vit"), name)) for name in (SAFE, BIN)
    ]
    contents = [(folder, path.read_bytes()) for folder in good for path in folder.glob("open_clip_*model.*")]
    for i in range(30):
        folder, raw = contents[i % 2]
        damaged = bytearray(draw.randbytes(draw.randrange(300)) if i % 3 == 0 else raw)
        if i % 3 == 1:
            damaged = damaged[: draw.randrange(len(damaged))]
        for _ in range(5 if damaged else 0):
            damaged[draw.randrange(min(len(damaged), 2000))] = draw.randrange(256)
        next(folder.glob("open_clip_*model.*")).write_bytes(damaged)
        with contextlib.suppress(InputError):
            backbone.load(str(folder))


def without(name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in toy_tensors().items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "parts"),
    [
        (without("visual.head.proj.weight"), ["(test_vit): 1 missing: head.proj.weight."]),
        ({**toy_tensors(), "visual.trunk.extra": torch.ones(1)}, ["1 unknown", "trunk.extra"]),
        (
            {**toy_tensors(), "visual.trunk.cls_token": torch.ones(1, 1, 32)},
            ["trunk.cls_token has the shape (1, 1, 32) in the file, and (1, 1, 64) by the config (test_vit)."],
        ),
        ({**toy_tensors(), "visual.trunk.cls_token": 3}, ["1 missing: trunk.cls_token."]),
        ({"text.proj.0.weight": torch.ones(2)}, ["no tensor named visual.*"]),
        ({1: torch.ones(2)}, ["no tensor named visual.*"]),
        ([1, 2, 3], ["no tensor named visual.*"]),
        (torch.ones(3), ["no tensor named visual.*"]),
        ({"state_dict": None}, ["no tensor named visual.*"]),
        (b"", ["damaged", BIN]),
        (b"hello world\n", ["damaged"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n", ["not fully downloaded"]),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, tensors: Any, parts: list[str]) -> None:
    message = refused(write_folder(tmp_path, tensors, biomedclip_config("test_vit")))
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (biomedclip_config("no_such_vit"), "'no_such_vit'"),
        (biomedclip_config("test_resnet"), "not a plain ViT"),
        (biomedclip_config("test_vit", timm_pool="map"), "'test_vit'"),
        (biomedclip_config("test_vit", timm_pool="abs_attn"), "'test_vit'"),
        (biomedclip_config("test_vit", timm_proj="mlp"), "not a plain ViT"),
        (biomedclip_config("test_vit", timm_proj="silly"), "'test_vit'"),
        # The projection would then sit in the trunk, where the tail does not look.
        (biomedclip_config("test_vit", timm_pool="token", timm_proj=""), "not a plain ViT"),
        (biomedclip_config("test_vit", timm_pool="token", timm_proj="none"), "64 numbers, not 512"),
        (biomedclip_config(""), "no timm_model_name"),
        ({"model_cfg": {"embed_dim": 512, "vision_cfg": {"layers": 12, "width": 768}}}, "no timm_model_name"),
        ({"model_cfg": {"embed_dim": 512}}, "not an open_clip config"),
        ([], "not an open_clip config"),
        ({**biomedclip_config("test_vit"), "preprocess_cfg": {"mean": [0.5], "std": [0.5]}}, "three numbers"),
        ({**biomedclip_config("test_vit"), "preprocess_cfg": {"mean": MEAN, "std": [0, 0, 0]}}, "three numbers"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(tmp_path: Path, config: Any, part: str) -> None:
    assert part in refused(write_folder(tmp_path, toy_tensors(), config))


def test_a_config_that_is_not_json_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, toy_tensors(), biomedclip_config("test_vit"))
    for content in (b"\xff\xfe", b"[" * 100_000):
        (tmp_path / "open_clip_config.json").write_bytes(content)
        assert "not an open_clip config" in refused(folder)


@pytest.mark.parametrize("gone", ["open_clip_config.json", BIN])
def test_a_folder_without_its_two_files_is_refused_by_their_names(tmp_path: Path, gone: str) -> None:
    folder = write_folder(tmp_path, toy_tensors(), biomedclip_config("test_vit"))
    (tmp_path / gone).unlink()
    message = refused(folder)
    assert all(name in message for name in ("open_clip_config.json", SAFE, BIN, folder))


@pytest.mark.parametrize("source", ["no_such_name", "a/b/c", "/no/such/folder"])
def test_a_source_of_no_known_kind_is_refused(source: str) -> None:
    assert "biomedclip" in refused(source)


# The hub, without a network.


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def fill_hub(hub: Path, repo: str, name: str) -> None:
    """The cache that an earlier download would have left."""
    folder = hub / ("models--" + repo.replace("/", "--"))
    commit = "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    write_folder(folder / "snapshots" / commit, toy_tensors(), biomedclip_config("test_vit"), name)


@pytest.mark.parametrize("resolves", [True, False])
def test_biomedclip_without_a_network_names_both_files_and_the_flag(
    hub: Path, monkeypatch: pytest.MonkeyPatch, resolves: bool
) -> None:
    monkeypatch.setattr(weights, "hub_resolves", lambda: resolves)
    for source in ("biomedclip", "hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"):
        message = refused(source)
        assert "cannot fetch microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224" in message
        assert "Fetch open_clip_config.json and open_clip_pytorch_model.bin" in message
        assert message.endswith("then pass --weights FOLDER.")
        assert "no folder" not in message


def test_a_folder_that_is_not_there_is_called_one(hub: Path) -> None:
    for source in ("weights/biomedclip", "./weights"):
        assert f"{source} is no folder here" in refused(source)


def test_a_name_that_does_not_resolve_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", fails)
    assert weights.hub_resolves() is False
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [])
    assert weights.hub_resolves() is True
    monkeypatch.setattr(socket, "getaddrinfo", fails)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert weights.hub_resolves() is True, "behind a proxy the name need not resolve here"


@pytest.mark.parametrize("name", [SAFE, BIN])
def test_files_already_in_the_hub_cache_need_no_network(hub: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(weights, "hub_resolves", lambda: False)
    fill_hub(hub, "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224", name)
    loaded = backbone.load("biomedclip")
    assert torch.equal(loaded.visual.head.proj.weight, toy_tensors()["visual.head.proj.weight"])


def test_a_hub_model_without_open_clip_files_is_refused(monkeypatch: pytest.MonkeyPatch, hub: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    present: list[str] = []

    def download(repo: str, name: str, **_: Any) -> str:
        if name not in present:
            raise EntryNotFoundError(f"404: {name}")
        return str(hub / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert "owner/name holds no open_clip_config.json" in refused("owner/name")
    present.append("open_clip_config.json")
    assert f"holds neither {SAFE} nor {BIN}" in refused("owner/name")
    write_folder(hub, toy_tensors(), biomedclip_config("test_vit"))
    present.append(BIN)
    assert backbone.load("owner/name").source == "owner/name"


def test_a_model_of_transformers_in_the_hub_cache_needs_no_network(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "hub_resolves", lambda: False)
    commit = "0" * 40
    snapshot = hub / "models--owner--name" / "snapshots" / commit
    (hub / "models--owner--name" / "refs").mkdir(parents=True)
    (hub / "models--owner--name" / "refs" / "main").write_text(commit)
    write_plain(snapshot, DINOV2, dinov2_tensors())
    loaded = backbone.load("owner/name")
    assert loaded.config["family"] == "dinov2"
    assert weights.read_licence(weights.locate("hf-hub:owner/name")) == "", "no card is in the cache"
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n")
    assert weights.read_licence(weights.locate("hf-hub:owner/name")) == "mit"
    # With a network open_clip's config comes first; once it is known to be absent, nothing is asked any more.
    monkeypatch.setattr(weights, "hub_resolves", lambda: True)
    assert "cannot fetch owner/name" in refused("owner/name")
    absent = hub / "models--owner--name" / ".no_exist" / commit
    absent.mkdir(parents=True)
    (absent / "open_clip_config.json").touch()
    assert backbone.load("owner/name").config == loaded.config


def test_a_hub_model_in_several_files_is_fetched_by_its_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    folder, asked = write_plain(tmp_path / "there", DINOV2, dinov2_tensors()), []
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    named = {"weight_map": dict.fromkeys(dinov2_tensors(), "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(named))

    def download(repo: str, name: str, **_: Any) -> str:
        asked.append(name)
        if not (folder / name).exists():
            raise EntryNotFoundError(f"404: {name}")
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(weights, "hub_resolves", lambda: True)
    assert backbone.load("owner/name").config["family"] == "dinov2"
    assert asked == [
        *("open_clip_config.json", "config.json", "model.safetensors", "model.safetensors.index.json"),
        *("model-00001-of-00001.safetensors", "preprocessor_config.json"),
    ]


def test_a_hash_depends_on_names_and_shapes_too() -> None:
    one = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    want = weights.weights_sha256(one, one)
    assert want == weights.weights_sha256(dict(reversed(one.items())), ["b", "a"])
    for other in (
        {"a": torch.zeros(3, 2), "b": torch.ones(2)},
        {"a": torch.zeros(2, 3), "c": torch.ones(2)},
        {"a": torch.zeros(2, 3).double(), "b": torch.ones(2)},
    ):
        assert weights.weights_sha256(other, other) != want
