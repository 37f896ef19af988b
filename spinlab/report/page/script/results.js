// The plot and the table of the runs that the filter leaves.

const colours = 8;

function plotted(runs, view) {
  const width = Math.max(300, Math.min(document.body.clientWidth - 32, 830)); // so that text keeps its size
  const size = { width, height: 340, left: 62, bottom: 34, top: 20 };
  const points = runs
    .map((run) => ({ run, at: [field(run, view.x, view.variant), field(run, view.y, view.variant)] }))
    .filter(({ at }) => at.every((value) => typeof value === "number"));
  if (!points.length) return [note(`No run here has both ${view.x} and ${view.y}.`)];
  const x = scale(points.map(({ at }) => at[0]), size.left + 10, size.width - 20);
  const y = scale(points.map(({ at }) => at[1]), size.height - size.bottom - 8, size.top + 8);
  const kinds = [...new Set(points.map(({ run }) => shown(field(run, view.colour, view.variant))))];
  const colour = (kind) => `c${Math.min(kinds.indexOf(kind), colours - 1)}`;
  const dots = points.map(({ run, at }) => {
    const kind = colour(shown(field(run, view.colour, view.variant)));
    const told = `${run.experiment} ${run.id}: ${shown(at[0])}, ${shown(at[1])}`;
    const look = { r: 5, class: run.id === view.run ? `${kind} chosen` : kind };
    const dot = shape("circle", { cx: x.place(at[0]), cy: y.place(at[1]), ...look }, shape("title", {}, told));
    return shape("a", { href: address({ ...view, run: run.id }), "aria-label": told }, dot);
  });
  const legend = kinds.slice(0, colours).map((kind, at) => {
    const more = at === colours - 1 && kinds.length > colours ? `${kinds.length - at} others` : kind;
    const dot = shape("svg", { viewBox: "0 0 10 10" }, shape("circle", { cx: 5, cy: 5, r: 5, class: `c${at}` }));
    return element("li", {}, dot, more || "none");
  });
  return [axes(x, y, [view.x, view.y], size, ...dots), element("ul", { class: "legend" }, ...legend)];
}

function results(runs, view) {
  const names = columnNames(view);
  const title = (name) => {
    const now = view.sort === name;
    const next = address({ ...view, sort: name, down: now && !view.down });
    const arrow = now ? (view.down ? " ▾" : " ▴") : "";
    const order = now ? { "aria-sort": view.down ? "descending" : "ascending" } : {};
    return element("th", { scope: "col", ...order }, element("a", { href: next }, name + arrow));
  };
  const rows = sorted(runs, view).map((run) => {
    const open = element("a", { href: address({ ...view, run: run.id }) }, run.experiment);
    const cells = [open, ...names.map((name) => field(run, name, view.variant))];
    return Object.assign(cells, { chosen: run.id === view.run });
  });
  const count = element("h2", {}, `Results: ${runs.length} of ${content.runs.length} runs`);
  if (!content.runs.length) return [count, note("No records were found: `make run` makes one.")];
  if (!rows.length) return [count, note("No run passes the filter.")];
  return [count, table(["experiment", ...names].map(title), rows)];
}

function columnNames(view) {
  const wanted = view.columns.split(",").map((name) => name.trim()).filter(Boolean);
  const found = new Set(wanted.flatMap((pattern) => matching(pattern)));
  found.delete("experiment"); // which heads every row
  return [...found];
}
