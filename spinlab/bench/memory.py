"""What the stages of an experiment hold at their peaks, on a model of a known shape.

The model is a checkpoint of random weights in a temporary folder, drawn layer by layer, so that it
is never there as a whole; the experiment is W4A4KV4 without learning. Stages have their names in
the cache. Names of the metrics:

bytes/<stage>/device, bytes/<stage>/host   at its peak: of tensors on the GPU, of the process its
                                           own (`spinlab.bench.resident`), not what it maps of files
estimate/<stage>/device, …/host            what was said before, beyond what the process has; of
                                           a variant eval-* stands for layers-* too, `load` is
                                           what each stage does that reads the model
whole/<stage>/device, …/host               the same of all layers of the shape
bytes/start/host, bytes/checkpoint         of the process before the first stage, with the libraries
                                           of its device; of the files
speed/<stage>                              seconds
"""

import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion

from spinlab.bench.clock import now
from spinlab.bench.models import DTYPES, SHAPES
from spinlab.bench.resident import Watch, own_bytes
from spinlab.bench.results import Results
from spinlab.bench.settings import settings_of
from spinlab.config import (
    Config,
    DataConfig,
    EvalConfig,
    GPTAQConfig,
    GPTQConfig,
    LearnConfig,
    LWCConfig,
    ModelConfig,
    PathsConfig,
    QronosConfig,
    RuntimeConfig,
    WeightsConfig,
)
from spinlab.files import write_json
from spinlab.memory.disk import Write, check_disks, disk
from spinlab.memory.job import Job
from spinlab.memory.needs import needs
from spinlab.model.bytes import byte_tokenizer
from spinlab.model.load import meta_model
from spinlab.model.settings import config_from, on_meta
from spinlab.stages.pipeline import Pipeline
from spinlab.stages.remaining import stages_of

_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Setting:
    """Say what runs: a shape's name, fewer layers perhaps, and how much text.

    model: of `spinlab.bench.models` or conf/model.
    samples: calibration windows; windows: of evaluation; window: tokens of either. method: that
    rounds weights. offload: layers come one by one. variants: that are measured.
    """

    model: str
    layers: int | None
    samples: int
    windows: int
    window: int
    method: str
    offload: bool
    variants: tuple[str, ...] = ("fp", "fake", "integer")


def bench_memory(
    setting: Setting,
    device: torch.device,
    path: Path | None = None,
    folder: Path | None = None,
) -> dict:
    """Return the record of all stages, one after the other.

    folder: where the checkpoint and the cache lie meanwhile, the system's place for temporary files
    by default. Raises InputError, before anything is written there, if they have no room.
    """
    place = Path(tempfile.gettempdir()) if folder is None else folder
    _check_room(setting, device, place)
    place.mkdir(parents=True, exist_ok=True)
    about = {**vars(setting), "device": device.type}
    results = Results(f"bench/memory/{setting.model}", about, path)
    with tempfile.TemporaryDirectory(prefix="spinlab-", dir=place) as temporary:
        there = Path(temporary)
        size = write_checkpoint(shape_of(setting), _dtype(setting), there, device)
        results.add({"bytes/checkpoint": size})
        config = experiment(setting, device, there)
        pipeline = Pipeline(config)
        for kind, of in (("estimate", setting), ("whole", replace(setting, layers=None))):
            said = estimates_of(job_of(of, config, device))
            results.add({f"{kind}/{name}": count for name, count in said.items()})
        assert pipeline.calibration and pipeline.evaluation and pipeline.original.identity
        _warm(device)
        results.add({"bytes/start/host": own_bytes()})
        stages: dict[str, Callable[[], object]] = {}
        for name, ask in stages_of(pipeline):
            stages.setdefault(name, ask)  # two variants share their weights
        for name, ask in stages.items():
            results.add(_looked_at(name, ask, device))
    return results.record()


