// The view is the address behind #: every link, field and reload goes through it.

const texts = ["filter", "columns", "x", "y", "colour"];
const choices = ["variant", "a", "b"];

function defaults() {
  const has = (name) => known.includes(name);
  const quality = known.filter((name) => /^ppl\/[^/]+$/.test(name)).reverse();
  const columns = ["network", ...["model", "seed", "bits/weights", "bits/kv"].filter(has), ...quality,
    ...["zeroshot_mean/accuracy"].filter(has)];
  const differs = (name) => new Set(content.runs.map((run) => shown(field(run, name)))).size > 1;
  return {
    filter: "", variant: "", columns: columns.join(", "), sort: "experiment", down: false,
    x: "bits/weights", y: quality[0] ?? "ppl", run: "", a: "", b: "",
    colour: ["model", "rotation.r1", "weights.method"].find(differs) ?? "model",
  };
}

const standard = defaults();

function address(view) {
  const told = Object.entries(view).filter(([name, value]) => value !== standard[name]);
  return "#" + new URLSearchParams(told.map(([name, value]) => [name, String(value)]));
}

function viewed() {
  const view = { ...standard };
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
    if (Object.hasOwn(standard, name)) view[name] = name === "down" ? value === "true" : value;
  }
  return view;
}

const place = (id) => document.getElementById(id);
let last = "";

function show() {
  const view = viewed();
  for (const id of [...texts, ...choices]) {
    if (place(id).value.trim() !== view[id].trim()) place(id).value = view[id]; // else it may be typed in
  }
  const runs = filtered(view);
  place("plot").replaceChildren(...plotted(runs, view));
  place("results").replaceChildren(...results(runs, view));
  const run = byId.get(view.run);
  place("run").replaceChildren(...(run ? oneRun(run, view) : []));
  const [a, b] = [byId.get(view.a), byId.get(view.b)];
  place("difference").replaceChildren(...(a && b ? difference(a, b) : [note("Choose two runs.")]));
  if (run && view.run !== last) place("run").scrollIntoView();
  last = view.run;
}

function option(value, text) {
  return element("option", { value }, text);
}

function change(id) {
  history.replaceState(null, "", address({ ...viewed(), [id]: place(id).value }));
  show();
}

function start() {
  place("names").append(...known.map((name) => option(name, "")));
  place("variant").append(option("", "each run's last"), ...content.variants.map((name) => option(name, name)));
  for (const id of ["a", "b"]) {
    const runs = content.runs.map((run) => option(run.id, `${run.experiment} (${run.id})`));
    place(id).append(option("", "none"), ...runs);
  }
  const left = Object.entries(content.left_out);
  const head = element("h2", {}, `Left out: ${left.length}`);
  if (left.length) place("left-out").append(head, table(["file", "reason"], left, "wrap"));
  for (const id of [...texts, ...choices]) place(id).addEventListener("input", () => change(id));
  for (const id of ["controls", "pair"]) place(id).addEventListener("submit", (event) => event.preventDefault());
  for (const happened of ["hashchange", "resize"]) addEventListener(happened, show);
  show();
}

start();
