"use strict";
// What is asked of a run by name: a metric, a metric of the chosen network, a setting.

const content = JSON.parse(document.getElementById("content").textContent);
const byId = new Map(content.runs.map((run) => [run.id, run]));
const builtIn = ["experiment", "model", "key", "id"];

for (const run of content.runs) {
  run.words = [run.experiment, run.model, run.command, run.id].join(" ").toLowerCase();
  // the method itself is the last network that a run measures, on integer kernels where it did
  const measured = content.variants.filter((v) => Object.keys(run.metrics).some((n) => n.endsWith("/" + v)));
  run.variant = measured.at(-1) ?? "";
}

function field(run, name, variant) {
  if (builtIn.includes(name)) return run[name];
  if (name === "network") return variant || run.variant;
  if (Object.hasOwn(run.metrics, name)) return run.metrics[name];
  const own = `${name}/${variant || run.variant}`;
  if (Object.hasOwn(run.metrics, own)) return run.metrics[own];
  return Object.hasOwn(run.settings, name) ? run.settings[name] : undefined;
}

// All names to ask for, in order; one without a network stands for that of the chosen one.
const known = (() => {
  const names = new Set([...builtIn, "network"]);
  const end = new RegExp(`/(${content.variants.join("|")})$`);
  for (const run of content.runs) {
    for (const name of Object.keys(run.metrics)) names.add(name.replace(end, "")).add(name);
    for (const name of Object.keys(run.settings)) names.add(name);
  }
  return [...names].sort();
})();

function matching(pattern) {
  if (!pattern.includes("*")) return [pattern];
  const escaped = pattern.replace(/[.+?^${}()|[\]\\]/g, "\\$&").replaceAll("*", ".*");
  return known.filter((name) => new RegExp(`^${escaped}$`).test(name));
}

const compare = {
  "<": (a, b) => a < b,
  "<=": (a, b) => a <= b,
  ">": (a, b) => a > b,
  ">=": (a, b) => a >= b,
};

// One word of a filter as a test of a run.
function test(word, variant) {
  const parts = /^([^<>=!]+)(<=|>=|!=|<|>|=)(.+)$/.exec(word);
  if (!parts) return (run) => run.words.includes(word.toLowerCase());
  const [, name, sign, wanted] = parts;
  return (run) => {
    const value = field(run, name, variant);
    if (sign === "=") return shown(value) === wanted || value === Number(wanted);
    if (sign === "!=") return shown(value) !== wanted && value !== Number(wanted);
    return typeof value === "number" && compare[sign](value, Number(wanted));
  };
}

function filtered(view) {
  const tests = view.filter.split(/\s+/).filter(Boolean).map((word) => test(word, view.variant));
  return content.runs.filter((run) => tests.every((passes) => passes(run)));
}

// Numbers in their order, then text in its own; what has no value comes last either way.
function sorted(runs, view) {
  const sign = view.down ? -1 : 1;
  const keyed = runs.map((run) => [field(run, view.sort, view.variant), run]);
  keyed.sort(([a], [b]) => {
    if (a == null || b == null) return (a == null) - (b == null);
    if (typeof a === "number" && typeof b === "number") return sign * (a - b);
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    return sign * shown(a).localeCompare(shown(b), "en", { numeric: true });
  });
  return keyed.map(([, run]) => run);
}

function shown(value) {
  if (value === undefined) return "";
  if (typeof value === "number") return digits(value);
  return typeof value === "string" ? value : JSON.stringify(value);
}

// Whole numbers as they are, others to six digits.
function digits(value) {
  if (Number.isSafeInteger(value)) return String(value);
  const near = Number(value.toPrecision(6));
  return near !== 0 && Math.abs(near) < 1e-3 ? near.toExponential() : String(near);
}
