"""Other engines for the model of a run, each opened in its own process by `cxr_fast.bench.comparison`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cxr_fast.bench.comparison import About, Arm
from cxr_fast.config import PreprocessSpec, from_dict
from cxr_fast.errors import InputError
from cxr_fast.inference import model_file
from cxr_fast.metrics import calibration
from cxr_fast.system import hardware

Answer = Callable[[np.ndarray], np.ndarray]  # pixels uint8 (1, S, S) to probabilities (1, C)
INSTALL = "pip install -r benchmarks/requirements-peers.txt"
FLOAT32, BFLOAT16 = "f32", "bf16"  # OpenVINO's names


@contextlib.contextmanager
def in_one_line(engine: str) -> Iterator[None]:
    """Raise InputError, a reason in one line, for whatever another engine raises."""
    try:
        yield
    except InputError:
        raise
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: {INSTALL}") from error
    except Exception as error:  # each engine has errors of its own
        first = next(iter(str(error).strip().splitlines()), "")
        raise InputError(f"{engine}: {type(error).__name__}: {first[:200]}") from error


def openvino(arm: Arm, *, precision: str = FLOAT32, films: Path | None = None) -> tuple[About, Answer]:
    """Open the run's float32 file in OpenVINO for one image at a time, as fast as it can answer one.

    `films` is an array of pixels (n, S, S) in a file: NNCF makes an int8 model from them, with SmoothQuant and bias
    correction. Raises InputError where the engine or the instructions of the CPU are missing.
    """
    os.environ["CI"] = "true"  # the word that keeps OpenVINO and NNCF from sending reports of use
    with in_one_line("OpenVINO"):
        import openvino as engine

        core, threads = engine.Core(), arm.threads or hardware.cpu_count()
        if precision == BFLOAT16 and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise InputError("this CPU has no bfloat16 instructions: OpenVINO would compute in float32")
        model = core.read_model(arm.path)
        info = model_file.read(arm.path, check=False)
        size = info["preprocess"]["size"]
        model.reshape([1, size, size])
        if films is not None:
            model = quantized(model, np.load(films))
        how = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}
        compiled = core.compile_model(model, "CPU", how)
        request, output = compiled.create_infer_request(), compiled.output("probabilities")

        def answer(pixels: np.ndarray) -> np.ndarray:
            return np.array(request.infer(pixels)[output])

        answer(np.zeros((1, size, size), np.uint8))
    where = f"OpenVINO {engine.__version__}, {threads} thread(s)"
    return _about(info | {"classes": info["labels"]}, arm, f"OpenVINO {precision}", where), answer


def quantized(model: Any, films: np.ndarray) -> Any:
    """NNCF's static int8 model of an OpenVINO model, its ranges from pixels (n, S, S).

    NNCF's other answer to sums of 16 bits, weights of 7 bits in every layer, made the error of a trained ViT-S larger
    even on a CPU without VNNI (LOG), so its default stays.
    """
    import logging

    import nncf

    nncf.set_log_level(logging.ERROR)
    return nncf.quantize(
        model,
        nncf.Dataset([film[None] for film in films]),
        model_type=nncf.ModelType.TRANSFORMER,  # with SmoothQuant
        subset_size=len(films),
        fast_bias_correction=True,
    )


def compiled_torch(arm: Arm) -> tuple[About, Answer]:
    """Open the run's final model in torch with tower and head compiled by torch.compile, constants folded in.

    Raises InputError where they cannot be compiled (it takes a C++ compiler).
    """
    from cxr_fast.export.parity import torch_probabilities
    from cxr_fast.models import device
    from cxr_fast.training.run_folder import read_run

    with in_one_line("torch.compile"):
        import torch
        import torch._inductor.config

        threads, run = device.prepare(arm.threads), read_run(arm.path, arm.final)
        torch._inductor.config.freezing = True
        members = [
            replace(member, visual=torch.compile(member.visual), head=torch.compile(member.head))
            for member in run.members
        ]
        run = replace(run, members=tuple(members))

        def answer(pixels: np.ndarray) -> np.ndarray:
            return calibration.apply(run.info["calibration"], torch_probabilities(run, pixels))

        size = run.info["preprocess"]["size"]
        answer(np.zeros((1, size, size), np.uint8))
    return _about(run.info, arm, "torch compiled", f"torch {torch.__version__}, {threads} thread(s)"), answer


def _about(info: dict[str, Any], arm: Arm, variant: str, where: str) -> About:
    return About(
        name=arm.path.name,
        variant=variant,
        where=where,
        labels=tuple(info["classes"]),
        thresholds=tuple(info["thresholds"]),
        spec=from_dict(PreprocessSpec, info["preprocess"]),
        weights=info["model_sha256"],
        warning="",
    )
