"""Toy data of the record: datasets in other layouts, images that are hard to read, and a small tower, all drawn from
seeds or copied from the phantoms in `data/`. Nothing here imports cxr_fast. Each function works in the current folder
and is named by a line `!name` of record_commands.txt."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

CHEXPERT = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture",
    "Support Devices",
)  # fmt: skip


def films(count: int) -> list[Path]:
    """The first phantoms in name order."""
    return sorted(Path("data/images").iterdir())[:count]


def write(path: str, head: list[str], rows: list[list[object]]) -> None:
    """A CSV file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([head, *rows])


def copy(source: Path, to: str) -> None:
    """A phantom under another name."""
    Path(to).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, to)


def layouts() -> None:
    """NIH, CheXpert, MIMIC-CXR, OpenI, and manifests with subgroups, studies and unknown labels."""
    draw = np.random.default_rng(7)
    codes = draw.choice(["1.0", "0.0", "-1.0", ""], size=(20, len(CHEXPERT)))
    nih, chexpert, mimic, metadata, manifest = [], [], [], [], []
    for i, film in enumerate(films(20)):
        patient, sex, age = i // 4, "FM"[i // 4 % 2], 38 + 5 * (i // 4)
        finding = ("No Finding", "Mass", "Effusion|Hernia", "Nodule")[i % 4]
        copy(film, f"nih/images/{i:08d}_000.png")
        nih.append([f"{i:08d}_000.png", finding, i % 4 // 2, patient, f"{age:03d}Y", sex, "PA"])
        listed = f"CheXpert-v1.0-small/train/patient{patient:05d}/study{1 + i % 4 // 2}/view{1 + i % 2}_frontal.jpg"
        copy(film, f"chexpert/{listed.partition('/')[2]}")
        chexpert.append([listed, sex, age, "Frontal", *codes[i]])
        copy(film, f"mimic/files/p{patient}/s{i // 2}/img{i}.png")
        metadata.append([f"img{i}", patient, i // 2, "PA"])
        mimic += [[patient, i // 2, *codes[i]]] if i % 2 == 0 else []
        copy(film, f"toy/films/{film.name}")
        yes = [int(draw.random() < 0.5), ("1", "0", "")[i % 3], int(i % 4 < 2)]
        manifest.append(
            [f"films/{film.name}", f"g{i // 2}", "PA", f"s{i // 2}", sex, "young" if i < 9 else "old", *yes]
        )
    head = ["Image Index", "Finding Labels", "Follow-up #", "Patient ID", "Patient Age", "Patient Gender"]
    write("nih/Data_Entry_2017.csv", [*head, "View Position"], nih)
    write("chexpert/train.csv", ["Path", "Sex", "Age", "Frontal/Lateral", *CHEXPERT], chexpert)
    write("mimic/mimic-cxr-2.0.0-chexpert.csv", ["subject_id", "study_id", *CHEXPERT], mimic)
    write("mimic/mimic-cxr-2.0.0-metadata.csv", ["dicom_id", "subject_id", "study_id", "ViewPosition"], metadata)
    columns = ["image", "group", "view", "study", "meta:sex", "meta:age", "Sick", "Rare", "Even"]
    write("toy/manifest.csv", columns, manifest)
    write("toy/absent.csv", columns, [*manifest[:2], ["films/absent.png", *manifest[2][1:]]])
    write("toy/broken.csv", columns, [*manifest, *([f"films/{bad}.png", *manifest[0][1:]] for bad in ("cut", "empty"))])
    Path("toy/films/cut.png").write_bytes(films(1)[0].read_bytes()[:700])
    Path("toy/films/empty.png").touch()
    write("toy/maybe.csv", columns, [[*manifest[0][:-1], "maybe"]])
    write("toy/twice.csv", columns, [manifest[0], manifest[0]])
    write("toy/no_group.csv", ["image", "A"], [["films/a.png", 1]])
    Path("toy/list.txt").write_text("".join(f"data/images/{film.name}\n" for film in films(5)[::-1]))
    for i in range(6):
        major = ("normal", "Cardiomegaly/mild", "No Indexing", "Opacity/lung", "Nodule/lung", "Foo")[i]
        images = "".join(f'<parentImage id="CXR{i}_IM-000{i}-{k}001"/>' for k in (1, 2))
        text = f'<eCitation><uId id="CXR{i}"/><MeSH><major>{major}</major></MeSH>{images}</eCitation>'
        Path("openi").mkdir(exist_ok=True)
        Path(f"openi/{i}.xml").write_text(text)
        for k in (1, 2):
            copy(films(12)[2 * i + k - 1], f"openi/CXR{i}_IM-000{i}-{k}001.png")


def odd() -> None:
    """Images that are hard to read: deep, coloured, turned by EXIF, with a palette, DICOM; one cut short, one empty."""
    draw = np.random.default_rng(11)
    Path("odd").mkdir()
    deep = (np.asarray(Image.open(films(1)[0]).resize((90, 70))).astype(np.uint16) << 4) + 100
    Image.fromarray(deep).save("odd/deep.png")
    colour = Image.fromarray(draw.integers(0, 256, (40, 64, 3), np.uint8).repeat(2, 0))
    turned = Image.Exif()
    turned[0x0112] = 6
    colour.save("odd/turned.jpg", quality=90, exif=turned)
    colour.quantize(16).save("odd/palette.png")
    colour.convert("RGBA").save("odd/alpha.png")
    Path("odd/cut.png").write_bytes(films(1)[0].read_bytes()[:700])
    Path("odd/empty.png").touch()
    dicom("odd/window.dcm", deep, WindowCenter=1500, WindowWidth=1200)
    dicom("odd/inverted.dcm", deep, PhotometricInterpretation="MONOCHROME1", RescaleSlope=2, RescaleIntercept=-50)
    dicom("odd/plain.dcm", deep)
    names = ("deep.png", "turned.jpg", "palette.png", "alpha.png", "window.dcm", "inverted.dcm", "plain.dcm")
    write("odd/good.csv", ["image", "group", "A"], [[name, f"g{i}", i % 2] for i, name in enumerate(names)])


def dicom(path: str, pixels: np.ndarray, **elements: object) -> None:
    """A secondary capture of 12 stored bits."""
    from pydicom import dcmwrite, uid
    from pydicom.dataset import Dataset, FileMetaDataset

    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = uid.SecondaryCaptureImageStorage, "1.2.3.4", "DX"
    ds.Rows, ds.Columns = pixels.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 13, 12
    ds.PixelData = pixels.astype("<u2").tobytes()
    ds["PixelData"].VR = "OW"
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    dcmwrite(path, ds, enforce_file_format=True)


def tower() -> None:
    """timm's test_vit and test_vit2 as folders for `--weights`, with weights under which every part counts: as
    initialised biases are zero, norms one, and two images come out equal to 1e-5."""
    import torch
    from open_clip.timm_model import TimmModel
    from safetensors.torch import save_file

    for arch in ("test_vit", "test_vit2"):
        visual, draw = TimmModel(arch, 512, image_size=160, pool="", proj="linear"), torch.Generator().manual_seed(5)
        tensors = {}
        for name, old in visual.state_dict().items():
            noise = torch.randn(old.shape, generator=draw)
            inputs = old[0].numel() if old.ndim in (2, 4) else 1
            one = 1.0 if name.endswith(("weight", "gamma")) else 0.0
            tensors[f"visual.{name}"] = 0.3 * noise + one if old.ndim == 1 else noise * (1.5 * inputs**-0.5)
        folder = Path("weights") / arch
        folder.mkdir(parents=True)
        save_file(tensors, folder / "open_clip_model.safetensors")
        vision = {"timm_model_name": arch, "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear"}
        model = {"embed_dim": 512, "vision_cfg": vision | {"image_size": 160}}
        about = {"model_cfg": model, "preprocess_cfg": {"mean": [0.4, 0.45, 0.5], "std": [0.2, 0.25, 0.3]}}
        (folder / "open_clip_config.json").write_text(json.dumps(about))


def mistakes() -> None:
    """What can be named by mistake."""
    os.makedirs("wrong/empty")
    for name in ("text.h5", "text.onnx", "file"):
        Path("wrong", name).write_text("hello")


def damage() -> None:
    """Two bytes of a row of a cache changed, for `verify` to find and `--repair` to mend."""
    import h5py

    path = "cache/phantom-first9.h5"
    with h5py.File(path) as file:
        offset = file["activations"].id.get_offset() + 3 * file["activations"][0].nbytes + 5
    with open(path, "r+b") as raw:
        raw.seek(offset)
        raw.write(b"\x55\xaa")


def lost() -> None:
    """A run without its predictions."""
    shutil.copytree("exports/toy", "runs/lost")
    Path("runs/lost/predictions.npz").unlink()
