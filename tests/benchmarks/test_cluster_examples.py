"""The examples in `benchmarks/cluster/`: Ray takes the files, bash the script, and the script does what it says."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.states import PATIENCE, wait_until
from tests.test_docs import parse

FOLDER = Path(__file__).parents[2] / "benchmarks" / "cluster"
SLURM = FOLDER / "slurm.sh"
YAML = sorted(path.name for path in FOLDER.glob("*.yaml"))


def filled(name: str) -> dict[str, Any]:
    """An example as `ray up` reads it, completed with Ray's defaults and held to Ray's schema."""
    pytest.importorskip("ray")
    import yaml
    from ray.autoscaler._private.util import prepare_config, validate_config

    config: dict[str, Any] = prepare_config(yaml.safe_load((FOLDER / name).read_text(encoding="utf-8")))
    validate_config(config)
    return config


@pytest.mark.parametrize("name", YAML)
def test_ray_takes_the_example(name: str) -> None:
    config = filled(name)
    assert config["cluster_name"] == "cxr-fast"
    assert config["max_workers"] >= 1
    assert any("ray start --head" in line for line in config["head_start_ray_commands"])
    assert any("$RAY_HEAD_IP:6379" in line for line in config["worker_start_ray_commands"])
    for line in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        assert line.startswith("source /shared/cxr-fast/env.sh; "), "a node without the token lets anybody in"


def test_both_kinds_of_example_are_there() -> None:
    assert YAML == ["cloud.yaml", "on-premises.yaml"]
    assert filled("on-premises.yaml")["provider"]["type"] == "local"
    cloud = filled("cloud.yaml")
    assert cloud["available_node_types"][cloud["head_node_type"]]["resources"] == {"CPU": 0}


def test_the_cache_commands_of_the_examples_parse() -> None:
    lines = [line for path in FOLDER.iterdir() for line in path.read_text(encoding="utf-8").splitlines()]
    commands = [line[line.index("cxrfast cache") :] for line in lines if "cxrfast cache" in line]
    assert len(commands) == 3
    for command in commands:
        parse(command)


def test_what_the_page_on_clusters_shows_of_the_example_is_in_it() -> None:
    page = (FOLDER.parent.parent / "docs" / "how-to" / "clusters.md").read_text(encoding="utf-8")
    example = (FOLDER / "on-premises.yaml").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert shown in example


def test_the_schema_can_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (FOLDER / "on-premises.yaml").read_text(encoding="utf-8")
    (tmp_path / "wrong.yaml").write_text(text.replace("auth:", "autth:"))
    monkeypatch.setattr(f"{__name__}.FOLDER", tmp_path)
    with pytest.raises(Exception, match="autth"):
        filled("wrong.yaml")


@pytest.mark.parametrize("name", [*YAML, "slurm.sh"])
def test_the_flags_of_ray_start_exist(name: str) -> None:
    pytest.importorskip("ray")
    from ray.scripts.scripts import start

    known = {option for param in start.params for option in param.opts}
    text = (FOLDER / name).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if "ray start" in line and not line.lstrip().startswith("#")]
    assert len(lines) == 2
    shared = re.findall(r"lent=\((.*)\)", text)
    used = {
        flag for line in [*lines, *shared] for flag in re.findall(r"(?<![\w-])--[a-z-]+", line.split("ray start")[-1])
    }
    assert "--head" in used
    assert used <= known


# The Slurm script, with Slurm and Ray played.

STANDINS = {
    # Slurm's srun: leave out its own options and run the rest.
    "srun": 'while [[ $1 == --* ]]; do echo "srun $1" >> log; shift; done; exec "$@"',
    "ray": """echo "ray $*" >> log; echo "$RAY_AUTH_MODE $RAY_AUTH_TOKEN" >> tokens
case "$1" in
health-check) [[ -e head ]] ;;
start) [[ $* == *--head* ]] && touch head; exec sleep 3600 ;;
esac""",
    # As the real one, it ends when all nodes are there.
    "python": """cat > waits.py; echo "python $*" >> log
until [[ $2 == 1 ]] || grep -q 'ray start --address' log; do sleep 0.02; done""",
    "getent": 'echo "127.0.1.1 STREAM $2"; echo "10.0.0.7 STREAM"',
    "work": """echo "work $* at $RAY_ADDRESS" >> log
