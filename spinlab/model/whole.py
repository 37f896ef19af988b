"""Whether a checkpoint's tensors are those of the model that its config describes, and finite.

Both are told from the files, before a model is made: names and shapes from the headers of the
safetensors files, by transformers' own rules of loading; numbers by reading them once.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as transformers_logging

from spinlab.errors import InputError
from spinlab.model.files import read_bytes
from spinlab.model.settings import on_meta

_CHUNK = 2**24  # numbers that are looked at together
_NAMED = 3  # tensors that a sentence names

Report = dict[str, Any]  # of transformers: keys by what is wrong with them


def check_whole(place: str, config: PreTrainedConfig, files: list[Path]) -> None:
    """Raise InputError unless files hold the tensors of a config's model, all of them and no more.

    transformers loads them as it would, without their numbers: on the meta device.
    """
    stored = _stored_shapes(files)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in stored.items()}
    model = on_meta(config)
    load: Any = type(model).from_pretrained
    with _silence():  # what its report says is said below
        try:
            _, report = load(
                None,
                config=config,
                state_dict=tensors,
                device_map="meta",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
            if any(name not in stored for name, *_ in report["mismatched_keys"]):
                report = _differences(model, stored) or report  # a stack of experts' matrices
        except RuntimeError:  # matrices of experts that do not stack
            if not (report := _differences(model, stored)):
                raise
    check_report(place, config, report)


def _differences(model: PreTrainedModel, stored: dict[str, list[int]]) -> Report:
    """Report how stored shapes differ from those that transformers would write, if they do."""
    written = revert_weight_conversion(model, model.state_dict())
    due = {name: list(tensor.shape) for name, tensor in written.items()}
    both = [name for name in due if stored.get(name, due[name]) != due[name]]
    report: Report = {
        "missing_keys": due.keys() - stored.keys() - set(model.all_tied_weights_keys),
        "unexpected_keys": stored.keys() - due.keys(),
        "mismatched_keys": {(name, tuple(stored[name]), tuple(due[name])) for name in both},
    }
    return report if any(report.values()) else {}


def check_report(place: str, config: PreTrainedConfig, report: Report) -> None:
    """Raise InputError if a loading report of transformers names any tensor or error."""
    family = config.model_type
    missing, extra = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    wrong = sorted(report["mismatched_keys"])
    faults = [
        f"lacks {_names(missing)}" if missing else "",
        f"holds {_names(extra)}, which {family} has no place for" if extra else "",
        *(f"has {n} of shape {(*found,)} for {(*due,)}" for n, found, due in wrong[:_NAMED]),
        *(str(error) for error in report.get("error_msgs", ())),
    ]
    if any(faults):
        said = "; ".join(filter(None, faults))
        raise InputError(
            f"{place} {said}: it is not the whole {family} model of its config.json, so copy or "
            "download it again, or name the checkpoint it was made from"
        )


def check_tied(place: str, config: PreTrainedConfig, files: Iterable[Path]) -> None:
    """Raise InputError where files hold two tensors that their config says are one.

    transformers keeps such tensors apart, with a warning, and the config goes on to call them tied.
    """
    held = {name: file for file in files for name in _names_in(file)}
    for name, other in on_meta(config).all_tied_weights_keys.items():
        if name in held and other in held and not _same(name, held[name], other, held[other]):
            raise InputError(
                f"{place}: config.json says tie_word_embeddings=true, and {name} is not "
                f"{other}: set it to false there, or delete {name} to run with the embedding as "
                "the head"
            )


def _names_in(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as stored:
        return list(stored.keys())


def _same(name: str, file: Path, other: str, of_other: Path) -> bool:
    """Tell whether two tensors of one shape hold the same numbers, in steps of some rows."""
    with safe_open(file, framework="pt") as one, safe_open(of_other, framework="pt") as two:
        first, second = one.get_slice(name), two.get_slice(other)
        rows, width = first.get_shape()
        step = max(1, _CHUNK // width)
        return all(
            bool((first[i : i + step] == second[i : i + step]).all()) for i in range(0, rows, step)
        )


def check_numbers(place: str, files: Iterable[Path]) -> None:
    """Read every number once; raise InputError naming the first tensor with NaN or infinity."""
    for file in files:
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - a file is no dictionary
                if not is_finite(stored.get_tensor(name)):
                    raise InputError(
                        f"{place}: {name} in {file.name} holds NaN or infinity: copy or download "
                        "it again, or train it anew"
                    )


def is_finite(tensor: torch.Tensor) -> bool:
    """Tell whether all numbers are finite, in steps that need little memory."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    for chunk in tensor.flatten().split(_CHUNK):
        numbers = chunk.float() if chunk.element_size() == 1 else chunk  # what has no aminmax
        if not torch.stack(numbers.aminmax()).isfinite().all():  # which hand NaN on
            return False
    return True


def _stored_shapes(files: list[Path]) -> dict[str, list[int]]:
    """Read names and shapes from headers; raise InputError for a file that is torn or no floats."""
    shapes: dict[str, list[int]] = {}
    for file in files:
        read_bytes(file, 64)  # a pointer, or a file that cannot be opened
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118
                    if name in shapes:
                        raise InputError(f"{file.name} holds {name} again: take it out of one file")
                    tensor = stored.get_slice(name)
                    if tensor.get_dtype()[0] not in "FB" or tensor.get_dtype() == "BOOL":
                        raise InputError(
                            f"{file}: {name} holds {tensor.get_dtype()} numbers, and only float "
                            "weights can be rotated: name the checkpoint it was made from"
                        )
                    shapes[name] = tensor.get_shape()
        except SafetensorError as error:
            raise InputError(
                f"{file} is torn or no safetensors file ({error}): copy or download it again"
            ) from error
    return shapes


def _names(names: list[str]) -> str:
    """Name the first of some tensors and count the others."""
    more = f" and {len(names) - _NAMED} more tensors" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


@contextmanager
def _silence() -> Iterator[None]:
    """Keep transformers' own report of a loading from the log."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
