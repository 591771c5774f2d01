"""The fields of every kind of benchmark result.

They are dicts as JSON has them, since names of stages and arms are keys. msgspec checks them on reading and writing.
Results of older versions lack what is NotRequired.
"""

from __future__ import annotations

from typing import Any, Final, Literal, NotRequired, TypedDict

LATENCY, THROUGHPUT = "cxr-fast latency", "cxr-fast throughput"
COMPARISON, CACHE, TRAINING = "cxr-fast comparison", "cxr-fast cache benchmark", "cxr-fast training benchmark"
SCHEMAS = {LATENCY: 2, THROUGHPUT: 1, COMPARISON: 1, CACHE: 1, TRAINING: 1}
# Where a result of turns keeps n, median, minimum and maximum of its samples.
SPREADS = {COMPARISON: "seconds", CACHE: "seconds_per_image", TRAINING: "seconds_per_sample"}
WHOLE = "file to probabilities"
MODEL_ONLY: Final = "model only"
FROM_FILES: Final = "from files"
ARMS: tuple[Literal["model only", "from files"], ...] = (MODEL_ONLY, FROM_FILES)


class MachineFields(TypedDict):
    """`hardware.machine()`."""

    cpu: str | None
    cpu_flags: list[str]
    cores: int
    cores_affinity: int | None
    cores_quota: float | None
    governor: str | None
    memory_gib: float | None
    os: str
    python: str


class Noise(TypedDict):
    """`Watch.noise()`: shares are 0..1 of all cores, None where the system does not say."""

    share: float | None
    noisy: bool
    stretches: list[dict[str, Any]]
    worst: NotRequired[float | None]
    threshold: NotRequired[float]
    samples: NotRequired[int]
    noisy_samples: NotRequired[int]


class Commit(TypedDict):
    """The checkout that the package ran from."""

    revision: str
    dirty: bool


class ResultHead(TypedDict):
    """What every result begins with; the date is UTC."""

    kind: str
    schema: int
    written_by: str
    date: str
    commit: Commit | None
    versions: dict[str, str]
    machine: MachineFields


class BenchResult(ResultHead):
    """What every result has."""

    noise: Noise
    gpus: dict[str, list[dict[str, Any]]]


class ModelFields(TypedDict):
    """The model and what really ran it."""

    model: str
    model_sha256: str
    variant: str
    provenance: str
    device: str
    provider: str
    where: str
    why: str
    threads: int


class Budget(TypedDict):
    """What a verdict is held against."""

    seconds: float
    percentile: int


class SampleSummary(TypedDict):
    """Percentiles that n supports, each with its one-sided 99 % bound, and the medians of three windows; seconds."""

    n: int
    percentiles: dict[str, float]
    bounds: dict[str, float | None]
    window_medians: list[float]


class TimedFields(TypedDict):
    """Samples in seconds by stage, and the verdict of those from file to probabilities where there is a budget."""

    n: int
    samples: dict[str, list[float]]
    summary: dict[str, SampleSummary]
    budget: Budget | None
    verdict: NotRequired[dict[str, Any]]


class LatencyResult(BenchResult, ModelFields, TimedFields):
    """Of `bench latency`."""

    images: dict[str, Any]
    cold: dict[str, float]
    quiet: NotRequired[SampleSummary | None]


class ThroughputResult(BenchResult, ModelFields):
    """Of `bench throughput`, whatever the scenario."""

    images: dict[str, Any]
    scenario: str
    seconds: float
    workers: int


Point = TypedDict(
    "Point",
    {
        "batch": int,
        "peak_rss": int | None,
        "peak_rss_own": NotRequired[bool],
        "gpu_mib": NotRequired[float | None],
        "noisy_windows": NotRequired[int],
        "model only": dict[str, Any],
        "from files": dict[str, Any],
    },
)


class OfflineResult(ThroughputResult):
    """Images a second by batch size."""

    points: list[Point]
    knee: dict[str, int]
    best: dict[str, float]
    stopped: NotRequired[dict[str, Any] | None]


class SingleStreamResult(ThroughputResult, TimedFields):
    """One image after the other."""

    rate: float


class Trial(TypedDict):
    """Requests at one rate, `served` of the `n` that were planned."""

    rate: float
    n: int
    served: int
    samples: list[float]
    verdict: dict[str, Any]


class ServerResult(ThroughputResult):
    """Random arrivals: the largest rate that was proved, None without one."""

    service: list[float]
    simulated: dict[str, float]
    trials: list[Trial]
    capacity: float
    rate: float | None
    budget: Budget
    verdict: dict[str, Any]
    reason: NotRequired[str]


class SampleSpread(TypedDict):
    """Of one arm's samples."""

    n: int
    median: float
    min: float
    max: float


class RatioFields(TypedDict):
    """`measure.Ratio`."""

    median: float
    low: float | None
    high: float | None
    n: int


class TurnsResult(BenchResult):
    """Of arms that took turns: seconds of each round by arm."""

    samples: dict[str, list[float]]
    window_medians: dict[str, list[float]]


class ComparisonResult(TurnsResult):
    """Of `bench compare`."""

    seconds: dict[str, SampleSpread]
    models: dict[str, dict[str, str]]
    images: dict[str, Any]
    ratio: RatioFields
    difference: dict[str, Any]
    yardstick: NotRequired[dict[str, dict[str, float]]]
    batch_size: NotRequired[int]
    rounds: NotRequired[int]


class BesidePlainResult(TurnsResult):
    """Of a benchmark beside the plain pipeline."""

    images: int
    weights: str
    ratios: dict[str, RatioFields]
    device: NotRequired[str]
    extrapolated: NotRequired[dict[str, float]]
    largest_pixel_difference: NotRequired[int]


class CacheResult(BesidePlainResult):
    """Of `bench cache`."""

    seconds_per_image: dict[str, SampleSpread]
    views: NotRequired[str]
    image_size: NotRequired[int]
    workers: NotRequired[int]
    bound_is: NotRequired[str]
    largest_embedding_difference: NotRequired[float]
    left_out: NotRequired[int]


class TrainingResult(BesidePlainResult):
    """Of `bench train`."""

    seconds_per_sample: dict[str, SampleSpread]
    threads: NotRequired[int]
    unfreeze_blocks: NotRequired[int]
    fastest: NotRequired[str]
    largest_token_difference: NotRequired[float]
    largest_loss_difference: NotRequired[float]


KINDS: dict[str, type] = {
    LATENCY: LatencyResult,
    COMPARISON: ComparisonResult,
    CACHE: CacheResult,
    TRAINING: TrainingResult,
}
SCENARIOS: dict[str, type] = {
    "offline": OfflineResult,
    "single-stream": SingleStreamResult,
    "server": ServerResult,
}
