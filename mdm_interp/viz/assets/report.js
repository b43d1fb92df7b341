// Draws figures when they come near and clears them when they are far, in the reader's colours and width; fills tables when
// they are opened; filters, searches and sorts the ledger. A module, so that the page is there before it runs; texts go into elements as text, never as HTML.
const { figures, numbers, ledger } = JSON.parse(await unzipped(document.getElementById("packed").textContent));

// Adds a row of cells to a table's body, the first of them its header; a cell is a text, or a function that fills it.
function addRow(body, cells, number = () => false) {
  const row = body.insertRow();
  cells.forEach((cell, at) => {
    const place = at ? row.insertCell() : Object.assign(row.appendChild(document.createElement("th")), { scope: "row" });
    if (number(at)) place.className = "number";
    if (typeof cell === "function") cell(place);
    else place.textContent = cell;
  });
}

const themes = JSON.parse(document.getElementById("themes").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)"), paper = matchMedia("print");
const AT_ONCE = 100; // more rows of a table than these make a page slow
const MIN_SCALE = 0.6; // below it, labels are too small to read: the frame scrolls instead
const plots = [...document.querySelectorAll(".plot")];
const stills = new Map(plots.map((plot) => [plot, plot.querySelector(".still")]).filter(([, still]) => still));
const far = new Set();
const working = new Map(); // what Plotly has not finished, and must have before a drawing is cleared
let printing = paper.matches;

function template() {
  return themes[dark.matches && !printing ? "dark" : "light"];
}

function waitFor(plot, work) {
  working.set(plot, Promise.all([working.get(plot), work]));
}

// What says in words what is seen is on the drawing, or on its place.
function describe(from, to) {
  for (const name of ["role", "aria-label", "aria-describedby", "aria-details"]) {
    to.setAttribute(name, from.getAttribute(name));
    from.removeAttribute(name);
  }
}

function draw(plot) {
  if (plot.data || !window.Plotly) return;
  const name = plot.id.replace("figure-", ""), figure = figures[name], { data, layout } = figure;
  layout.template = template();
  if (matchMedia("(pointer: coarse)").matches) layout.dragmode = false; // a finger on a figure scrolls the page
  const buttons = [...plotSaves(name, () => [headerOf(name), ...numbers[name]]), "zoomIn2d", "zoomOut2d", "resetScale2d"];
  waitFor(plot, Plotly.newPlot(plot, data, layout, { displaylogo: false, modeBarButtons: [buttons] }));
  stills.get(plot)?.remove();
  const [drawing, ...others] = plot.querySelectorAll(".main-svg");
  describe(plot, drawing);
  for (const layer of others) layer.setAttribute("aria-hidden", "true");
  for (const layer of [drawing, ...others]) layer.setAttribute("viewBox", `0 0 ${layout.width} ${layout.height}`);
  followCurves(plot);
  leadInside(plot, figure);
}

// Leaves the picture of a figure in its place: a drawing is a thousand elements and more. What the reader changed stays in
// the figure's data and layout, of which it is drawn again.
async function clear(plot) {
  const work = working.get(plot);
  await work;
  if (work !== working.get(plot)) return clear(plot);
  if (!plot.data || printing || !far.has(plot)) return;
  describe(plot.querySelector(".main-svg"), plot);
  Plotly.purge(plot);
  if (stills.has(plot)) plot.append(stills.get(plot));
}

// ---- settings: what marks of a figure are of