def _looked_at(name: str, ask: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Run a stage and return what it held at its peaks, and its seconds."""
    on_gpu, start = device.type == "cuda", now(device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    with Watch() as watch:
        ask()
    seconds = now(device) - start
    held = {f"bytes/{name}/device": torch.cuda.max_memory_allocated(device)} if on_gpu else {}
    return {**held, f"bytes/{name}/host": watch.most, f"speed/{name}": seconds}


def shape_of(setting: Setting) -> dict[str, Any]:
    """Return the architecture of a setting's model."""
    known = SHAPES.get(setting.model) or settings_of([f"model={setting.model}"]).model.architecture
    shape = {"model_type": "llama", **known, "tie_word_embeddings": False}
    shape["max_position_embeddings"] = 4096
    shape["vocab_size"] = max(shape["vocab_size"], 256)  # the tokenizer reads bytes
    if setting.layers is not None:
        shape["num_hidden_layers"] = setting.layers
    return shape


def _dtype(setting: Setting) -> torch.dtype:
    return DTYPES.get(setting.model, torch.bfloat16)


def experiment(setting: Setting, device: torch.device, folder: Path) -> Config:
    """Return the settings of an experiment on the checkpoint in a folder."""
    sizes = setting.samples, setting.window
    methods = {
        "gptq": GPTQConfig(*sizes),
        "gptaq": GPTAQConfig(*sizes),
        "qronos": QronosConfig(*sizes),
        "lwc": LWCConfig(*sizes),
    }
    return Config(
        name="memory",
        model=ModelConfig(
            name=setting.model, path=str(folder), dtype=str(_dtype(setting)).split(".")[1]
        ),
        data=DataConfig(),
        learn=LearnConfig(steps=0),
        weights=WeightsConfig(setting.method, **methods),  # type: ignore[arg-type]
        runtime=RuntimeConfig(device=str(device), offload=setting.offload),
        eval=EvalConfig(list(setting.variants), setting.window, setting.windows),
        paths=PathsConfig(cache=str(folder / "cache"), runs=str(folder / "runs")),
    )


def write_checkpoint(
    shape: dict[str, Any], dtype: torch.dtype, folder: Path, device: torch.device
) -> int:
    """Write a sharded checkpoint of random weights, a layer at a time; return its bytes.

    Gains of norms are 1, other numbers have a deviation of 0.02. They are drawn on the device, and
    lie in files as transformers saves them: experts apart.
    """
    config = config_from("shape.", shape)
    model = on_meta(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    generator, placed, size = torch.Generator(device).manual_seed(0), {}, 0
    for number, names in enumerate(_shards(list(model.state_dict()))):
        tensors = {}
        for name in names:
            like = model.state_dict()[name]
            drawn = torch.empty(like.shape, dtype=dtype, device=device)
            drawn = (
                drawn.fill_(1) if like.dim() == 1 else drawn.normal_(0, 0.02, generator=generator)
            )
            tensors[name] = drawn.cpu()
        file, tensors = f"model-{number:05d}.safetensors", revert_weight_conversion(model, tensors)
        save_file(tensors, folder / file, {"format": "pt"})
        placed |= dict.fromkeys(tensors, file)
        size += sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": placed}
    write_json(folder / "model.safetensors.index.json", index)
    return size


def _shards(names: list[str]) -> Iterator[list[str]]:
    """Yield the names of the ends' tensors, then those of each layer."""
    found: dict[int, list[str]] = {}
    for name in names:
        layer = _LAYER.search(name)
        found.setdefault(-1 if layer is None else int(layer[1]), []).append(name)
    yield from (found[number] for number in sorted(found))


def job_of(setting: Setting, config: Config, device: torch.device) -> Job:
    """Return what needs depend on, of a setting's shape, with every stage still to run.

    config: what `experiment` makes of the setting.
    """
    model = replace(config.model, path=None, weights="random", architecture=shape_of(setting))
    return Job(config, meta_model(model, None), device, {n for n, _ in stages_of(Pipeline(config))})


def _check_room(setting: Setting, device: torch.device, folder: Path) -> None:
    """Hold the checkpoint, and what the stages write beside it, against a folder's disk."""
    job = job_of(setting, experiment(setting, device, folder), device)
    size = sum(t.numel() * t.element_size() for t in job.shape.state_dict().values())
    check_disks([Write(f"--folder={folder}", folder, size + disk(job))])


def estimates_of(job: Job) -> dict[str, int]:
    """Return the bytes that stages are said to need, by <stage>/device and <stage>/host.

    The most of them, where a stage has several needs.
    """
    found: dict[str, int] = {}
    for need in needs(job):
        for side, count in (("device", need.device), ("host", need.host)):
            name = f"{need.name}/{side}"
            found[name] = max(found.get(name, 0), count)
    return found


def _warm(device: torch.device) -> None:
    """Have a device's libraries loaded: they would count as a stage's."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        eye = torch.eye(16, dtype=dtype, device=device)
        torch.mm(eye, eye)
    torch.linalg.cholesky_ex(torch.eye(16, dtype=torch.float64, device=device))
