"""The tower is open_clip's own, cut without a difference; checkpoints in BiomedCLIP's names; refusals in two lines."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from cxr_fast.config import IMAGENET_MEAN, IMAGENET_STD
from cxr_fast.errors import InputError
from cxr_fast.models import backbone
from cxr_fast.models.tail import Tail
from tests.conftest import TOY, TOY_AVERAGE

SAFE, BIN = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Toy tensors gain nothing from a second thread, and lose a lot to it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def biomedclip_config(arch: str = "vit_base_patch16_224", **vision: Any) -> dict[str, Any]:
    """As in microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224."""
    return {
        "model_cfg": {
            "embed_dim": 512,
            "vision_cfg": {
                "timm_model_name": arch,
                "timm_model_pretrained": False,
                "timm_pool": "",
                "timm_proj": "linear",
                **vision,
            },
            "text_cfg": {
                "hf_model_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
                "hf_tokenizer_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
                "hf_proj_type": "mlp",
                "hf_pooler_type": "cls_last_hidden_state_pooler",
                "context_length": 256,
            },
        },
        "preprocess_cfg": {"mean": MEAN, "std": STD},
    }


def biomedclip_tensors(seed: int, *, width: int, depth: int, tokens: int, hidden: int) -> dict[str, torch.Tensor]:
    """A whole CLIP checkpoint under the names of BiomedCLIP's file, spelt out here and drawn at random."""
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "visual.trunk.cls_token": (1, 1, width),
        "visual.trunk.pos_embed": (1, tokens, width),
        "visual.trunk.patch_embed.proj.weight": (width, 3, 16, 16),
        "visual.trunk.patch_embed.proj.bias": (width,),
        "visual.trunk.norm.weight": (width,),
        "visual.trunk.norm.bias": (width,),
        "visual.head.proj.weight": (512, width),
        "text.transformer.embeddings.word_embeddings.weight": (50, 16),
        "text.transformer.encoder.layer.0.attention.self.query.weight": (16, 16),
        "text.proj.0.weight": (8, 16),
        "text.proj.2.weight": (512, 8),
    }
    for i in range(depth):
        block = f"visual.trunk.blocks.{i}."
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}{norm}.weight": (width,), f"{block}{norm}.bias": (width,)}
        for name, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", hidden, width),
            ("mlp.fc2", width, hidden),
        ):
            shapes |= {f"{block}{name}.weight": (rows, columns), f"{block}{name}.bias": (rows,)}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes.items()}


def toy_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    return biomedclip_tensors(seed, width=64, depth=6, tokens=101, hidden=192)


def write_folder(folder: Path, tensors: Any, config: dict[str, Any], name: str = BIN) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    if name == SAFE:
        save_file(tensors, folder / name)
    elif isinstance(tensors, bytes):
        (folder / name).write_bytes(tensors)
    else:
        torch.save(tensors, folder / name)
    return str(folder)


def open_clip_visual(arch: str, tensors: dict[str, torch.Tensor]) -> Any:
    """open_clip's own tower with the checkpoint's weights, without any code of ours."""
    from open_clip.timm_model import TimmModel

    with torch.device("meta"):
        visual = TimmModel(arch, 512, image_size=224, pool="", proj="linear")
    own = {name.removeprefix("visual."): tensor for name, tensor in tensors.items() if name.startswith("visual.")}
    visual.load_state_dict(own, strict=True, assign=True)
    return visual.eval()


