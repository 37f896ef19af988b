// One run with all that is kept of it, and the difference of two.

function details(title, ...children) {
  return element("details", {}, element("summary", {}, title), ...children);
}

function pairs(tree) {
  return table(["name", "value"], Object.entries(tree).sort(([a], [b]) => (a < b ? -1 : 1)), "wrap");
}

function grid(title, parts) {
  return parts.length ? [element("h3", {}, title), element("div", { class: "curves" }, ...parts)] : [];
}

// What the runs learned and what they keep of every layer; of two, what both have.
function allCurves(runs) {
  const names = (part) => Object.keys(runs[0][part]).filter((name) => runs.every((run) => name in run[part]));
  const steps = names("curves").filter((name) => name !== "step")
    .map((name) => curves(name, "step", runs.map((run) => [run.curves.step, run.curves[name]])));
  const layers = names("layers")
    .map((name) => curves(name, "layer", runs.map((run) => [[...run.layers[name].keys()], run.layers[name]])));
  return [...grid("Curves", steps), ...grid("Layers", layers)];
}

function oneRun(run, view) {
  const figures = run.figures.map(({ name, data }) => {
    const image = { alt: `${name} of ${run.experiment}`, src: `data:image/png;base64,${data}` };
    return element("figure", {}, element("img", image), element("figcaption", { class: "quiet" }, name));
  });
  const stages = run.stages.map(([name, seconds, cached]) => [name, seconds, cached ? "cached" : ""]);
  return [
    element("h2", {}, `Run ${run.experiment}`),
    element("p", {}, element("code", {}, run.command)),
    element("p", { class: "quiet" }, `${run.id}, key ${run.key}; `,
      element("a", { href: address({ ...view, a: run.id }) }, "first"), " or ",
      element("a", { href: address({ ...view, b: run.id }) }, "second"), " of the difference"),
    ...allCurves([run]),
    ...figures,
    element("h3", {}, "Metrics"), pairs(run.metrics),
    details("Settings", pairs(run.settings)),
    details("Stages", table(["stage", "seconds", ""], stages)),
    details("Environment", pairs(run.environment)),
  ];
}

function difference(a, b) {
  const unlike = (part) => {
    const names = [...new Set([...Object.keys(a[part]), ...Object.keys(b[part])])].sort();
    return names.filter((name) => shown(a[part][name]) !== shown(b[part][name]));
  };
  const words = (part) => unlike(part).map((name) => [name, shown(a[part][name]), shown(b[part][name])]);
  const metrics = unlike("metrics").map((name) => {
    const [one, other] = [a.metrics[name], b.metrics[name]];
    const both = typeof one === "number" && typeof other === "number";
    return [name, one, other, both ? other - one : "", both && one ? `${shown(100 * (other / one - 1))} %` : ""];
  });
  const part = (title, head, rows, kind) =>
    [element("h3", {}, title), rows.length ? table(head, rows, kind) : note("no difference")];
  const drawn = allCurves([a, b]);
  return [
    ...part("Settings", ["setting", "first", "second"], words("settings"), "wrap"),
    ...part("Metrics", ["metric", "first", "second", "second − first", "relative"], metrics),
    ...drawn,
    ...(drawn.length ? [note("The first run's lines are whole, the second's dashed.")] : []),
    ...part("Environment", ["fact", "first", "second"], words("environment"), "wrap"),
  ];
}
