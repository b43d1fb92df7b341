// What the scripts of all pages use. Text goes into elements as text, never as HTML.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);

function element(id) {
  return document.getElementById(id);
}

// Numbers from 0 to 1 in 16 bits each, in base64 (viz/page.py, `packed`).
function unpacked(text) {
  const binary = atob(text), bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return Float32Array.from(new Uint16Array(bytes.buffer), (value) => value / 0xffff);
}

const MARKS = { readout: "▶", source: "●", answer: "◆" };

// What a position of a prompt is: readout, source, answer.
function marksOf(prompt, position) {
  const within = (span) => span && span[0] <= position && position < span[1];
  const marks = [];
  if (prompt.readout.includes(position)) marks.push("readout");
  if (within(prompt.source)) marks.push("source");
  if (within(prompt.answer) || (!prompt.answer && prompt.masks.includes(position))) marks.push("answer");
  return marks;
}

function labelOf(prompt, position) {
  const marks = marksOf(prompt, position).map((mark) => MARKS[mark]).join("");
  return marks + prompt.tokens[position].replaceAll("\n", "⏎");
}

// The tokens of a prompt in a list, each with its marks; `pick`, if there is one, is told which one was clicked.
function listTokens(list, prompt, pick) {
  list.replaceChildren(...prompt.tokens.map((text, position) => {
    const item = document.createElement("li");
    item.textContent = labelOf(prompt, position);
    item.className = marksOf(prompt, position).join(" ");
    if (pick) item.addEventListener("click", () => pick(position));
    else item.style.cursor = "default";
    return item;
  }));
}

// Colours the tokens by what the token at `from` reads of them; a share of `most` has the full colour.
function colourTokens(list, shares, from, most = 1) {
  [...list.children].forEach((item, position) => {
    const colour = Math.min(shares[position] / most, 1);
    item.style.setProperty("--share", colour);
    item.classList.toggle("dark", colour > 0.7);
    item.classList.toggle("from", position === from);
    item.title = `${position}: read ${shares[position].toFixed(4)}`;
  });
}

// Fills a select with [value, text] pairs.
function choices(select, pairs) {
  select.replaceChildren(...pairs.map(([value, text]) => new Option(text, value)));
}

function listValues(list, lines) {
  list.replaceChildren(...lines.map((line) => {
    const item = document.createElement("li");
    item.textContent = line;
    return item;
  }));
}

const ATTENTION = [0, 114, 178];  // the colour of a share of 1; one of 0 is white
let patternsDrawn = 0;

// CircuitsVis' attention pattern of one head, in place of what `place` held. It leaves no root to draw on again.
function drawPattern(place, attention, prompt, options) {
  const holder = document.createElement("div");
  holder.id = `circuitsvis-${patternsDrawn++}`;
  holder.className = "pattern";
  place.replaceChildren(holder);
  CircuitsVis.render(holder.id, CircuitsVis.AttentionPattern, {
    attention, tokens: prompt.tokens.map((_, position) => labelOf(prompt, position)), minValue: 0, maxValue: 1,
    positiveColor: `rgb(${ATTENTION})`, ...options,
  });
}

// Plotly takes some tags and all entities in its texts for HTML.
function escaped(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
}

// A token for a Plotly axis or cell: short.
function brief(text, length = 12) {
  const characters = [...text];
  return escaped(characters.length > length ? characters.slice(0, length - 1).join("") + "…" : text);
}

const SHADES = [[0, "#ffffff"], [1, `rgb(${ATTENTION})`]];
const INK = "#222222", FAINT = "#5f5f5f", SOURCE = "#d55e00";
const AXIS = { showgrid: false, zeroline: false, ticks: "outside", automargin: true, fixedrange: true };
const LOOK = {
  layout: {
    font: { family: "DejaVu Sans, Verdana, sans-serif", size: 13, color: INK },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", xaxis: AXIS, yaxis: AXIS, margin: { l: 10, r: 10, t: 10, b: 10 }, hoverlabel: { align: "left" }, dragmode: false,
  },
};

// Draws with Plotly in `place`, or changes what it drew there; `label` says in words what is seen.
function plot(place, label, traces, layout) {
  place.setAttribute("role", "img");
  place.setAttribute("aria-label", label);
  return Plotly.react(place, traces, { template: LOOK, ...layout }, { displayModeBar: false, responsive: true });
}

// A frame around cells of a heat map, from the first to the last of each axis.
function framed(x, y, colour, dash = "solid") {
  const box = { x0: x[0] - 0.5, x1: x[1] + 0.5, y0: y[0] - 0.5, y1: y[1] + 0.5 };
  return { type: "rect", ...box, line: { color: colour, width: 3, dash } };
}

// Tells `pick` the column and row of a clicked cell of a heat map. Plotly's own event names the cell last hovered over,
// which after a quick click or a tap is another one.
function onCell(place, pick) {
  place.addEventListener("click", ({ clientX, clientY }) => {
    const { z } = place.data[0], box = place.querySelector(".heatmaplayer image").getBoundingClientRect();
    const x = Math.floor((z[0].length * (clientX - box.left)) / box.width);
    const y = Math.floor((z.length * (clientY - box.top)) / box.height);
    if (y in z && x in z[y]) pick(x, y);
  });
}

// Names for the rows or columns of a map, every fourth of many.
function numbered(numbers) {
  const shown = [...numbers.keys()].filter((at) => numbers.length <= 16 || at % 4 === 0);
  return { tickvals: shown, ticktext: shown.map((at) => String(numbers[at])) };
}

// A map of layers and heads, at most 1 and 0 at least; few of them have their numbers written in.
function mapHeads(place, label, { layers, heads }, z, most, colorbar, shapes) {
  const map = { type: "heatmap", z, zmin: 0, zmax: most, colorscale: SHADES, xgap: 1, ygap: 1, hoverinfo: "text",
    texttemplate: heads.length <= 8 && layers.length <= 8 ? "%{z:.2f}" : "", colorbar,
    hovertext: z.map((row, l) => row.map((share, h) => `layer ${layers[l]}, head ${heads[h]}: ${written(share)}`)) };
  plot(place, label, [map], {
    height: 110 + Math.min(Math.max(24 * layers.length, 40), 480), xaxis: { ...numbered(heads), title: { text: "head" } },
    yaxis: { ...numbered(layers), autorange: "reversed", title: { text: "layer" } }, shapes,
  });
}

function written(number) {
  if (number === null) return "undefined";
  return number !== 0 && Math.abs(number) < 0.001 ? number.toExponential(2) : number.toPrecision(4);
}

// In a notebook the page is in a frame, which takes the page's height.
if (window.frameElement) {
  const fit = () => { window.frameElement.style.height = `${document.documentElement.scrollHeight}px`; };
  new ResizeObserver(fit).observe(document.querySelector("main"));
}