def pixels(size: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def joined(visual: Any, x: torch.Tensor, k: int) -> torch.Tensor:
    tail = Tail(visual, unfreeze_blocks=k, classes=3).eval()
    return tail.embedding(backbone.prefix(visual, x, k))


def refused(source: str | Path) -> str:
    with pytest.raises(InputError) as caught:
        backbone.load(str(source))
    message = str(caught.value)
    assert message.startswith("--weights: ")
    assert message.count("\n") <= 1
    return message


@pytest.mark.parametrize("source", [TOY, TOY_AVERAGE])
@torch.inference_mode()
def test_prefix_and_tail_equal_the_whole_tower_at_every_cut(source: str) -> None:
    loaded = backbone.load(source)
    x = pixels(loaded.image_size)
    want = F.normalize(loaded.visual(x), dim=-1)
    assert want.std() > 1e-3
    for k in range(loaded.depth + 1):
        close(joined(loaded.visual, x, k), want)
        rows = backbone.prefix(loaded.visual, x, k)
        assert tuple(rows.shape[1:]) == ((loaded.shape[2],) if k == 0 else loaded.shape[:2])


@torch.inference_mode()
def test_the_full_size_checkpoint_reads_back_and_cuts_exactly(tmp_path: Path) -> None:
    tensors = biomedclip_tensors(3, width=768, depth=12, tokens=197, hidden=3072)
    loaded = backbone.load(write_folder(tmp_path / "b", tensors, biomedclip_config()))
    assert (loaded.shape, loaded.depth, loaded.image_size) == ((197, 768, 512), 12, 224)
    assert sum(p.numel() for p in loaded.visual.parameters()) == 85_798_656 + 768 * 512
    x = pixels(224, batch=1)
    want = F.normalize(open_clip_visual("vit_base_patch16_224", tensors)(x), dim=-1)
    for k in (0, 1, 2, 12):
        close(joined(loaded.visual, x, k), want)


@torch.inference_mode()
def test_a_biomedclip_checkpoint_reads_back_from_both_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip.hf_model
    import open_clip.model
    import open_clip.transformer

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the text tower was built")

    tensors = toy_tensors()
    reference = open_clip_visual("test_vit", tensors)
    for cls in (
        open_clip.model.CLIP,
        open_clip.model.CustomTextCLIP,
        open_clip.hf_model.HFTextEncoder,
        open_clip.transformer.TextTransformer,
    ):
        monkeypatch.setattr(cls, "__init__", never)
    folders = [write_folder(tmp_path / name, tensors, biomedclip_config("test_vit"), name) for name in (SAFE, BIN)]
    folders.append(write_folder(tmp_path / "nested", {"state_dict": tensors}, biomedclip_config("test_vit")))
    x = pixels(160)
    for folder in folders:
        loaded = backbone.load(folder)
        assert torch.equal(loaded.visual(x), reference(x))
        state = loaded.visual.state_dict()
        assert {f"visual.{name}" for name in state} == {name for name in tensors if name.startswith("visual.")}
        assert all(torch.equal(tensor, tensors[f"visual.{name}"]) for name, tensor in state.items())
        assert (loaded.random, loaded.source) == (False, folder)
        assert loaded.statistics("model") == (tuple(MEAN), tuple(STD))
        assert loaded.statistics("imagenet") == (IMAGENET_MEAN, IMAGENET_STD)
        assert not loaded.visual.training
        assert not any(p.requires_grad for p in loaded.visual.parameters())


def test_the_checkpoint_s_own_statistics_are_used(tmp_path: Path) -> None:
    config = biomedclip_config("test_vit")
    config["preprocess_cfg"] = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    loaded = backbone.load(write_folder(tmp_path, toy_tensors(), config))
    assert loaded.statistics("model") == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_half_precision_weights_are_read_as_float32(tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in toy_tensors().items()}
    state = backbone.load(write_folder(tmp_path, half, biomedclip_config("test_vit"))).visual.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert torch.equal(state["head.proj.weight"], half["visual.head.proj.weight"].float())


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
        (without("visual.head.proj.weight"), ["1 tensor(s) missing", "head.proj.weight", "test_vit"]),
        ({**toy_tensors(), "visual.trunk.extra": torch.ones(1)}, ["1 unknown", "trunk.extra"]),
        (
            {**toy_tensors(), "visual.trunk.cls_token": torch.ones(1, 1, 32)},
            ["trunk.cls_token is (1, 1, 32), expected (1, 1, 64)"],
        ),
        ({**toy_tensors(), "visual.trunk.cls_token": 3}, ["1 tensor(s) missing", "trunk.cls_token"]),
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
    (tmp_path / "open_clip_config.json").write_bytes(b"\xff\xfe")
    assert "not an open_clip config" in refused(folder)


@pytest.mark.parametrize("gone", ["open_clip_config.json", BIN])
def test_a_folder_without_its_two_files_is_refused_by_their_names(tmp_path: Path, gone: str) -> None:
    folder = write_folder(tmp_path, toy_tensors(), biomedclip_config("test_vit"))
    (tmp_path / gone).unlink()
    message = refused(folder)
    assert all(name in message for name in ("open_clip_config.json", SAFE, BIN, folder))


@pytest.mark.parametrize(
    "arch", ["test_vit3", "test_vit4", "test_resnet", "eva02_tiny_patch14_224", "no_such", "", "test_vit:0"]
)
def test_an_architecture_that_is_no_plain_vit_is_refused(arch: str) -> None:
    refused(f"random:0:{arch}")


@pytest.mark.parametrize(
    "source", ["random:", "random:x", "random:-1", "random:1.5", "random:\N{SUPERSCRIPT TWO}", "random:" + "9" * 30]
)
def test_a_seed_that_is_no_whole_number_is_refused(source: str) -> None:
    assert "random:SEED" in refused(source)


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


def fill_hub(hub: Path, repo: str, weights: str) -> None:
    """The cache that an earlier download would have left."""
    folder = hub / ("models--" + repo.replace("/", "--"))
    commit = "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    write_folder(folder / "snapshots" / commit, toy_tensors(), biomedclip_config("test_vit"), weights)


@pytest.mark.parametrize("resolves", [True, False])
def test_biomedclip_without_a_network_names_both_files_and_the_flag(
    hub: Path, monkeypatch: pytest.MonkeyPatch, resolves: bool
) -> None:
    monkeypatch.setattr(backbone, "_hub_resolves", lambda: resolves)
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
    assert backbone._hub_resolves() is False
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [])
    assert backbone._hub_resolves() is True
    monkeypatch.setattr(socket, "getaddrinfo", fails)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert backbone._hub_resolves() is True, "behind a proxy the name need not resolve here"


