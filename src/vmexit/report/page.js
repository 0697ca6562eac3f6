"use strict";
// All text of the trace goes into the page by textContent, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);

const make = (tag, name, text) => {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
};
const draw = (tag, attributes, text) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
};
const place = (id) => document.getElementById(id);
const count = (n) => n.toLocaleString("en-GB");
const round = (n, digits) => n.toLocaleString("en-GB", { maximumFractionDigits: digits });
const percent = (part, all) => (all ? `${(100 * part / all).toFixed(1)} %` : "-");
const time = (seconds) =>
  seconds >= 10 ? `${round(seconds, 1)} s` : seconds >= 1 ? `${round(seconds, 2)} s`
  : seconds >= 1e-3 ? `${round(seconds * 1e3, 2)} ms` : `${round(seconds * 1e6, 2)} µs`;
const size = (bytes) => {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < units.length - 1) { bytes /= 1024; unit += 1; }
  return `${round(bytes, 1)} ${units[unit]}`;
};
const colour = (index) => `var(--c${Math.min(index, 12)})`;

function summary() {
  const made = [data.version && `vmexit ${data.version}`, `${data.format} trace`,
    data.bytes && size(data.bytes)];
  place("source").textContent = `${data.file}: ${made.filter(Boolean).join(", ")}`;
  document.title = `${data.file}: vmexit report`;
  const host = data.vcpus.reduce((sum, vcpu) => sum + vcpu.host, 0);
  const spent = data.vcpus.reduce((sum, v) => sum + v.host + v.guest + v.elsewhere, 0);
  const tiles = [
    ["exits", count(data.exits)],
    ["from first to last", time(data.seconds)],
    ["exits a second", data.seconds ? count(Math.round(data.exits / data.seconds)) : "-"],
    [data.vcpus.length === 1 ? "vCPU" : "vCPUs", count(data.vcpus.length)],
  ];
  if (data.timed) tiles.push(["on the host, with exits", percent(host, spent)]);
  if (data.accelerator) tiles.push(["accelerator", data.accelerator]);
  for (const [name, value] of tiles) {
    const tile = make("div", "tile");
    tile.append(make("b", "", value), make("span", "", name));
    place("summary").append(tile);
  }
  const notes = [];
  if (data.cutOff) notes.push("The trace ends too early, as where vmexit was killed.");
  if (data.skipped) notes.push(`${count(data.skipped)} events could not be understood, and are left out.`);
  if (!data.timed) {
    notes.push("This trace does not say how long exits took: --trace-format chrome does.");
  }
  if (data.elsewhere) {
    notes.push(`${count(data.elsewhere)} exits at further addresses are in no table: there were too many.`);
  }
  place("notes").textContent = notes.join(" ");
  place("notes").hidden = !notes.length;
}

function legend(names) {
  const list = make("ul", "legend");
  for (const [name, swatch] of names) {
    const item = make("li", "", name);
    item.style.setProperty("--swatch", swatch);
    list.append(item);
  }
  return list;
}

// A round step such that there are at most so many of them up to `most`.
function step(most, steps) {
  const rough = most / steps;
  const power = 10 ** Math.floor(Math.log10(rough));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
}

function timeline() {
  const { width, series } = data.timeline;
  const box = place("timeline");
  const bins = series.length ? series[0].bins.length : 0;
  if (!bins) { box.append(make("p", "quiet", "No exits.")); return; }
  box.append(legend(series.map((one, index) => {
    const total = one.bins.reduce((a, b) => a + b, 0);
    return [`${one.name} ${count(total)}`, colour(index)];
  })));
  const [w, h, left, top, bottom] = [1100, 260, 52, 8, 22];
  const sums = Array.from({ length: bins }, (_, n) => series.reduce((s, one) => s + one.bins[n], 0));
  const most = Math.max(...sums, 1);
  const x = (n) => left + (w - left) * n / bins;
  const y = (value) => top + (h - top - bottom) * (1 - value / most);
  const svg = draw("svg", { viewBox: `0 0 ${w} ${h}`, role: "img", "aria-label": "Exits over time" });
  const up = Math.max(step(most, 4), 1);
  for (let value = 0; value <= most; value += up) {
    svg.append(draw("line", { x1: left, x2: w, y1: y(value), y2: y(value), class: "grid" }));
    svg.append(draw("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, count(value)));
  }
  const end = bins * width;
  for (let at = 0, by = step(end, 10); at < end; at += by) {
    svg.append(draw("text", { x: left + (w - left) * at / end, y: h - 6 }, at ? time(at) : "0"));
  }
  const below = new Array(bins).fill(0);
  series.forEach((one, index) => {
    let path = "";
    one.bins.forEach((value, n) => {
      if (!value) return;
      path += `M${x(n).toFixed(2)} ${y(below[n]).toFixed(2)}V${y(below[n] + value).toFixed(2)}`
        + `H${x(n + 1).toFixed(2)}V${y(below[n]).toFixed(2)}Z`;
      below[n] += value;
    });
    const shape = draw("path", { d: path, "data-series": one.name });
    shape.style.fill = colour(index);
    svg.append(shape);
  });
  const cursor = draw("line", { y1: top, y2: h - bottom, class: "cursor", visibility: "hidden" });
  svg.append(cursor);
  const tip = make("div", "tip");
  tip.hidden = true;
  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect();
    const n = Math.floor(((event.clientX - frame.left) / frame.width * w - left) / (w - left) * bins);
    tip.hidden = n < 0 || n >= bins;
    cursor.setAttribute("visibility", tip.hidden ? "hidden" : "visible");
    if (tip.hidden) return;
    cursor.setAttribute("x1", x(n + 0.5));
    cursor.setAttribute("x2", x(n + 0.5));
    const lines = series.filter((one) => one.bins[n]).map((one) => `${one.name}  ${count(one.bins[n])}`);
    tip.textContent = [`${time(n * width)} to ${time((n + 1) * width)}`, ...lines].join("\n");
    const at = event.clientX - frame.left;
    tip.style.left = at < frame.width / 2 ? `${at + 16}px` : "";
    tip.style.right = at < frame.width / 2 ? "" : `${frame.width - at + 16}px`;
  });
  svg.addEventListener("pointerleave", () => {
    tip.hidden = true;
    cursor.setAttribute("visibility", "hidden");
  });
  box.append(svg, tip, make("p", "quiet", `One bar is ${time(width)}.`));
}

