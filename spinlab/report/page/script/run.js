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

function oneRun(run, view) {
  const { step = [], ...curves } = run.curves;
  const drawn = Object.keys(curves).map((name) => curve(name, "step", step, curves[name]));
  const layers = Object.entries(run.layers).map(([name, values]) => curve(name, "layer", [...values.keys()], values));
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
    ...grid("Curves", drawn),
    ...grid("Layers", layers),
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
  return [
    ...part("Settings", ["setting", "first", "second"], words("settings"), "wrap"),
    ...part("Metrics", ["metric", "first", "second", "second − first", "relative"], metrics),
    ...part("Environment", ["fact", "first", "second"], words("environment"), "wrap"),
  ];
}
