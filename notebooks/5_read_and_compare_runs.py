# %% [markdown]
# # Read a run, and compare two
#
# A run leaves a folder, and everything that is ever said about it comes from there: `record.json`
# has its settings, what it was made of, how its stages went and every number; `metrics.jsonl` has
# the curve of its learning, `layers.json` what was measured of each layer, `figures/` what was
# drawn of it. This notebook runs the toy twice, with fixed and with learned rotations, and reads
# what they left.

# %%
import io
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

import spinlab
from spinlab.compose import composed
from spinlab.config.values import values_of
from spinlab.experiment import run
from spinlab.report.averaged import differing, read_seeds
from spinlab.report.figures.curves import curve_of, draw_curves
from spinlab.report.figures.layers import layers
from spinlab.report.figures.spread import draw_spread
from spinlab.report.formats import markdown, spread
from spinlab.report.records import read_record
from spinlab.report.tables.record import result_table

folder = TemporaryDirectory()


def start(*words: str) -> Path:
    """Run the toy with some settings, as the command line would; return the run's folder."""
    shared = ["+experiment=toy", "tracker=none", "eval.tasks=[]", "eval.max_windows=8"]
    paths = [f"paths.cache={folder.name}/cache", f"paths.runs={folder.name}/runs"]
    with redirect_stdout(io.StringIO()):  # the table at the end: it is made below
        return run(composed(*shared, *words, *paths), [*shared, *words]).folder


fixed = start("learn=none", "eval.variants=[fp,rtn,fake]")
learned = start("learn.steps=16", "eval.variants=[fp,rtn,init,fake]")
print(*sorted(path.name for path in learned.iterdir()), sep="\n")

# %% [markdown]
# ## The record
#
# The reader refuses what is broken, or is of a run that did not end well.

# %%
record = read_record(learned / "record.json")
print(record["experiment"], record["status"], record["overrides"])
print(result_table(record))

# %% [markdown]
# `fp` is the original and `rtn` has no rotation; `init` starts with a Hadamard rotation and `fake`
# has what was learned from it. Metrics are named `what/of which text/of which network`:

# %%
for name, value in sorted(record["metrics"].items()):
    if name.startswith(("invariance", "orthogonality", "outliers", "learn/", "bits")):
        print(f"{name:24} {value:.3g}")

# %% [markdown]
# Before anything was quantized, the rotated network's logits were those of the original
# (`invariance/…`, relative to their spread). Stages are cached by all that they depend on. The
# second run found there what the first one had made, and did the rest:

# %%
for stage in record["stages"]:
    print(f"{stage['name']:14} {'found' if stage['cached'] else 'made'}")

# %% [markdown]
# ## What was learned, and where the error is

# %%
draw_curves({"": curve_of(learned)})

# %%
layers(str(learned))

# %% [markdown]
# ## Two runs
#
# They differ in these settings, and in these numbers:

# %%
other = read_record(fixed / "record.json")
one, two = (values_of(r["config"]) for r in (other, record))
settings = [[n, str(one.get(n)), str(two.get(n))] for n in differing(other, record)]
print(markdown([["setting", "fixed", "learned"], *settings]))

# %%
a, b = other["metrics"], record["metrics"]
shared = [n for n in sorted(a.keys() & b.keys()) if n.startswith("ppl/")]
rows = [[n, f"{a[n]:.2f}", f"{b[n]:.2f}", f"{100 * (b[n] / a[n] - 1):+.1f} %"] for n in shared]
print(markdown([["metric", "fixed", "learned", "difference"], *rows]))
assert a["ppl/wiki/fp"] == b["ppl/wiki/fp"]  # the same original, bit for bit
folder.cleanup()

# %% [markdown]
# ## Is a difference real?
#
# One run says little: rotations are drawn by a seed, and another seed gives another number.
# Records of the real model lie in the repository, three seeds for every method. A difference
# counts where it is larger than the spread over seeds.

# %%
committed = Path(spinlab.__file__).parent.parent / "experiments" / "quality" / "smollm2_135m"
records = read_seeds(committed)
methods = {
    method: [r["metrics"]["ppl/wiki/fake"] for r in records[method]]
    for method in ("random", "quarot", "spinquant_had")
}
for method, values in methods.items():
    print(f"{method:14} {spread(values)}")
draw_spread(methods, "wiki perplexity")

# %% [markdown]
# On the command line: `python -m spinlab.report figure=seed_variance records=FOLDER by=SETTING
# out=FILE.pdf`.
