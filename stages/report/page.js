"use strict";
// The report's behaviour: charts, sortable tables, picture switch, theme. No library, no network.

const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes, parent, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

// Round numbers from low to high, about `count` of them.
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= rough);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => (first + i) * step);
}

// 1, 2, 5 times powers of ten; powers alone where that would be many.
function logTicks(low, high) {
  const made = [];
  for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++)
    for (const m of Math.log10(high / low) > 3 ? [1] : [1, 2, 5]) made.push(m * 10 ** p);
  return made.filter((v) => v >= low * 0.999 && v <= high * 1.001);
}

function shown(value, unit) {
  if (unit === "percent") return +(value * 100).toPrecision(3) + "%";
  return value >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(4));
}

// The marks' words above the plot, each in the lowest row where it meets no other.
function placed(marks, x, right) {
  const rows = [];
  return marks.map((mark) => {
    const wide = mark.text.length * 6 + 4;
    const left = x(mark.x) + 4 + wide > right ? x(mark.x) - wide : x(mark.x) + 4;
    let row = rows.findIndex((taken) => taken.every(([from, to]) => left + wide < from || left > to));
    if (row < 0) row = rows.push([]) - 1;
    rows[row].push([left - 4, left + wide]);
    return { ...mark, left, row };
  });
}

function chart(figure, spec) {
  const plot = figure.querySelector(".plot");
  const hidden = new Set();
  let logarithmic = false;

  function draw() {
    const width = plot.clientWidth;
    const height = Math.round(Math.min(330, Math.max(220, width * 0.55)));
    const left = 54, right = 14, bottom = 40;
    plot.replaceChildren();
    const svg = element("svg", { height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${spec.title} by epoch` }, plot);
    const visible = spec.series.filter((s) => !hidden.has(s.name));
    const points = visible.flatMap((s) => s.points).filter((p) => !logarithmic || p[1] > 0);
    if (!points.length) return;
    const xHigh = Math.max(...points.map((p) => p[0]), ...spec.marks.map((m) => m.x)) || 1;
    const yMost = Math.max(...points.map((p) => p[1]));
    const yLeast = Math.min(...points.map((p) => p[1]));
    let low = 0, high = spec.unit === "percent" ? Math.min(1, Math.max(yMost * 1.08, 0.02)) : yMost * 1.06 || 1;
    if (logarithmic) [low, high] = [yLeast / 1.15, yMost * 1.15];
    const x = (v) => left + (v / xHigh) * (width - left - right);
    const marks = placed(spec.marks, x, width);
    const top = 20 + 14 * Math.max(1, ...marks.map((m) => m.row + 1));
    const share = (v) => (logarithmic ? Math.log(v / low) / Math.log(high / low) : (v - low) / (high - low));
    const y = (v) => height - bottom - share(v) * (height - top - bottom);

    for (const value of logarithmic ? logTicks(low, high) : ticks(low, high, 5)) {
      element("line", { class: "gridline", x1: left, x2: width - right, y1: y(value), y2: y(value) }, svg);
      element("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, svg, shown(value, spec.unit));
    }
    for (const value of ticks(0, xHigh, Math.max(2, Math.floor(width / 90))))
      element("text", { x: x(value), y: height - bottom + 18, "text-anchor": "middle" }, svg, shown(value, "number"));
    element("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }, svg);
    element("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, svg, "epoch");
    element("text", { x: 2, y: 11 }, svg, spec.y);
    for (const s of visible) {
      const colour = `var(--c${s.colour})`;
      const drawn = s.points.filter((p) => !logarithmic || p[1] > 0);
      const path = drawn.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`).join("");
      if (drawn.length > 1) element("path", { class: s.style, d: path, style: `stroke:${colour}` }, svg);
      if (s.style === "dots" || drawn.length === 1)
        for (const p of drawn) element("circle", { cx: x(p[0]), cy: y(p[1]), r: drawn.length > 40 ? 2 : 4, style: `fill:${colour}` }, svg);
    }
    for (const mark of marks) {
      const at = top - 6 - 14 * mark.row;
      element("line", { class: "mark", x1: x(mark.x), x2: x(mark.x), y1: at - 8, y2: height - bottom }, svg);
      element("text", { class: "marked", x: mark.left, y: at }, svg, mark.text);
    }
    pointing(svg, visible, { x, y, left, right, top, bottom, width, height, xHigh });
  }

  // A vertical line at the pointer, and what each series has nearest to it.
  function pointing(svg, visible, at) {
    const cross = element("line", { class: "cross", y1: at.top, y2: at.height - at.bottom, visibility: "hidden" }, svg);
    const tip = document.createElement("div");
    tip.className = "tip";
    tip.hidden = true;
    plot.append(tip);
    svg.addEventListener("pointerleave", () => { tip.hidden = true; cross.setAttribute("visibility", "hidden"); });
    svg.addEventListener("pointermove", (event) => {
      const px = event.clientX - svg.getBoundingClientRect().left;
      const wanted = ((px - at.left) / (at.width - at.left - at.right)) * at.xHigh;
      const all = visible.filter((s) => s.points.length && s.style !== "faint");
      if (!all.length) return;
      const near = all.map((s) => s.points.reduce((a, b) => (Math.abs(b[0] - wanted) < Math.abs(a[0] - wanted) ? b : a)));
      const here = near.reduce((a, b) => (Math.abs(b[0] - wanted) < Math.abs(a[0] - wanted) ? b : a))[0];
      tip.replaceChildren(`epoch ${shown(here, "number")}`);
      all.forEach((s, i) => {
        const line = document.createElement("div");
        const colour = document.createElement("span");
        colour.textContent = "● ";
        colour.style.color = `var(--c${s.colour})`;
        line.append(colour, `${s.name} ${shown(near[i][1], spec.unit)}`);
        if (near[i][0] !== here) line.append(` (epoch ${shown(near[i][0], "number")})`);
        tip.append(line);
      });
      tip.hidden = false;
      cross.setAttribute("visibility", "visible");
      cross.setAttribute("x1", at.x(here));
      cross.setAttribute("x2", at.x(here));
      const place = at.x(here) + 12;
      tip.style.left = `${Math.max(0, place + tip.offsetWidth > at.width ? at.x(here) - 12 - tip.offsetWidth : place)}px`;
      tip.style.top = `${at.top + 16}px`;
    });
  }

  const legend = figure.querySelector(".legend");
  for (const s of spec.series) {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", "true");
    const sign = document.createElement("i");
    sign.className = s.style;
    sign.style.background = `var(--c${s.colour})`;
    button.append(sign, s.name);
    button.addEventListener("click", () => {
      hidden.has(s.name) ? hidden.delete(s.name) : hidden.add(s.name);
      button.setAttribute("aria-pressed", String(!hidden.has(s.name)));
      draw();
    });
    legend.append(button);
  }
  for (const button of figure.querySelectorAll("[data-scale]"))
    button.addEventListener("click", () => {
      logarithmic = button.dataset.scale === "log";
      for (const other of figure.querySelectorAll("[data-scale]")) other.setAttribute("aria-pressed", String(other === button));
      draw();
    });
  new ResizeObserver(draw).observe(plot);
}