trap 'echo stopping >> log; exit 130' TERM
[[ $1 == long ]] && { touch working; while :; do sleep 0.05; done; }
exit "$2" """,
}


@pytest.fixture
def job(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., subprocess.Popen[str]]:
    """Starts the script as Slurm would start it, in a process group of its own that ends with the test."""
    if not shutil.which("bash"):
        pytest.skip("needs bash")
    (tmp_path / "env" / "bin").mkdir(parents=True)
    for name, text in STANDINS.items():
        (tmp_path / "env" / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "env" / "bin" / name).chmod(0o755)
    (tmp_path / "env" / "bin" / "activate").write_text(f'PATH="{tmp_path / "env" / "bin"}:$PATH"\n')

    def begin(*words: str, nodes: int = 3) -> subprocess.Popen[str]:
        slurm = {"JOB_ID": "123456", "JOB_NUM_NODES": str(nodes), "CPUS_PER_TASK": "16", "GPUS_ON_NODE": "2"}
        environment = {f"SLURM_{name}": value for name, value in slurm.items()}
        environment |= {"CXR_FAST_ENV": str(tmp_path / "env"), "SLURMD_NODENAME": "node1", "PATH": os.environ["PATH"]}
        process = subprocess.Popen(
            ["bash", str(SLURM), *words],
            cwd=tmp_path,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        request.addfinalizer(lambda: end(process))
        return process

    return begin


def end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("name", ["slurm.sh", "env.sh"])
def test_bash_takes_the_script(name: str) -> None:
    assert subprocess.run(["bash", "-n", str(FOLDER / name)], check=False).returncode == 0


@pytest.mark.parametrize("code", [0, 1])
def test_the_job_starts_head_and_workers_and_ends_as_the_command_does(
    job: Callable[..., subprocess.Popen[str]], tmp_path: Path, code: int
) -> None:
    process = job("work", "short", str(code))
    assert process.wait(timeout=PATIENCE) == code
    log = (tmp_path / "log").read_text().splitlines()
    head = next(line for line in log if line.startswith("ray start --head"))
    assert "--node-ip-address=10.0.0.7 --port=23456" in head
    assert "--num-cpus=16 --num-gpus=2" in head
    assert "--block" in head
    assert "srun --nodelist=node1" in log
    assert {"srun --nodes=1", "srun --nodes=2", "srun --ntasks=2", "srun --exclude=node1"} <= set(log)
    assert any(line.startswith("ray start --address=10.0.0.7:23456 --num-cpus=16") for line in log)
    assert "work short 0 at 10.0.0.7:23456".replace("0 at", f"{code} at") in log
    assert "python - 3" in log
    (line,) = set((tmp_path / "tokens").read_text().splitlines())
    assert re.fullmatch("token [0-9a-f]{64}", line), "every node has the job's own token"
    compile((tmp_path / "waits.py").read_text(), "waits.py", "exec")


def test_a_job_of_one_node_starts_no_worker(job: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    assert job("work", "short", "0", nodes=1).wait(timeout=PATIENCE) == 0
    assert "--address=" not in (tmp_path / "log").read_text().replace("health-check --address", "")


@pytest.mark.kill
def test_the_end_of_the_jobs_time_is_told_to_the_command_and_waited_for(
    job: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = job("work", "long", "0")
    wait_until((tmp_path / "working").exists, "the command", lambda: process.poll() is None)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == 130
    assert (tmp_path / "log").read_text().splitlines()[-1] == "stopping"


def test_a_job_without_a_command_says_how(job: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = job()
    assert process.wait(timeout=PATIENCE) == 2
    assert process.stderr is not None
    assert "usage: sbatch" in process.stderr.read()
    assert not (tmp_path / "log").exists()


def test_a_node_without_an_address_is_named(job: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    (tmp_path / "env" / "bin" / "getent").write_text('#!/bin/bash\necho "127.0.1.1 STREAM"\n')
    process = job("work", "short", "0")
    assert process.wait(timeout=PATIENCE) == 1
    assert process.stderr is not None
    assert "no address of node1" in process.stderr.read()
