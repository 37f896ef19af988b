"""What a model's license is, as far as the model tells; what it does not tell stays open."""

import logging
from types import SimpleNamespace

import pytest
from gguf import GGUFWriter
from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.errors import OfflineModeIsEnabled

from spinlab.config import ModelConfig
from spinlab.model import license as licenses
from spinlab.model.checkpoint import Checkpoint
from spinlab.model.license import license_of, with_license

APACHE = "\n                    Apache License\n              Version 2.0, January 2004\n"


def local(folder) -> ModelConfig:
    return ModelConfig(weights="pretrained", path=str(folder))


@pytest.mark.parametrize(
    ("head", "found"),
    [
        ("license: mit", {"license": "mit"}),
        (
            "license: other\nlicense_name: own\nlicense_link: https://a.b/c",
            {"license": "other", "license_name": "own", "license_link": "https://a.b/c"},
        ),
        (
            "license: other\nlicense_name: own\nlicense_link: LICENSE",
            {"license": "other", "license_name": "own"},
        ),
        ("license_name: own", {}),
        ("license: [mit]", {}),
        ("tags: [a]", {}),
    ],
)
def test_the_head_of_a_readme_tells(tmp_path, head, found):
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n# A model\n")
    assert license_of(local(tmp_path)) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (APACHE, {"license": "apache-2.0"}),
        ("MIT License\n\nCopyright (c) 2024", {"license": "mit"}),
        ("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT", {"license": "llama3.2"}),
        ("LLAMA 2 COMMUNITY LICENSE AGREEMENT", {"license": "llama2"}),
        ("All rights reserved." + 30 * " Words." + APACHE, {}),
        ("# License\n\nThe MIT License (MIT)\n\nCopyright (c) 2024", {"license": "mit"}),
        (
            "Copyright (c) 2024 A\n\nPermission is hereby granted, free of charge, to any person\n"
            "obtaining a copy of this software",
            {"license": "mit"},
        ),
        ("Copyright 2018 A. All rights reserved.\n" + APACHE, {"license": "apache-2.0"}),
        ("Apache License, Version 2.0\n", {"license": "apache-2.0"}),
        ("META LLAMA 3 COMMUNITY LICENSE AGREEMENT\t\n", {"license": "llama3"}),
        ("This is not the MIT License but something else. All rights reserved.", {}),
        ("GNU LESSER; parts under the MIT License", {}),
        ("MIT License with a clause that forbids selling", {}),
        ("Apache License, Version 2.0, with exceptions", {}),
        ("Permission is hereby granted, free of charge, to any person or organization", {}),
        ("Copyright (c) 2024 A\nNot the MIT License", {}),
    ],
)
def test_a_license_is_known_by_how_its_text_begins(tmp_path, text, found):
    (tmp_path / "README.md").write_text("# A model without a head\n")
    (tmp_path / "LICENSE").write_text(text)
    assert license_of(local(tmp_path)) == found


@pytest.mark.parametrize("head", ["license: [mit, apache-2.0]", "license_name: own"])
def test_a_head_that_names_no_single_license_is_not_overruled_by_a_text(tmp_path, head):
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n")
    (tmp_path / "LICENSE").write_text("MIT License")
    assert license_of(local(tmp_path)) == {}


def test_a_head_that_is_none_is_told_of(tmp_path, caplog):
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    with caplog.at_level(logging.WARNING):
        assert license_of(local(tmp_path)) == {}
    assert "its head cannot be read" in caplog.text


def test_the_metadata_of_a_gguf_tell(tmp_path, monkeypatch):
    writer = GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_license("apache-2.0")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    monkeypatch.setattr(licenses, "gguf_of", lambda config: tmp_path / "m.gguf")
    config = ModelConfig(weights="pretrained", package="carrier", file="m.gguf")
    assert license_of(config) == {"license": "apache-2.0"}


def test_the_hub_is_asked_where_the_cache_does_not_tell(tmp_path, monkeypatch, caplog):
    checkpoint = Checkpoint("x", tmp_path, {"hub": "owner/name", "commit": "c" * 40})
    monkeypatch.setattr(licenses, "checkpoint_of", lambda config, converted: checkpoint)
    config = ModelConfig(weights="pretrained", hub="owner/name")
    told = SimpleNamespace(card_data=ModelCardData(license="llama2"))
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: told)
    assert license_of(config) == {"license": "llama2"}
    monkeypatch.setattr(HfApi, "model_info", None)
    assert license_of(config) == {"license": "llama2"}  # it is asked once

    def offline(*_, **__):
        raise OfflineModeIsEnabled("off")

    monkeypatch.setattr(HfApi, "model_info", offline)
    checkpoint.origin["commit"] = "d" * 40
    with caplog.at_level(logging.WARNING):
        assert license_of(config) == {}
    assert "the hub does not tell the license of owner/name" in caplog.text


def test_a_record_gets_its_model_s_license_and_stays_as_it_is(tmp_path):
    (tmp_path / "LICENSE").write_text("MIT License")
    record = {"model": {"family": "llama"}}
    told = with_license(record, local(tmp_path), None)
    assert told == {"model": {"family": "llama", "license": {"license": "mit"}}}
    assert record == {"model": {"family": "llama"}}
    assert license_of(ModelConfig(weights="random")) == {}


def test_whatever_keeps_a_license_from_being_looked_up_ends_no_run(tmp_path, monkeypatch, caplog):
    def fails(*_, **__):
        raise RuntimeError("of a client's making")

    monkeypatch.setattr(licenses, "license_of", fails)
    with caplog.at_level(logging.WARNING):
        assert with_license({}, local(tmp_path), None) == {"model": {"license": {}}}
    assert "cannot be looked up: RuntimeError: of a client's making" in caplog.text