function vcpus() {
  if (!data.timed) { place("vcpus-section").hidden = true; return; }
  const box = place("vcpus");
  box.append(legend([["guest", "var(--guest)"], ["host, with exits", "var(--host)"],
    ["neither: paused, halted or waiting for its turn", "var(--rest)"]]));
  for (const vcpu of data.vcpus) {
    const all = vcpu.guest + vcpu.host + vcpu.elsewhere;
    const row = make("div", "vcpu");
    const bar = make("div", "split");
    for (const part of ["guest", "host"]) {
      const piece = make("i");
      piece.style.width = all ? `${100 * vcpu[part] / all}%` : "0";
      piece.style.background = `var(--${part})`;
      bar.append(piece);
    }
    const words = ["guest", "host"].map((part) => `${part} ${time(vcpu[part])} (${percent(vcpu[part], all)})`);
    row.append(make("b", "", `vCPU ${vcpu.vcpu}`), bar,
      make("span", "", `${words.join(", ")}, ${count(vcpu.exits)} exits`));
    box.append(row);
  }
}

function table(id, rows, first, named) {
  const box = place(id);
  if (!rows.length) { box.append(make("p", "quiet", "None.")); return; }
  const whole = make("table"), head = make("tr");
  const columns = [[first, "left"], ...(named ? [["name", "left"]] : []), ["exits", ""]];
  if (named) columns.push(["reads", ""], ["writes", ""]);
  if (data.timed) columns.push(["each", ""], ["host time", ""]);
  for (const [text, name] of columns) head.append(make("th", name, text));
  whole.append(head);
  const weight = (row) => (data.timed ? row.hostMs : row.exits);
  const most = Math.max(...rows.map(weight), 1e-9);
  for (const row of rows) {
    const line = make("tr");
    line.append(make("td", named ? "left code" : "left", named ? row.address : row.name));
    if (named) line.append(make("td", "left", row.name));
    const share = make("td", "share"), bar = make("i"), text = make("span");
    bar.style.width = `${100 * weight(row) / most}%`;
    share.append(bar, text);
    const exits = data.timed ? make("td", "", count(row.exits)) : share;
    if (!data.timed) text.textContent = count(row.exits);
    line.append(exits);
    if (named) line.append(make("td", "", count(row.reads)), make("td", "", count(row.writes)));
    if (data.timed) {
      line.append(make("td", "", row.hostMs ? time(row.hostMs / 1e3 / row.exits) : "-"));
      text.textContent = row.hostMs ? time(row.hostMs / 1e3) : "-";
      line.append(share);
    }
    whole.append(line);
  }
  box.append(whole);
}

function memory() {
  const { slots, looks, chunk } = data.memory;
  if (!slots.length) { place("memory-section").hidden = true; return; }
  const box = place("memory");
  for (const slot of slots) {
    const whole = make("div", "slot"), words = make("p");
    words.append(
      make("span", "code", `${slot.gpa}..${slot.gpaEnd}`),
      make("span", "code", `→ ${slot.hva}..${slot.hvaEnd}`),
      make("span", "quiet", `${size(slot.bytes)}${slot.readonly ? ", read-only" : ""}`),
    );
    const cells = make("div", slot.cells.length ? "cells" : "cells plain");
    for (const cell of slot.cells) {
      const one = make("i");
      const heat = looks ? Math.min(cell.times / looks, 1) : 0;
      one.style.background = cell.times ? `rgba(var(--heat), ${(0.15 + 0.85 * heat).toFixed(3)})` : "";
      one.title = `${cell.gpa}, ${size(slot.cell)}: written at ${cell.times} of ${looks} looks, `
        + `${count(cell.pages)} pages`;
      cells.append(one);
    }
    whole.append(words, cells);
    box.append(whole);
  }
  box.append(make("p", "quiet", chunk
    ? `The stronger the colour, the more often it was found written, in ${count(looks)} looks at pieces of ${size(chunk)}.`
    : "The trace does not say what was written."));
}

summary();
timeline();
vcpus();
table("ports", data.ports, "port", true);
table("mmio", data.mmio, "GPA", true);
table("reasons", data.reasons, "reason", false);
if (data.devices.length) table("devices", data.devices, "device", false);
else place("devices-section").hidden = true;
memory();
