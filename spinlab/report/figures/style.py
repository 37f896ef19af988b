"""The one style of all figures: sizes, fonts, colours, and how a figure becomes a file.

Colours keep apart for every kind of colour blindness and, by their lightness, in grey; a series
also has its own line, marker and hatch. Files hold no dates and embed their fonts, so that the same
arrays give the same bytes.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from spinlab.errors import InputError
from spinlab.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMN, PAGE = 3.3, 6.8  # widths in inches: of a column, and of a page
MAP = "cividis"  # of magnitudes: as even in grey as in colour
_DPI, _SCREEN_DPI = 150, 90  # of a file, and of what a notebook shows
_TALLEST = 1600  # pixels: a long list is read on a screen, not as a whole
_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "figure.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "hatch.linewidth": 0.6,
    "image.cmap": MAP,
    "pdf.fonttype": 42,  # TrueType, embedded: text can be searched, and journals take it
    "figure.dpi": _DPI,
    "savefig.dpi": _DPI,
}


class Series(NamedTuple):
    """How one of several series looks."""

    colour: str
    line: str
    marker: str
    hatch: str


_SERIES = (
    Series("#12355b", "-", "o", ""),
    Series("#c8553d", "--", "s", "///"),
    Series("#6aaed6", "-.", "^", "..."),
    Series("#f2c14e", ":", "D", "xx"),
    Series("#000000", (0, (5, 1, 1, 1, 1, 1)), "v", "\\\\\\"),  # type: ignore[arg-type]
)
_FILLS = ("full", "none", "left", "top")


def series(number: int) -> Series:
    """Return the looks of a series; after the last they start again."""
    return _SERIES[number % len(_SERIES)]


def fill(number: int) -> str:
    """Return how a series' marker is filled, which tells it from that with the same looks."""
    return _FILLS[number // len(_SERIES) % len(_FILLS)]


def scale_for(values: Iterable[float]) -> str:
    """Return the scale of an axis: logarithmic where positive values differ tenfold or more."""
    lowest, highest = min(values := list(values)), max(values)
    return "log" if 0 < 10 * lowest <= highest else "linear"


@dataclass(frozen=True, eq=False)
class Drawing:
    """A figure in the one style, to be saved, or shown by a notebook."""

    figure: "Figure"

    def save(self, path: Path) -> Path:
        """Write a .png or a .pdf and return its path. Raises InputError for any other name."""
        kind = path.suffix.lower()
        if kind not in (".png", ".pdf"):
            raise InputError(f"out={path}: a figure is written as .png or .pdf")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(self._bytes(kind, _DPI))
        return path

    def _repr_png_(self) -> bytes:
        return self._bytes(".png", _SCREEN_DPI)

    def _bytes(self, kind: str, dpi: int) -> bytes:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.backends.backend_pdf import FigureCanvasPdf

        content = BytesIO()
        with style():
            self.figure.set_dpi(min(dpi, _TALLEST / self.figure.get_figheight()))
            if kind == ".png":
                canvas: Any = FigureCanvasAgg(self.figure)
                canvas.print_png(content, metadata={"Software": None})
            else:
                nothing = dict.fromkeys(("CreationDate", "Creator", "Producer"))
                FigureCanvasPdf(self.figure).print_pdf(content, metadata=nothing)
        return content.getvalue()


@contextmanager
def style() -> Iterator[None]:
    """Draw in the one style, whatever a user's own settings of matplotlib are.

    Serves as a decorator too: what draws is called as a whole in it.
    """
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        yield


def blank(width: float, height: float) -> "Figure":
    """Return an empty figure of a size in inches, which finds the room of its parts by itself."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
