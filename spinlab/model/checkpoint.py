"""A checkpoint folder, seen from outside: its config, the files that are read, their digests."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from spinlab import parallel
from spinlab.assets import packaged_folder
from spinlab.config import ModelConfig
from spinlab.errors import InputError
from spinlab.files import file_digest
from spinlab.model.files import (
    CONFIG,
    EXPORTED,
    MANIFEST,
    SETTINGS,
    TOKENIZER,
    VOCABULARY,
    check_folder,
    files_like,
    read_bytes,
    read_json,
    weights_of,
)
from spinlab.model.hub import snapshot
from spinlab.model.settings import config_from
from spinlab.model.whole import check_whole

# where floats come from that no checkpoint has, by the method that packed them
_FLOATS_OF = {
    "mxfp4": "load it in transformers with quantization_config=Mxfp4Config(dequantize=True) and "
    "name the folder of its save_pretrained",
}


@dataclass(frozen=True)
class Checkpoint:
    """Name a folder with a stock checkpoint; `place` is how sentences call it."""

    place: str
    folder: Path
    origin: dict[str, str]  # where it came from, without a path of this machine

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The config of the model; InputError for an unsupported family or impossible settings."""
        check_folder(self.place, self.folder)
        file = self.folder / CONFIG
        settings = read_json(file)
        if quantization := settings.get("quantization_config"):
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            cure = _FLOATS_OF.get(method or "", "name the checkpoint it was made from")
            raise InputError(
                f"{self.place} is stored quantized ({method or 'unnamed method'}), and only float "
                f"weights can be rotated: {cure}"
            )
        config = config_from(f"{file}: ", settings)
        config.name_or_path = self.origin.get("hub", "")  # some tokenizers are known by it
        return config

    @property
    def half(self) -> torch.dtype:
        """The dtype of 16 bits that the config declares; bfloat16 where it declares another."""
        settings = read_json(self.folder / CONFIG)
        declared = settings.get("dtype", settings.get("torch_dtype"))
        return torch.float16 if declared == "float16" else torch.bfloat16

    @cached_property
    def weights(self) -> list[Path]:
        """The files that hold the weights."""
        return weights_of(self.place, self.folder)

    def check(self) -> None:
        """Raise InputError for what can be told without reading a number: all must fit."""
        check_whole(self.place, self.config, self.weights)
        if "hub" in self.origin:
            self._refuse_export()
        for file in files_like(self.folder, SETTINGS):
            read_json(file)

    def _refuse_export(self) -> None:
        """Raise InputError for an export on the hub: its manifest is read from a folder only."""
        if EXPORTED in read_json(self.folder / CONFIG):
            raise InputError(
                f"{self.place} is an exported model, and its {MANIFEST} is only read from a "
                "folder: download it whole and give the folder as model.path"
            )

    def weight_digests(self) -> dict[str, str]:
        """Return the digest of every file that the model is made of, by name.

        How text is generated from it is no part of it.
        """
        others = files_like(self.folder, [CONFIG, MANIFEST])
        return self._digests([*others, *self.weights])

    def tokenizer_digests(self) -> dict[str, str]:
        """Return the digest of every file that the tokenizer is made of, and what it is read as."""
        family = self.config.model_type
        return {"family": family, **self._digests(self._tokenizer_files())}

    def _tokenizer_files(self) -> list[Path]:
        """Return the files that the tokenizer is made of; InputError where there are none."""
        check_folder(self.place, self.folder)
        if not files_like(self.folder, VOCABULARY):
            raise InputError(
                f"{self.place} holds no tokenizer ({', '.join(VOCABULARY)}): copy the one that "
                "the model was trained with beside it"
            )
        files = files_like(self.folder, TOKENIZER)
        for file in files:
            read_bytes(file, 64)  # a pointer, or a file that cannot be opened
        return files

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer; InputError where its files are none, or want foreign code to run."""
        self._tokenizer_files()
        try:
            return AutoTokenizer.from_pretrained(
                self.folder, config=self.config, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # files that are no tokenizer's fail in any way
            reason = " ".join(str(error).split())
            settings = self.folder / "tokenizer_config.json"
            if settings.is_file() and "auto_map" in read_json(settings):
                reason = "it needs code of its own (auto_map), and foreign code is not run"
            raise InputError(f"{self.place}: its tokenizer cannot be read: {reason}") from error

    def _digests(self, files: list[Path]) -> dict[str, str]:
        """Digest files; of several processes the first one reads them."""
        if not parallel.is_main():
            return parallel.share({})
        with ThreadPoolExecutor() as threads:
            found = threads.map(content_digest, files)
            names = (str(file.relative_to(self.folder)) for file in files)
            return parallel.share(dict(zip(names, found, strict=True)))


def checkpoint_of(config: ModelConfig, converted: Path | None) -> Checkpoint:
    """Return where a pretrained model lies; `converted` is what a packaged one was converted to.

    A hub repository that is not in the local cache is downloaded to it.
    """
    if config.path:
        folder = Path(config.path).expanduser()
        return Checkpoint(f"model.path={config.path}", folder, {"folder": folder.resolve().name})
    if config.package:
        assert converted or not config.is_gguf, "a GGUF is converted before it is loaded"
        folder = converted or packaged_folder(config.package, config.file or "")
        origin = {"package": config.package, "file": Path(config.file or "").name}
        return Checkpoint(f"{config.file} of {config.package}", folder, origin)
    hub = config.hub or ""
    folder = snapshot(hub, config.revision)
    return Checkpoint(f"model.hub={hub}", folder, {"hub": hub, "commit": folder.name})


def content_digest(file: Path) -> str:
    """Return the sha256 of a file, read once as long as it does not change."""
    try:
        state = file.stat()
        return _known_digest(file, state.st_size, state.st_mtime_ns, state.st_ino)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error


@cache
def _known_digest(file: Path, *state: int) -> str:
    return file_digest(file)
