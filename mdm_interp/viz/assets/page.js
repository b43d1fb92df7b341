// What the scripts of all pages use. Text goes into elements as text, never as HTML.

// What a page that stands alone draws with comes first, each library in a script of its own.
for (const library of document.querySelectorAll(".library")) {
  const script = document.createElement("script");
  script.textContent = await unzipped(library.textContent);
  library.replaceWith(script);
}

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

// Any numbers, as fractions of the largest (viz/page.py, `packed_signed`).
function unpackedSigned({ most, values }) {
  return unpacked(values).map((share) => (2 * share - 1) * most);
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

// The tokens of a prompt in a list, each with its marks; `pick`, if there is one, is told which one was chosen.
function listTokens(list, prompt, pick) {
  const items = prompt.tokens.map((text, position) => {
    const item = document.createElement("li");
    item.textContent = labelOf(prompt, position);
    item.className = marksOf(prompt, position).join(" ");
    if (pick) {
      item.setAttribute("role", "option");
      item.addEventListener("click", () => pick(position));
    }
    return item;
  });
  if (!pick) return list.replaceChildren(...items);
  list.setAttribute("role", "listbox");
  fillWalkable(list, items, pick);
}

const NEXT = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 };

// Fills a place with items that are one stop of the Tab key: arrow keys go on from it, and `pick`, if there is one, is told
// where to. Items that replace others take over their focus.
function fillWalkable(place, items, pick) {
  const focused = [...place.children].indexOf(document.activeElement);
  place.replaceChildren(...items);
  items.forEach((item) => { item.tabIndex = -1; });
  const stop = items[Math.max(focused, 0)] ?? items[0];
  if (stop) stop.tabIndex = 0;
  if (focused >= 0) stop?.focus();
  place.onkeydown = (event) => {
    const to = items.indexOf(event.target) + NEXT[event.key];
    if (!items[to]) return;
    event.preventDefault();
    event.target.tabIndex = -1;
    items[to].tabIndex = 0;
    items[to].focus();
    pick?.(to);
  };
}

// Lets arrow keys in a map choose the next head (left, right) and layer (up, down).
function walkHeads(map, layer, head) {
  map.addEventListener("keydown", (event) => {
    const select = { ArrowLeft: head, ArrowRight: head, ArrowUp: layer, ArrowDown: layer }[event.key];
    if (!select) return;
    event.preventDefault();
    if (!select.options[select.selectedIndex + NEXT[event.key]]) return;
    select.selectedIndex += NEXT[event.key];
    select.dispatchEvent(new Event("change"));
  });
}

const DARK = 0.62;  // from which share of a full colour on text is lighter than it

