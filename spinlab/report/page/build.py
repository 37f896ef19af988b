"""Fill the page and write it."""

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from spinlab.errors import InputError
from spinlab.files import replacing, writing
from spinlab.report.page.content import page_content

_HERE = files("spinlab.report.page")
_SCRIPTS = ("fields", "draw", "results", "run", "main")  # one scope, in this order


def write_page(folders: Sequence[Path], path: Path) -> str:
    """Write the page of the records below folders to a file; return what is in it, in words.

    Raises InputError for a folder, and where the system refuses to write.
    """
    if path.is_dir():
        raise InputError(f"page={path} is a folder: name a file in it")
    content = page_content(folders)
    count, left = len(content.runs), len(content.left_out)
    runs = f"{count} run{'' if count == 1 else 's'}"
    page = page_of(content.as_json(), f"spinlab: {runs}")
    with writing(path.parent, "page"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as new:
            new.write_text(page, encoding="utf-8")
    return f"{path}: {runs}" + (f", {left} files left out and named" if left else "")


def page_of(content: Any, title: str) -> str:
    """Return the whole page around JSON-ready content."""
    style = _text("page.css")
    script = "\n".join(_text(f"script/{name}.js") for name in _SCRIPTS)
    parts = {
        "title": html.escape(title),
        "policy": _policy(style, script),
        "style": style,
        "script": script,
        "content": embedded(content),
    }
    return Template(_text("page.html")).substitute(parts)


def embedded(content: Any) -> str:
    """Return JSON that ends no element it stands in: it is ASCII and has neither < nor &."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _policy(style: str, script: str) -> str:
    """Allow this style, this script and images of the page itself, and no request to anywhere."""
    allowed = {
        "default-src": "'none'",
        "style-src": _hash(style),
        "script-src": _hash(script),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {sources}" for name, sources in allowed.items())


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _text(name: str) -> str:
    return _HERE.joinpath(name).read_text(encoding="utf-8")
