"""What reaches the settings from a command line, and what is refused before Hydra reads it."""

import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from spinlab.arguments import prepared, quoted
from spinlab.compose import composed
from spinlab.errors import InputError

PATHS = [
    "~/models/a", "/a=b/c", "/a=b=c", "/a#b", "/a&b", "/data/model (1)/x", "/a)b", "/für/модель",
    "/a;b!c^d<e>f", "/a b/c", "C:\\x", "/plain/path", "-x", "/a~b",
]  # fmt: skip
STRUCTURED = ["/a,b", "/a'b", '/a"b', "/a[1]", "/a{b}", "/a'b,\"c", '/a\\"b', "choice(a=b)"]


def value_of(*words: str):
    return composed("+experiment=toy", *prepared(list(words))).model.path


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_taken_as_it_is_typed(path):
    assert value_of(f"model.path={path}") == str(Path(path).expanduser())


@pytest.mark.parametrize("path", STRUCTURED)
def test_the_quoting_that_is_shown_works_in_a_shell(path):
    (word,) = shlex.split(quoted(f"model.path={path}"))
    assert value_of(word) == path


@pytest.mark.parametrize("path", [p for p in STRUCTURED if p != "/a,b"])
def test_a_path_with_structure_is_refused_with_the_quoting_that_works(path):
    with pytest.raises(InputError) as refusal:
        prepared([f"model.path={path}"])
    shown = str(refusal.value).partition("part of the value write ")[2]
    (word,) = shlex.split(shown)
    assert value_of(word) == path


def test_every_path_of_a_list_and_of_a_sweep_is_taken_as_it_is():
    words = prepared(["data.evaluation=[~/a.txt,/b#c.txt,/d=e.txt,wiki]"])
    texts = composed("+experiment=toy", *words).data.evaluation
    assert texts == [str(Path("~/a.txt").expanduser()), "/b#c.txt", "/d=e.txt", "wiki"]
    (sweep,) = prepared(["model.path=/a=b,~/c"])
    values = [v.text for v in OverridesParser.create().parse_override(sweep).sweep_iterator()]
    assert values == ["/a=b", str(Path("~/c").expanduser())]


def test_what_hydra_reads_is_left_alone():
    words = ["+experiment=toy", "seed=0,1", "~learn", "learn.lr.r1=1e-3", "model.path=null"]
    words += ['quant.overrides=[{pattern:"*",weights:{bits:8}}]', "seed=range(1,4)", "a@b=c"]
    assert prepared(words) == words


def test_options_may_stand_between_settings():
    assert prepared(["+experiment=toy", "-m", "seed=0,1"]) == ["+experiment=toy", "seed=0,1", "-m"]
    assert prepared(["--cfg", "job", "seed=1"]) == ["seed=1", "--cfg", "job"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["experiment", "toy"], "'experiment' has no value: write +experiment=NAME"),
        (["toy"], "write +experiment=toy"),
        (["+method", "rtn"], "write +method=NAME"),
        (["learn.steps"], "write learn.steps=VALUE"),
        (["learn.stpes"], "did you mean learn.steps"),
        ([""], "not of the form name=value"),
        (["=3"], "'=3' names no setting"),
        (["learn.stéps=3"], "names no setting"),
        (["--experiment", "toy"], "write +experiment=NAME, with a plus and without dashes"),
        (["--experimental-rerun", "x.pkl"], "unpickle"),
        (["--learn.steps=3"], "unknown option --learn.steps=3"),
        (["--verison"], "unknown option --verison"),
        (["--cfg", "jbo"], "choose from 'job'"),
        (["model=null"], "model=null: model takes the name of a file"),
        (["model="], "smollm2_135m"),
        (["learn=3"], "two_cores"),
        (["learn=non,null"], "did you mean none?"),
        (["+experiment="], "there are formats, kv, llama2_7b_w4a4kv4, "),
        (["seed=0,"], "cannot be read"),
        (["eval.variants=[fp,"], "cannot be read"),
    ],
    ids=" ".join,
)
def test_a_word_that_says_nothing_is_refused(words, said):
    with pytest.raises(InputError) as refusal:
        prepared(words)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)
