"""What stages and exports are said to write, against the files that they leave."""

from dataclasses import replace

import torch
from safetensors.torch import load_file

from spinlab.bench.memory import Setting, experiment, shape_of, write_checkpoint
from spinlab.config import ExportConfig, RotationConfig
from spinlab.config.rotation import StatisticsConfig
from spinlab.memory.disk import disk, writes
from spinlab.memory.job import Job
from spinlab.stages.export import export
from spinlab.stages.pipeline import Pipeline
from spinlab.stages.remaining import stages_of

CPU = torch.device("cpu")
SETTING = Setting("toy", 3, 2, 2, 48, "gptq", offload=True)


def test_files_have_the_bytes_that_were_estimated(tmp_path):
    """And beside them a toy's small numbers: scales, clips, the words of files."""
    write_checkpoint(shape_of(SETTING), torch.float32, tmp_path, CPU)
    made = experiment(SETTING, CPU, tmp_path)
    rotation = RotationConfig(
        r1="duquant",
        r2="duquant",
        r3="hadamard",
        r4="hadamard",
        statistics=StatisticsConfig(samples=8, sequence_length=64),
    )
    config = replace(
        made, rotation=rotation, export=ExportConfig(artefact=str(tmp_path / "artefact"))
    )
    pipeline = Pipeline(config)
    stages = stages_of(pipeline)
    for _, ask in stages:
        ask()
    export(pipeline)
    job = Job(config, pipeline.original.shape, CPU, ())
    cache = tmp_path / "cache"

    def said(*names: str) -> int:
        return disk(replace(job, remaining=names))

    def written(pattern: str) -> int:
        return sum(file.stat().st_size for file in cache.rglob(pattern))

    assert said("statistics") <= written("statistics.safetensors") < 1.1 * said("statistics")
    (file,) = cache.rglob("rotations.safetensors")
    stored = load_file(file)
    assert said("rotate") == sum(stored[name].nbytes for name in ("r1", "r2"))
    states = written("head.safetensors") + sum(
        written(f"states/{text}/*.safetensors") for text in ("wiki", "c4")
    )
    assert said("eval-fp") <= states < 1.2 * said("eval-fp")
    of_artefact = writes(job)[1]
    files = sum(file.stat().st_size for file in of_artefact.folder.glob("[wr]e*.safetensors"))
    assert of_artefact.count <= files < 1.5 * of_artefact.count
