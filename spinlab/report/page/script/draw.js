// Elements and drawings. Text of a record only ever becomes a text node or an attribute's value.

function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function shape(tag, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function filled(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// A table that scrolls by itself; rows of values or nodes.
function table(head, rows, kind = "") {
  const cell = (value) => {
    if (value instanceof Node) return element("td", {}, value);
    return element("td", typeof value === "number" ? { class: "number" } : {}, shown(value));
  };
  const top = head.map((title) => (title instanceof Node ? title : element("th", { scope: "col" }, title)));
  const body = rows.map((row) => element("tr", row.chosen ? { class: "chosen" } : {}, ...row.map(cell)));
  const parts = [element("thead", {}, element("tr", {}, ...top)), element("tbody", {}, ...body)];
  const around = { class: "scroll", tabindex: 0, role: "region", "aria-label": "table" };
  return element("div", around, element("table", { class: kind }, ...parts));
}

function note(text) {
  return element("p", { class: "quiet" }, text);
}

// A scale from values to places; logarithmic where the values span more than a factor of 20, but
// for counts, whose ticks are whole.
function scale(values, from, to, counts = false) {
  let [low, high] = [Math.min(...values), Math.max(...values)];
  const log = !counts && low > 0 && high / low > 20;
  if (low === high) [low, high] = [low - (Math.abs(low) / 10 || 1), high + (Math.abs(high) / 10 || 1)];
  const on = log ? Math.log10 : (value) => value;
  const place = (value) => from + ((on(value) - on(low)) / (on(high) - on(low))) * (to - from);
  return { place, log, ticks: log ? logTicks(low, high) : ticks(low, high, counts ? 1 : 0) };
}

function ticks(low, high, least) {
  const rough = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(least, power * [1, 2, 5, 10].find((factor) => factor * power >= rough));
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, at) => (first + at) * step);
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const factor of high / low > 1e3 ? [1] : [1, 2, 5]) found.push(factor * 10 ** power);
  }
  return found.filter((value) => value >= low && value <= high);
}

// Axes with ticks, their names, and what stands in them.
function axes(x, y, names, { width, height, left, bottom, top }, ...inside) {
  const label = names.map((name, at) => name + ([x, y][at].log ? " (log)" : ""));
  const down = height - bottom;
  const about = { role: "img", "aria-label": `${label[1]} against ${label[0]}` };
  return shape("svg", { viewBox: `0 0 ${width} ${height}`, ...about },
    shape("path", { class: "axis", fill: "none", d: `M${left} ${top}V${down}H${width - 8}` }),
    ...x.ticks.map((at) => shape("text", { x: x.place(at), y: down + 14, "text-anchor": "middle" }, shown(at))),
    ...y.ticks.map((at) => shape("text", { x: left - 6, y: y.place(at) + 4, "text-anchor": "end" }, shown(at))),
    shape("text", { x: (left + width) / 2, y: height - 3, "text-anchor": "middle" }, label[0]),
    shape("text", { x: 4, y: 11 }, label[1]),
    ...inside);
}

// Curves of one name over their steps, or layers: [steps, values] of each run. What has no number is
// left out.
function curves(name, across, runs) {
  const size = { width: 320, height: 150, left: 58, bottom: 30, top: 18 };
  const lines = runs.map(([steps, values]) =>
    steps.map((step, at) => [step, values[at]]).filter((point) => point.every(Number.isFinite)));
  const points = lines.flat();
  if (!points.length) return note(`${name}: no numbers`);
  const x = scale(points.map(([step]) => step), size.left, size.width - 12, true);
  const y = scale(points.map(([, value]) => value), size.height - size.bottom, size.top + 4);
  const drawn = lines.flatMap((line, at) => {
    const places = line.map(([step, value]) => `${x.place(step).toFixed(1)} ${y.place(value).toFixed(1)}`);
    const ends = line.length === 1 ? [[x.place(line[0][0]), y.place(line[0][1])]] : [];
    return [shape("path", { class: `curve line${at}`, d: places.length ? `M${places.join("L")}` : "" }),
      ...ends.map(([cx, cy]) => shape("circle", { class: `c${at}`, r: 3, cx, cy }))];
  });
  return axes(x, y, [across, name], size, ...drawn);
}
