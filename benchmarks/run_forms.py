"""GELU and the opset: the exported float32 graph rewritten in other forms, each timed on one image.

    python benchmarks/run_forms.py [--rounds 8] [--weights random:0] [--json FILE]

Each form is a process of its own, and they take turns (as in run_inference.py). All answer as the exported graph does,
but for the tanh form, which is timed to say what exactness costs. Node counts are those after ONNX Runtime's own
fusions.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import models
import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from cxr_fast.bench import measure
from cxr_fast.inference.predictor import golden_pixels
from cxr_fast.models import device
from cxr_fast.system import hardware

EXPORTED = "Gelu, opset 20 (as exported)"
AGREE, TANH = 1e-5, "FastGelu (tanh)"
EACH = 5


def rewritten(model: onnx.ModelProto, replace: Callable[[NodeProto], list[NodeProto]], opset: int) -> onnx.ModelProto:
    """A copy with every Gelu replaced and the standard operators' version set."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    nodes = [new for node in out.graph.node for new in (replace(node) if node.op_type == "Gelu" else [node])]
    del out.graph.node[:]
    out.graph.node.extend(nodes)
    constants = {"half": 0.5, "one": 1.0, "root": float(np.sqrt(0.5))}
    made = [numpy_helper.from_array(np.float32(value).reshape(()), f"form.{k}") for k, value in constants.items()]
    out.graph.initializer.extend(made)
    for imported in out.opset_import:
        if imported.domain == "":
            imported.version = opset
    return out


def microsoft(kind: str) -> Callable[[NodeProto], list[NodeProto]]:
    """ONNX Runtime's own operator."""
    return lambda node: [helper.make_node(kind, node.input, node.output, name=node.name, domain="com.microsoft")]


def by_erf(node: NodeProto) -> list[NodeProto]:
    """x/2 (1 + erf(x / sqrt 2)) in five operators, which ONNX Runtime fuses if it knows the pattern."""
    (x,), (y,), n = node.input, node.output, node.name
    return [
        helper.make_node("Mul", [x, "form.root"], [f"{n}.a"]),
        helper.make_node("Erf", [f"{n}.a"], [f"{n}.b"]),
        helper.make_node("Add", [f"{n}.b", "form.one"], [f"{n}.c"]),
        helper.make_node("Mul", [x, f"{n}.c"], [f"{n}.d"]),
        helper.make_node("Mul", [f"{n}.d", "form.half"], [y]),
    ]


def forms(model: onnx.ModelProto) -> dict[str, onnx.ModelProto]:
    """The graph in every form; the same GELU at later opsets, and GELU's other forms at the opset it is exported in."""
    exported = next(o.version for o in model.opset_import if o.domain == "")
    kept = {f"Gelu, opset {version}": rewritten(model, lambda n: [n], version) for version in (21, 22, 23)}
    own = {name: rewritten(model, microsoft(kind), exported) for name, kind in KINDS.items()}
    return {EXPORTED: model, **kept, **own, "Erf in five operators": rewritten(model, by_erf, exported)}


KINDS = {"com.microsoft Gelu": "Gelu", TANH: "FastGelu"}


def serve(path: str) -> None:
    """What a form's process does: its answer and node counts, then times when told to."""
    import onnxruntime

    device.prepare()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = hardware.cpu_count(), 3
    options.optimized_model_filepath = path + ".optimised"
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    nodes = Counter(node.op_type for node in onnx.load(path + ".optimised", load_external_data=False).graph.node)
    feed = {"pixels": golden_pixels(session.get_inputs()[0].shape[-1])}
    answer = session.run(["probabilities"], feed)[0]
    print(json.dumps({"answer": answer[0].tolist(), "nodes": nodes}), flush=True)
    for line in sys.stdin:
        time.sleep(0.2)  # until the threads of the form before no longer spin
        session.run(None, feed)
        times = []
        for _ in range(int(line)):
            began = time.perf_counter()
            session.run(None, feed)
            times.append(time.perf_counter() - began)
        print(json.dumps(times), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--weights", default="random:0")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        models.exported(folder, args.weights, ("fp32",))
        arms, first = {}, {}
        for number, (name, model) in enumerate(forms(onnx.load(folder / "run" / "model.fp32.onnx")).items()):
            path = folder / f"form{number}.onnx"
            onnx.save(model, path)
            command = [sys.executable, __file__, "--serve", str(path)]
            arms[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            first[name] = read(arms[name])
        apart = {n: float(np.abs(np.subtract(f["answer"], first[EXPORTED]["answer"])).max()) for n, f in first.items()}
        assert all(value <= AGREE for name, value in apart.items() if name != TANH), apart
        times: dict[str, list[float]] = {name: [] for name in arms}
        with hardware.OtherCpu() as noise:
            for _ in range(args.rounds):
                for name, arm in arms.items():
                    assert arm.stdin is not None
                    print(EACH, file=arm.stdin, flush=True)
                    times[name].append(measure.median(read(arm)))
        for arm in arms.values():
            arm.stdin.close()  # type: ignore[union-attr]
            arm.wait(30)
    common.show(spreads := {name: common.spread(values) for name, values in times.items()}, "s/image")
    ratios = {name: vars(measure.ratio_interval(values, times[EXPORTED])) for name, values in times.items()}
    for name, ratio in ratios.items():
        other = {op: n for op, n in first[name]["nodes"].items() if first[EXPORTED]["nodes"].get(op) != n}
        print(f"{name}: {ratio['median']:.3f} [{ratio['low']}, {ratio['high']}] of {EXPORTED}; other nodes: {other}")
    result = {
        "seconds_an_image": spreads,
        "ratios": ratios,
        "largest_difference": apart,
        "nodes": {name: found["nodes"] for name, found in first.items()},
        "cpu_share_of_other_processes_and_arms": noise.share,
    }
    common.save("forms", result, args.json)


def read(arm: Any) -> Any:
    """The next line of a form's process."""
    line = arm.stdout.readline()
    assert line, "the process of a form ended"
    return json.loads(line)


if __name__ == "__main__":
    main()