// A name without markup, and without how many it is of.
function plain(text) {
  return text.replace(/<[^>]*>/g, " ").replace(/\s*\(?\bn = .*$/, "").replace(/\s+/g, " ").trim();
}

// What names a trace: it itself, and the title of its panel.
function namesOf({ layout }, { name, xaxis = "x", yaxis = "y" }) {
  const isTitle = ({ xref, yref, y }) => xref === `${xaxis} domain` && yref === `${yaxis} domain` && y === 1;
  return [name, layout.annotations?.find(isTitle)?.text];
}

// The settings that a mark can be of, by all that names it. What is no name of a setting says nothing.
function settingsOf({ settings }, names) {
  return names.filter((name) => typeof name === "string").map(plain).reduce((left, name) => {
    const called = left.filter(({ labels }) => labels.includes(name));
    return called.length ? called : left;
  }, settings);
}

// How figures call the stages of training.
const STAGES = { initial: /before training|\binitial\b/, early: /\bearly\b|half-way|half learnt|first learnt/, end: /\bend\b|after training/ };

// The step of training that a mark is of: its place on an axis of steps, or the stage that is in its names.
function stepOf({ over_training }, { xaxis = "x" }, { steps }, x, names) {
  if (over_training.includes(xaxis.replace("x", "xaxis"))) return Math.round(x);
  const said = names.filter((name) => typeof name === "string").map(plain).join(" ");
  const stages = Object.keys(STAGES).filter((stage) => STAGES[stage].test(said));
  return stages.length === 1 ? steps[stages[0]] : undefined;
}

// A point whose names leave one setting leads to the explorer of one of its runs.
function leadInside(plot, figure) {
  const addressOf = ({ points: [{ data, x, y, text, customdata }] }) => {
    const names = [...namesOf(figure, data), x, y, text, ...[customdata].flat()];
    const [setting, ...others] = settingsOf(figure, names);
    if (!setting?.page || others.length) return null;
    const step = stepOf(figure, data, setting, x, names);
    return withBack(setting.page + (step === undefined ? "" : `#step=${step}`), plot);
  };
  plot.on("plotly_click", (event) => { if (addressOf(event)) location.href = addressOf(event); });
  plot.on("plotly_hover", (event) => plot.classList.toggle("leads", addressOf(event) !== null));
  plot.on("plotly_unhover", () => plot.classList.remove("leads"));
}

// The address of an explorer that leads back to this place of this page: the ledger as it is filtered, or a figure.
function withBack(address, place) {
  const file = location.pathname.split("/").at(-1) || "index.html", section = place.closest("section");
  const here = section ? (section.contains(body) ? ledgerAddress() : `#${section.id}`) : location.hash;
  const [page, named] = address.split("#"), all = new URLSearchParams(named);
  all.set("back", file + here);
  return `${page}#${all}`;
}

for (const kind of ["click", "auxclick"]) {
  document.addEventListener(kind, ({ target }) => {
    const link = target.closest?.("a[href^='explore_']");
    if (link) link.href = withBack(link.getAttribute("href"), link);
  });
}

// Marks the setting that the address names: marks of others fade, and its row of a matrix has a frame.
function highlight(figure) {
  const label = new URLSearchParams(location.hash.slice(1)).get("setting");
  const setting = figure.settings.find(({ names }) => names.includes(label));
  if (!setting) return;
  const isOther = (names) => !settingsOf(figure, names).includes(setting);
  const frames = [];
  for (const trace of figure.data) {
    const { x, y, text, customdata, xaxis = "x", yaxis = "y" } = trace, names = namesOf(figure, trace);
    if (trace.type === "heatmap") {
      const rows = isOther(names) || !Array.isArray(y) ? [] : y.map((name) => settingsOf(figure, [name]));
      rows.forEach((settings, at) => {
        if (settings.length === figure.settings.length || !settings.includes(setting)) return;
        frames.push({ type: "rect", xref: `${xaxis} domain`, x0: 0, x1: 1, yref: yaxis, y0: at - 0.5, y1: at + 0.5,
          line: { color: template().layout.font.color, width: 3 } });
      });
      continue;
    }
    const lists = [x, y, text, customdata].filter(Array.isArray);
    const others = Array.from({ length: lists[0]?.length ?? 1 }, (_, at) => isOther([...names, ...lists.flatMap((list) => list[at])]));
    if (others.every(Boolean)) trace.opacity = 0.15;
    else if (others.includes(true)) trace.selectedpoints = [...others.keys()].filter((at) => !others[at]);
  }
  figure.layout.shapes = [...(figure.layout.shapes ?? []), ...frames];
  const said = document.getElementById("marked");
  if (!said) return;
  said.replaceChildren(`Marked: ${setting.names[0]}. `);
  link(said, location.href.split("#")[0], "Show all alike");
  said.hidden = false;
}

// Checkboxes that do what clicks on the legend do; returns what brings them up to date.
function offerCurves(plot) {
  const groupOf = (trace) => trace.legendgroup || trace.name;
  const listed = new Map(plot._fullData.filter((trace) => trace.showlegend).map((trace) => [groupOf(trace), trace.name]));
  const place = plot.closest("figure").querySelector(".curves");
  if (listed.size < 2 || !place) return () => {};
  const tracesOf = (group) => [...plot.data.keys()].filter((i) => groupOf(plot.data[i]) === group);
  const boxes = [...listed].map(([group, name]) => {
    const label = document.createElement("label"), box = document.createElement("input");
    box.type = "checkbox";
    box.addEventListener("change", () => {
      const visible = box.checked || "legendonly";
      draw(plot);
      waitFor(plot, Plotly.restyle(plot, { visible }, tracesOf(group)));
    });
    label.append(box, ` ${name.replace(/<[^>]*>/g, " ")}`);
    place.querySelector("fieldset").append(label);
    return [group, box];
  });
  place.hidden = false;
  return () => {
    for (const [group, box] of boxes) box.checked = tracesOf(group).some((i) => (plot.data[i].visible ?? true) === true);
  };
}

const curves = new Map();

function followCurves(plot) {
  if (!curves.has(plot)) curves.set(plot, offerCurves(plot));
  curves.get(plot)();
  plot.on("plotly_restyle", curves.get(plot));
}

function recolour() {
  for (const plot of plots) if (plot.data) waitFor(plot, Plotly.relayout(plot, { template: template() }));
}

// Paper shows all: every figure in light colours, and what is folded.
function toPaper(on) {
  if (printing === on) return;
  printing = on;
  if (dark.matches) recolour();
  if (on) {
    plots.forEach(draw);
    tables.forEach((details) => fill(details));
  }
  if (!on) far.forEach(clear);
  if (filters.length) showLedger();
  for (const folded of document.querySelectorAll(on ? "details:not([open], .curves)" : "details.unfolded")) {
    folded.open = on;
    folded.classList.toggle("unfolded", on);
  }
}

// ---- runs without a page: the command that looks inside, where the pointer or the focus is

const tip = Object.assign(document.createElement("span"), { id: "command" });
tip.setAttribute("role", "tooltip");

function showCommand({ target }) {
  const digest = target.closest(".digest");
  if (!digest || digest.nextElementSibling === tip) return;
  hideCommand();
  tip.textContent = `mdm-interp explore ${digest.textContent} --out explorer.html`;
  digest.setAttribute("aria-describedby", tip.id);
  digest.after(tip);
}

function copyCommand({ target }) {
  if (!target.closest(".digest")) return;
  navigator.clipboard.writeText(tip.textContent).then(() => { tip.dataset.said = "copied"; },
    () => getSelection().selectAllChildren(tip));  // where the browser forbids it, the reader copies by hand
}

function hideCommand() {
  tip.previousElementSibling?.removeAttribute("aria-describedby");
  tip.remove();
  delete tip.dataset.said;
}

for (const runs of document.querySelectorAll(".runs")) {
  for (const kind of ["pointerover", "focusin"]) runs.addEventListener(kind, showCommand);
  runs.addEventListener("focusout", hideCommand);
  runs.addEventListener("pointerleave", () => { hideCommand(); showCommand({ target: document.activeElement }); });
  runs.addEventListener("keydown", ({ key }) => { if (key === "Escape") hideCommand(); });
  runs.addEventListener("click", copyCommand);
}

// ---- numbers

const tables = [...document.querySelectorAll("details.values")];

function headerOf(name) {
  return [...document.querySelectorAll(`#numbers-${name} thead th`)].map(({ textContent }) => textContent);
}

function fill(details, whole = printing) {
  const body = details.querySelector("tbody"), rest = details.querySelector(".rest");
  const rows = numbers[details.id.replace("numbers-", "")], interval = rows[0]?.length - 3;
  const shown = whole ? rows : rows.slice(0, AT_ONCE);
  if (body.rows.length >= shown.length) return;
  body.replaceChildren();
  shown.forEach((cells) => addRow(body, cells, (at) => at === interval));
  rest.hidden = shown.length === rows.length;
  rest.textContent = `Show ${rows.length - shown.length} more`;
}

tables.forEach((details) => {
  details.addEventListener("toggle", () => {
    if (details.open) fill(details);
    else details.querySelector("tbody").replaceChildren();
  });
  details.querySelector(".rest").addEventListener("click", () => fill(details, true));
});

// ---- the ledger

const filters = [...document.querySelectorAll(".filters select")], search = document.querySelector(".filters [type=search]");
const body = document.querySelector("#ledger tbody"), headers = [...document.querySelectorAll("#ledger thead button")];
const more = document.getElementById("more");
let sorted = null;  // the column, and whether it falls
let whole = false;

// What a column is sorted by: a number where it has one.
function keyOf(row, column) {
  return row.keys[column] ?? row.cells[column];
}

function chosenRows() {
  const asked = filters.filter((filter) => filter.value), words = search.value.toLowerCase();
  const found = ledger.filter(({ cells, text }) =>
    asked.every((filter) => cells[filter.dataset.column] === filter.value) && text.includes(words));
  if (!sorted) return found;
  const [column, falls] = sorted, sign = falls ? -1 : 1;
  return [...found].sort((one, other) => {
    const [a, b] = [keyOf(one, column), keyOf(other, column)];
    return a === b ? 0 : sign * (a < b ? -1 : 1);
  });
}

function link(place, href, text) {
  place.append(Object.assign(document.createElement("a"), { href, textContent: text }));
}

function showLedger() {
  const found = chosenRows(), shown = whole || printing ? found : found.slice(0, AT_ONCE);
  body.replaceChildren();
  for (const { cells, reading, figure, setting, inside } of shown) {
    const verdict = filters.length - 1;
    addRow(body, [
      ...cells.slice(0, verdict), (place) => Object.assign(place, { className: cells[verdict], textContent: cells[verdict] }),
      (place) => {
        place.append(cells[verdict + 1]);
        if (reading) place.append(" (", Object.assign(document.createElement("b"), { textContent: reading }), ")");
      },
      ...cells.slice(verdict + 2),
      (place) => {
        link(place, `${figure}.html${setting ? `#${new URLSearchParams({ setting })}` : ""}`, figure);
        place.append(" (");
        link(place, `${figure}.json`, "rows");
        if (inside) {
          place.append(", ");
          link(place, inside, "heads");
        }
        place.append(")");
      },
    ], (at) => at > verdict + 1 && at < verdict + 5);
  }
  const which = filters.filter((filter) => filter.value).map((filter) => `${filter.name} ${filter.value}`);
  if (search.value) which.push(`“${search.value}”`);
  document.getElementById("shown").textContent =
    `${found.length} of ${ledger.length} verdict${ledger.length === 1 ? "" : "s"}${which.length ? `: ${which.join(", ")}` : ""}`;
  more.hidden = shown.length === found.length;
  more.textContent = `Show ${found.length - shown.length} more`;
  headers.forEach((button, column) => button.parentElement.setAttribute("aria-sort",
    sorted?.[0] === column ? (sorted[1] ? "descending" : "ascending") : "none"));
}

// The address names filters, words and order, so that a view can be linked.
function fromAddress() {
  const named = new URLSearchParams(location.hash.slice(1));
  if (![...filters, search].some((control) => named.has(control.name)) && !named.has("sort")) return;
  for (const filter of filters) {
    const asked = named.get(filter.name);
    filter.selectedIndex = Math.max(0, [...filter.options].findIndex(({ value, dataset }) => [value, dataset.alias].includes(asked)));
  }
  search.value = named.get("words") ?? "";
  const column = headers.findIndex((button) => button.textContent === named.get("sort"));
  sorted = column < 0 ? null : [column, named.has("falling")];
  showLedger();
  document.querySelector(".filters").scrollIntoView();
}

function ledgerAddress() {
  const named = new URLSearchParams([...filters, search].filter(({ value }) => value).map(({ name, value }) => [name, value]));
  if (sorted) {
    named.set("sort", headers[sorted[0]].textContent);
    if (sorted[1]) named.set("falling", "");
  }
  return `#${named.size ? named : "claims"}`;
}

function toAddress() {
  history.replaceState(null, "", ledgerAddress());
  showLedger();
}

if (filters.length) {
  showLedger();
  fromAddress();
  addEventListener("hashchange", fromAddress);
  const form = document.querySelector(".filters");
  form.addEventListener("change", toAddress);
  form.addEventListener("submit", (event) => event.preventDefault());
  search.addEventListener("input", toAddress);
  form.addEventListener("reset", () => setTimeout(() => { sorted = null; toAddress(); }));
  headers.forEach((button, column) => button.addEventListener("click", () => {
    sorted = sorted?.[0] !== column ? [column, false] : sorted[1] ? null : [column, true];
    toAddress();
  }));
  more.addEventListener("click", () => { whole = true; showLedger(); });
}

// ---- figures that are folded below another

function unfold() {
  for (let place = document.getElementById(location.hash.slice(1)); place; place = place.parentElement) {
    if (place.matches("details.more")) place.open = true;
  }
  document.getElementById(location.hash.slice(1))?.scrollIntoView();
}
if (document.querySelector("details.more")) {
  unfold();
  addEventListener("hashchange", unfold);
}

// ---- drawing

const near = new IntersectionObserver(
  (seen) => seen.filter((entry) => entry.isIntersecting).forEach((entry) => draw(entry.target)), { rootMargin: "1000px" });
const away = new IntersectionObserver((seen) => seen.forEach(({ target, isIntersecting }) => {
  if (isIntersecting) return far.delete(target);
  far.add(target);
  clear(target);
}), { rootMargin: "1500px" });
const fit = new ResizeObserver((frames) => frames.forEach(({ target, contentRect }) => {
  const drawing = target.querySelector(".drawing");
  const scale = contentRect.width / drawing.style.getPropertyValue("--width");
  drawing.style.setProperty("--scale", Math.min(1, Math.max(MIN_SCALE, scale)));
}));
document.querySelectorAll(".frame").forEach((frame) => fit.observe(frame));
dark.addEventListener("change", recolour);
paper.addEventListener("change", () => toPaper(paper.matches));
addEventListener("beforeprint", () => toPaper(true));
addEventListener("afterprint", () => toPaper(false));
Object.values(figures).forEach(highlight);

// Plotly comes when the first picture is painted: it keeps a slow computer from painting for seconds.
await stills.values().next().value?.decode().catch(() => {});
await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
await new Promise((done) => {
  const { href } = document.getElementById("library");
  document.head.append(Object.assign(document.createElement("script"), { src: href, onload: done, onerror: done }));
});
for (const plot of plots) plot.removeAttribute("aria-busy");
for (const observer of [near, away]) plots.forEach((plot) => observer.observe(plot));
if (printing) plots.forEach(draw);