function sortable(table) {
  const body = table.tBodies[0];
  table.querySelectorAll("th button").forEach((button) => {
    const head = button.closest("th");
    button.addEventListener("click", () => {
      const order = head.getAttribute("aria-sort") === "descending" || (!head.hasAttribute("aria-sort") && !head.classList.contains("n"));
      table.querySelectorAll("th").forEach((th) => th.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order ? "ascending" : "descending");
      const value = (row) => row.cells[head.cellIndex].dataset.value ?? row.cells[head.cellIndex].textContent;
      const numbers = head.classList.contains("n");
      const rows = [...body.rows].sort((a, b) =>
        numbers ? value(a) - value(b) : value(a).localeCompare(value(b), "en", { numeric: true }));
      body.append(...(order ? rows : rows.reverse()));
    });
  });
}

function filterable(input) {
  const rows = [...document.getElementById(input.dataset.table).tBodies[0].rows];
  input.addEventListener("input", () => {
    const wanted = input.value.trim().toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
}

// Buttons with data-show="group:name" show the elements with data-part="group:name" and hide the group's others.
function switching(button) {
  const group = button.dataset.show.split(":")[0];
  button.addEventListener("click", () => {
    for (const other of document.querySelectorAll(`[data-show^="${group}:"]`)) other.setAttribute("aria-pressed", String(other === button));
    for (const part of document.querySelectorAll(`[data-part^="${group}:"]`)) part.hidden = part.dataset.part !== button.dataset.show;
  });
}

const specs = JSON.parse(document.getElementById("charts").textContent);
for (const figure of document.querySelectorAll("[data-chart]")) chart(figure, specs[figure.dataset.chart]);
document.querySelectorAll("table.sortable").forEach(sortable);
document.querySelectorAll("input[data-table]").forEach(filterable);
document.querySelectorAll("[data-show]").forEach(switching);
document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