// Colours the tokens by what the token at `from` reads of them; a share of `most` has the full colour.
function colourTokens(list, shares, from, most = 1) {
  [...list.children].forEach((item, position) => {
    const colour = Math.min(shares[position] / most, 1);
    item.style.setProperty("--share-of-full", colour);
    item.classList.toggle("dark", colour > DARK);
    item.classList.toggle("from", position === from);
    if (item.getAttribute("role") === "option") item.setAttribute("aria-selected", position === from);
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

const ATTENTION = [1, 3, 5].map((at) => parseInt(COLOURS.share.slice(at, at + 2), 16));  // the colour of a share of 1; one of 0 is white
let patternsDrawn = 0;

// The colour of a share of the full one.
function shade(share) {
  return `rgb(${ATTENTION.map((full) => Math.round(255 + (full - 255) * Math.min(share, 1)))})`;
}

// CircuitsVis' attention pattern of one head, in place of what `place` held: it leaves no root to draw on again. `pick` is
// told the row of a clicked cell.
function drawPattern(place, attention, prompt, pick, options) {
  const holder = document.createElement("div"), tokens = prompt.tokens.map((_, position) => labelOf(prompt, position));
  holder.id = `circuitsvis-${patternsDrawn++}`;
  holder.className = "pattern";
  place.replaceChildren(holder);
  const Pattern = (given) => {
    const drawn = CircuitsVis.AttentionPattern(given);
    let chart = drawn;
    while (!chart.props.options) chart = chart.props.children;
    const { plugins, scales } = chart.props.options;
    [scales.x.title.text, scales.y.title.text] = ["read from", "reads"];  // “source” has another meaning here
    plugins.tooltip.callbacks.label = ({ raw: { destIdx, srcIdx, v } }) => (given.maskUpperTri && destIdx < srcIdx ? "not reached"
      : `${tokens[destIdx]} (${destIdx}) reads ${v.toFixed(4)} of ${tokens[srcIdx]} (${srcIdx})`);
    chart.props.options.onClick = (_, [cell], { data: { datasets } }) => cell && pick(datasets[0].data[cell.index].destIdx);
    return drawn;
  };
  CircuitsVis.render(holder.id, Pattern, { attention, tokens, minValue: 0, maxValue: 1, positiveColor: COLOURS.share, ...options });
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

const SHADES = [[0, "#ffffff"], [1, COLOURS.share]];
const SIGNED = [[0, COLOURS.negative], [0.5, "#ffffff"], [1, COLOURS.positive]];
const PARTS = ["even", "odd"], PART_MARKS = { even: { color: COLOURS.even }, odd: { color: COLOURS.odd, pattern: { shape: "/" } } };
const INK = "#222222", FAINT = "#5f5f5f";
const AXIS = { showgrid: false, zeroline: false, ticks: "outside", automargin: true, fixedrange: true };
const LOOK = {
  layout: {
    font: { family: "DejaVu Sans, Verdana, sans-serif", size: 13, color: INK },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", xaxis: AXIS, yaxis: AXIS, margin: { l: 10, r: 10, t: 30, b: 10 }, hoverlabel: { align: "left" }, dragmode: false,
    modebar: { bgcolor: "rgba(255,255,255,0.8)", color: FAINT, activecolor: INK },
  },
};

// Draws with Plotly in `place`, or changes what it drew there; `label` says in words what is seen.
function plot(place, label, traces, layout) {
  place.setAttribute("role", "img");
  place.setAttribute("aria-label", label);
  const filename = fileOf(label), buttons = plotSaves(filename, (graph) => linesOf(graph.data));
  return Plotly.react(place, traces, { template: LOOK, ...layout }, { displaylogo: false, modeBarButtons: [buttons], responsive: true });
}

// What a plot is called as a file.
function fileOf(label) {
  return label.replace(/[^\w.-]+/g, "_").slice(0, 80);
}

// What a plot shows, as a table: a line for each cell of a heat map and each point of a curve.
function linesOf(traces) {
  const lines = traces.flatMap((trace) => {
    const { name = "", x, y, z } = trace;
    if (z) return z.flatMap((row, at) => Array.from(row, (value, to) => [name, x?.[to] ?? to, y?.[at] ?? at, value]));
    return Array.from(y, (value, at) => [name, x[at], value, ""]);
  });
  return [["name", "x", "y", "z"], ...lines];
}

// Buttons that save a heat map of shares which Plotly did not draw. `shown` returns its label, its trace and the share of
// the full colour; `drawn` says whether there is a picture of it.
function saveButtons(place, drawn, shown) {
  const saves = {
    PNG: async ({ label, map, most }) => {
      const image = new Image(), canvas = document.createElement("canvas");
      image.src = `data:image/svg+xml,${encodeURIComponent(svgOf(map, most))}`;
      await image.decode();
      [canvas.width, canvas.height] = [2 * image.width, 2 * image.height];
      canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
      canvas.toBlob((blob) => download(`${fileOf(label)}.png`, blob));
    },
    SVG: ({ label, map, most }) => download(`${fileOf(label)}.svg`, new Blob([svgOf(map, most)], { type: "image/svg+xml" })),
    CSV: ({ label, map }) => download(`${fileOf(label)}.csv`, csvBlob(linesOf([map]))),
  };
  place.append(...Object.entries(saves).filter(([format]) => drawn || format === "CSV").map(([format, save]) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: format, title: `Save as ${format}` });
    button.addEventListener("click", () => save(shown()));
    return button;
  }));
}

// A heat map of shares as a picture; what is null is not reached.
function svgOf({ x, y, z }, most) {
  const CELL = 20, LETTER = 8, room = (labels) => 16 + LETTER * Math.max(...labels.map((label) => [...label].length));
  const left = room(y), width = left + CELL * x.length + 8, height = 8 + CELL * y.length + room(x);
  const made = (tag, attributes, text = "") => {
    const item = document.createElementNS("http://www.w3.org/2000/svg", tag);
    Object.entries(attributes).forEach(([name, value]) => item.setAttribute(name, value));
    item.textContent = text;
    return item;
  };
  const middle = (at) => CELL * (at + 0.5), font = { "font-family": LOOK.layout.font.family, "font-size": 13, fill: INK, "text-anchor": "end", "dominant-baseline": "central" };
  const svg = made("svg", { width, height, viewBox: `0 0 ${width} ${height}` });
  svg.append(made("rect", { width, height, fill: "#ffffff" }),
    ...z.flatMap((row, at) => row.map((share, to) =>
      made("rect", { x: left + CELL * to, y: 8 + CELL * at, width: CELL - 1, height: CELL - 1, fill: share === null ? UNREACHED : shade(share / most) }))),
    ...y.map((label, at) => made("text", { ...font, x: left - 8, y: 8 + middle(at) }, label)),
    ...x.map((label, at) => made("text", { ...font, transform: `translate(${left + middle(at)} ${16 + CELL * y.length}) rotate(-90)` }, label)));
  return new XMLSerializer().serializeToString(svg);
}

// A frame around cells of a heat map, from the first to the last of each axis.
function framed(x, y, colour, dash = "solid") {
  const box = { x0: x[0] - 0.5, x1: x[1] + 0.5, y0: y[0] - 0.5, y1: y[1] + 0.5 };
  return { type: "rect", ...box, line: { color: colour, width: 3, dash } };
}

// Tells `pick` the column and row of a clicked cell of a heat map. Plotly's own event names the cell last hovered over,
// which after a quick click or a tap is another one.
function onCell(place, pick) {
  place.addEventListener("click", (event) => atCell(place, event, pick));
}

function atCell(place, { clientX, clientY }, pick) {
  const { z } = place.data[0], box = place.querySelector(".heatmaplayer image").getBoundingClientRect();
  const x = Math.floor((z[0].length * (clientX - box.left)) / box.width);
  const y = Math.floor((z.length * (clientY - box.top)) / box.height);
  if (y in z && x in z[y]) pick(x, y);
}

// Tells `pick` which point of a curve was clicked.
function onPoint(place, pick) {
  place.on("plotly_click", ({ points }) => pick(points[0].pointIndex));
}

// Names for the rows or columns of a map, every fourth of many.
function numbered(numbers) {
  const shown = [...numbers.keys()].filter((at) => numbers.length <= 16 || at % 4 === 0);
  return { tickvals: shown, ticktext: shown.map((at) => String(numbers[at])) };
}

// A map of layers and heads, from 0 (`signed`: from -most) to most; few of them have their numbers written in.
function mapHeads(place, label, { layers, heads }, z, most, colorbar, shapes, signed = false) {
  const map = { type: "heatmap", z, zmin: signed ? -most : 0, zmax: most, colorscale: signed ? SIGNED : SHADES, xgap: 1, ygap: 1, hoverinfo: "text",
    texttemplate: heads.length <= 8 && layers.length <= 8 ? "%{z:.2f}" : "", colorbar,
    hovertext: z.map((row, l) => row.map((share, h) => `layer ${layers[l]}, head ${heads[h]}: ${written(share)}`)) };
  plot(place, label, [map], {
    height: 110 + Math.min(Math.max(24 * layers.length, 40), 480), xaxis: { ...numbered(heads), title: { text: "head" } },
    yaxis: { ...numbered(layers), autorange: "reversed", title: { text: "layer" } }, shapes,
  });
}

const UNREACHED = "#c8c8c8";  // what attention does not reach, as CircuitsVis draws it

// The attention of some rows of a prompt, [row token], as a heat map; its frame is the route, from readouts to source. With
// `apart`, by how much it differs from another, up to so much.
function plotPattern(place, label, prompt, pattern, reach, apart = null) {
  const { tokens, rows, source, readout } = prompt, n = tokens.length;
  const name = (position) => escaped(`${labelOf(prompt, position)} (${position})`);
  const shown = (positions) => {
    const marked = [...positions.keys()].filter((at) => positions.length <= 60 || marksOf(prompt, positions[at]).length);
    return { tickvals: marked, ticktext: marked.map((at) => brief(labelOf(prompt, positions[at]))),
      tickfont: { size: positions.length > 24 ? 9 : 12 } };
  };
  const blockOf = (at) => Math.floor(at / reach);
  const hidden = (at, to) => reach !== null && blockOf(to) > blockOf(rows[at]);  // left out, so that the grey behind them shows
  const map = { type: "heatmap", hoverongaps: false, xgap: 1, ygap: 1,
    z: pattern.map((row, at) => Array.from(row, (share, to) => (hidden(at, to) ? null : Number(share.toFixed(5))))),
    zmin: apart === null ? 0 : -apart, zmax: apart ?? 1, colorscale: apart === null ? SHADES : SIGNED,
    showscale: apart !== null, colorbar: { thickness: 10 }, hoverinfo: "text",
    hovertext: pattern.map((row, at) => Array.from(row, (share, to) => `${name(rows[at])} reads ${share.toFixed(4)}${apart === null ? "" : " more"} of ${name(to)}`)) };
  plot(place, label, [map], {
    height: rows.length === n ? Math.min(600, 200 + 26 * n) : 140 + 26 * rows.length,
    plot_bgcolor: reach !== null ? UNREACHED : "rgba(0,0,0,0)",
    xaxis: { ...shown([...tokens.keys()]), tickangle: -90 },
    yaxis: { ...shown(rows), autorange: "reversed" },
    shapes: [framed([source[0], source[1] - 1], [rows.indexOf(readout[0]), rows.indexOf(readout.at(-1))], COLOURS.fact)],
  });
}

const LOGARITHMIC = (step) => (step === 0 ? 0.5 : step);  // step 0 has a place on the axis too

// An axis of training steps, from 0 to the last.
function stepsAxis(steps) {
  return { type: "log", title: { text: "training step" }, tickvals: [0.5, 1, 10, 100, 1000, 10000, 100000],
    ticktext: ["0", "1", "10", "100", "1k", "10k", "100k"],
    range: [Math.log10(0.45), Math.log10(Math.max(...steps, 1) * 1.15)] };
}

function written(number) {
  if (number === null) return "undefined";
  return number !== 0 && Math.abs(number) < 0.001 ? number.toExponential(2) : number.toPrecision(4);
}

element("copy")?.addEventListener("click", ({ currentTarget }) => {
  navigator.clipboard.writeText(element("code").textContent).then(() => { currentTarget.textContent = "copied"; },
    () => getSelection().selectAllChildren(element("code")));  // where the browser forbids it, the reader copies by hand
});

// In a notebook the page is in a frame, which takes the page's height.
if (window.frameElement) {
  const fit = () => { window.frameElement.style.height = `${document.documentElement.scrollHeight}px`; };
  new ResizeObserver(fit).observe(document.querySelector("main"));
}
