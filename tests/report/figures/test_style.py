"""One style: files are the same for the same arrays, fonts are embedded, colours keep apart."""

import struct
from itertools import combinations

import matplotlib
import numpy as np
import pytest

from spinlab.errors import InputError
from spinlab.report.figures.bars import draw_ratios
from spinlab.report.figures.outliers import draw_outliers, draw_surfaces
from spinlab.report.figures.spread import draw_spread
from spinlab.report.figures.style import Drawing, scale_for, series, style

# linear RGB as it is seen without one kind of cone (Machado, Oliveira, Fernandes 2009)
SEEN = {
    "all cones": np.eye(3),
    "no red": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "no green": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "no blue": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


def drawings() -> list[Drawing]:
    """One with hatches and points, one with bars, one in three dimensions."""
    x = np.random.default_rng(0).normal(size=(80, 120))
    return [
        draw_spread({"a": [1.0, 2.0, 4.0], "b": [3.0, 3.0]}, "perplexity"),
        draw_outliers({"before": np.abs(x).max(0), "after": np.ones(120)}, "layer 3"),
        draw_surfaces({"before": x, "after": x / 2}, "layer 3"),
    ]


def linear(colour: str) -> np.ndarray:
    c = np.array(matplotlib.colors.to_rgb(colour))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of linear RGB: lightness from 0 to 100 first."""
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = to_xyz @ rgb.clip(0, 1) / [0.9505, 1.0, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("kind", ["png", "pdf"])
def test_the_same_arrays_give_the_same_bytes(tmp_path, kind):
    for one, other in zip(drawings(), drawings(), strict=True):
        first, second = (d.save(tmp_path / f"{n}.{kind}") for n, d in (("a", one), ("b", other)))
        assert first.read_bytes() == second.read_bytes()
    content = first.read_bytes()
    assert content.startswith(b"\x89PNG" if kind == "png" else b"%PDF")
    assert b"Date" not in content
    assert b"atplotlib" not in content


def test_the_fonts_of_a_pdf_are_in_it_and_its_text_is_text(tmp_path):
    content = drawings()[0].save(tmp_path / "a.pdf").read_bytes()
    assert b"/FontFile2" in content  # TrueType, embedded
    assert b"/Type3" not in content


def test_a_user_s_own_settings_of_matplotlib_change_nothing(tmp_path):
    plain = drawings()[1].save(tmp_path / "a.png").read_bytes()
    with matplotlib.rc_context({"font.size": 20, "axes.grid": True, "figure.dpi": 30}):
        assert drawings()[1].save(tmp_path / "b.png").read_bytes() == plain
        with style():
            assert matplotlib.rcParams["font.size"] == 8
        assert matplotlib.rcParams["font.size"] == 20


def test_a_notebook_shows_a_smaller_one_and_leaves_the_file_as_it_is(tmp_path):
    shown, drawing = drawings()[0], drawings()[0]
    small = shown._repr_png_()
    whole = drawing.save(tmp_path / "a.png").read_bytes()
    assert small.startswith(b"\x89PNG")
    assert len(small) < len(whole)
    assert shown.save(tmp_path / "b.png").read_bytes() == whole


def test_a_long_list_stays_a_small_file(tmp_path):
    path = draw_ratios({f"ratio/{n}": 1.0 + n for n in range(300)}, "many").save(tmp_path / "a.png")
    assert struct.unpack(">II", path.read_bytes()[16:24])[1] <= 1600
    assert path.stat().st_size < 200_000


@pytest.mark.parametrize("name", ["a.jpg", "a", "pdf"])
def test_any_other_kind_of_file_is_refused(tmp_path, name):
    with pytest.raises(InputError, match=r"a figure is written as \.png or \.pdf"):
        drawings()[0].save(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", SEEN)
def test_colours_keep_apart_for_every_eye(kind):
    seen = [lab(np.array(SEEN[kind]) @ linear(series(n).colour)) for n in range(5)]
    for one, other in combinations(seen, 2):
        assert np.linalg.norm(one - other) > 25  # of CIELAB, where 2.3 can just be told apart


def test_colours_keep_apart_in_grey_and_series_without_any():
    lightness = sorted(lab(linear(series(n).colour))[0] for n in range(5))
    assert min(np.diff(lightness)) > 10
    for looks in ("line", "marker", "hatch"):
        assert len({getattr(series(n), looks) for n in range(5)}) == 5


def test_an_axis_is_logarithmic_where_values_differ_tenfold():
    assert scale_for([1.0, 9.9]) == scale_for([0.0, 100.0]) == "linear"
    assert scale_for([1.0, 10.0]) == "log"
