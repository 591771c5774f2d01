"""The command line: every command under one name. Heavy imports stay inside command bodies."""

from __future__ import annotations

import click

from .. import __version__
from .bench import bench
from .cache.command import cache
from .data import info, phantom, prepare, verify
from .external import evaluate
from .fit.command import fit
from .machine import doctor
from .models.explain import explain
from .models.export import export
from .models.predict import predict
from .models.push import push
from .options import Group
from .report import compare, report, review, runs
from .training import sweep


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="cxrfast")
def main() -> None:
    """Fine-tune BiomedCLIP on chest radiographs from cached activations, export one ONNX file, predict without torch.

    \b
    All at once:    cxrfast fit DATASET      all of the main job up to predict
    The main job:   cxrfast prepare DATASET  read the labels, print the class table
                    cxrfast cache DATASET    encode every image once through the frozen layers
                    cxrfast sweep            train the tail: folds, epoch search, hold-out
                    cxrfast export RUN       one verified ONNX file
                    cxrfast predict MODEL FILES --out preds.csv

    Research use only: not a medical device, not for diagnosis.
    """


for command in (
    *(fit, prepare, cache, verify, sweep, export, predict, evaluate, explain, bench),
    *(runs, report, review, info, compare, push, phantom, doctor),
):
    main.add_command(command)


if __name__ == "__main__":
    main()
