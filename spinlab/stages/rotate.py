"""Stage `rotate`: the initial rotations, once they have passed the invariance gate.

They are drawn, or made from activations, or read from a file (`given`). Their factors are rounded
behind the learning (`factors`).
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from spinlab.cache import Artifact
from spinlab.config import plain
from spinlab.files import file_digest, write_json
from spinlab.model.modules import map_of
from spinlab.rotation.exchange import with_online
from spinlab.rotation.initial import initial_rotations
from spinlab.rotation.ranges import warn_of_lost_ranges
from spinlab.rotation.rotations import RotationSet
from spinlab.stages.given import Given
from spinlab.stages.original import Original
from spinlab.stages.rotations import FILE, gate
from spinlab.stages.run import Run
from spinlab.stages.statistics import statistics_in
from spinlab.stages.text import Calibration

log = logging.getLogger(__name__)


def rotate(
    run: Run,
    original: Original,
    calibration: Calibration,
    given: Given,
    statistics: Artifact | None,
) -> Artifact:
    """Make the initial rotations; statistics: of activations, where their kind needs them."""
    depends = [original.identity, calibration.key, rotation_settings(run), run.config.seed]
    if given.file is not None:
        depends.append(file_digest(given.file))
    elif statistics is not None:
        depends.append(statistics.key)

    def work(out: Path) -> None:
        rotations = _initial(run, original, given, statistics)
        rotations.save(out / FILE)
        write_json(out / "gate.json", gate(run, original, calibration, rotations))

    made = run.cache.run("rotate", depends, work)
    if given.file is not None:
        found, config = RotationSet.load(made.path / FILE), run.config
        method, name = config.weights.method, given.file.name
        warn_of_lost_ranges(found, config.quant, config.kv, method, name)
    return made


def rotation_settings(run: Run) -> dict[str, Any]:
    """Name the settings that the initial rotations depend on, for keys and files."""
    config = run.config.rotation
    unused = {"load", "factors"} | (set() if config.searches else {"duquant"})
    unused |= set() if config.needs_statistics else {"statistics"}
    unused |= {"blocks", "wush"} - {config.inputs}
    return {name: value for name, value in plain(config).items() if name not in unused}


def _initial(
    run: Run, original: Original, given: Given, statistics: Artifact | None
) -> RotationSet:
    """Read the rotations, or draw them, or make them from statistics."""
    config, model_map = run.config.rotation, map_of(original.shape)
    exact, generator = replace(config, factors=None), run.generator("init")
    about = {"seed": run.config.seed, "model": original.identity, "family": model_map.family}
    about = plain({**about, "rotation": rotation_settings(run)})
    if given.file is None or given.rotations is None:
        known = None if statistics is None else statistics_in(statistics)
        drawn = initial_rotations(exact, model_map, generator, known, run.device)
        return replace(drawn, about=about)
    loaded, name = given.rotations, given.file.name
    if given.file.suffix != ".bin":
        log.info("%-12s all from %s; rotation.* but factors is not used", "rotations", name)
        return replace(loaded, peaks={})  # found anew, where a format asks for them
    online = initial_rotations(
        replace(exact, r1="none", r2="none", load=None), model_map, generator
    )
    log.info("%-12s R1 and R2 from %s, the rest from rotation.*", "rotations", name)
    return replace(with_online(loaded, online), about={**about, **(loaded.about or {})})