@pytest.mark.parametrize("weights", [SAFE, BIN])
def test_files_already_in_the_hub_cache_need_no_network(
    hub: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    monkeypatch.setattr(backbone, "_hub_resolves", lambda: False)
    fill_hub(hub, "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224", weights)
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


# Random towers.


def test_a_random_tower_is_decided_by_its_seed_alone() -> None:
    first = backbone.load(TOY)
    torch.manual_seed(99)
    torch.randn(7)
    again, other = backbone.load(TOY), backbone.load("random:1:test_vit")
    assert backbone.tower_sha256(first.visual) == backbone.tower_sha256(again.visual)
    assert backbone.tower_sha256(first.visual) != backbone.tower_sha256(other.visual)
    assert (first.random, first.source, first.image_size) == (True, TOY, 160)


def test_a_random_tower_leaves_every_global_generator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    seeded.clear()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    backbone.load(TOY)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]
    assert seeded == [], "the GPU generators were seeded"


# Identity.


@pytest.mark.parametrize("source", [TOY, TOY_AVERAGE])
@torch.inference_mode()
def test_the_prefix_hash_changes_with_exactly_the_weights_that_change_the_activations(source: str) -> None:
    visual = backbone.load(source).visual
    x = pixels(160, batch=1)
    depth = len(visual.trunk.blocks)
    cuts = (0, 2, depth)
    rows = {k: backbone.prefix(visual, x, k) for k in cuts}
    hashes = {k: backbone.prefix_sha256(visual, k) for k in cuts}
    assert len(set(hashes.values())) == len(cuts)
    tower, changed = backbone.tower_sha256(visual), dict.fromkeys(cuts, 0)
    assert hashes[0] == tower
    middle = tuple(f"trunk.blocks.{i}." for i in range(1, depth - 3))
    tensors = [tensor for name, tensor in visual.state_dict().items() if not name.startswith(middle)]
    for tensor in tensors:
        kept = tensor.clone()
        tensor += torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
        assert backbone.tower_sha256(visual) != tower
        for k in cuts:
            moved = not torch.equal(backbone.prefix(visual, x, k), rows[k])
            assert (backbone.prefix_sha256(visual, k) != hashes[k]) == moved
            changed[k] += moved
        tensor.copy_(kept)
    assert changed[0] == len(tensors)
    assert changed[0] > changed[2] > changed[depth] > 0
    assert {k: backbone.prefix_sha256(visual, k) for k in cuts} == hashes


def test_one_bit_of_one_weight_changes_the_hash() -> None:
    visual = backbone.load(TOY).visual
    before = backbone.prefix_sha256(visual, 2)
    weight = visual.trunk.blocks[0].attn.qkv.weight
    with torch.no_grad():
        weight[0, 0] = math.nextafter(float(weight[0, 0]), 1.0)
        assert backbone.prefix_sha256(visual, 2) == before, "not a float32 step"
        weight[0, 0] = float(np.nextafter(np.float32(weight[0, 0]), np.float32(1)))
    assert backbone.prefix_sha256(visual, 2) != before


def test_a_hash_depends_on_names_and_shapes_too() -> None:
    one = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    want = backbone.weights_sha256(one, one)
    assert want == backbone.weights_sha256(dict(reversed(one.items())), ["b", "a"])
    for other in (
        {"a": torch.zeros(3, 2), "b": torch.ones(2)},
        {"a": torch.zeros(2, 3), "c": torch.ones(2)},
        {"a": torch.zeros(2, 3).double(), "b": torch.ones(2)},
    ):
        assert backbone.weights_sha256(other, other) != want


def test_a_cut_is_named_after_the_block_it_lies_before() -> None:
    assert [backbone.cut_name(12, k) for k in (0, 1, 2, 12)] == ["embedding", "blocks.11", "blocks.10", "blocks.0"]
    with pytest.raises(InputError, match=r"--unfreeze-blocks: 13 is more than the 12 blocks"):
        backbone.cut_name(12, 13)
    visual = backbone.load(TOY).visual
    identity = backbone.identity(visual, 2)
    assert identity["cut"] == "blocks.4"
    assert identity["prefix_sha256"] == backbone.prefix_sha256(visual, 2)
