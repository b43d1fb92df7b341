// Draws figures when they come near, in the reader's colours and width; filters the ledger.
"use strict";

const themes = JSON.parse(document.getElementById("themes").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)"), paper = matchMedia("print");
const MIN_SCALE = 0.6; // below it, labels are too small to read: the frame scrolls instead
const OPTIONS = { displaylogo: false, modeBarButtons: [["toImage", "zoomIn2d", "zoomOut2d", "resetScale2d"]] };
const plots = [...document.querySelectorAll(".plot")];
let printing = paper.matches;

function template() {
  return themes[dark.matches && !printing ? "dark" : "light"];
}

function draw(plot) {
  if (plot.data) return;
  const { data, layout } = JSON.parse(document.getElementById(`data-${plot.id}`).textContent);
  layout.template = template();
  if (matchMedia("(pointer: coarse)").matches) layout.dragmode = false; // a finger on a figure scrolls the page
  Plotly.newPlot(plot, data, layout, OPTIONS);
  const [drawing, ...others] = plot.querySelectorAll(".main-svg");
  drawing.setAttribute("role", "img");
  for (const name of ["aria-label", "aria-describedby", "aria-details"]) {
    drawing.setAttribute(name, plot.getAttribute(name));
    plot.removeAttribute(name);
  }
  plot.removeAttribute("role");
  for (const layer of others) layer.setAttribute("aria-hidden", "true");
  for (const layer of [drawing, ...others]) layer.setAttribute("viewBox", `0 0 ${layout.width} ${layout.height}`);
  offerCurves(plot);
}

// Checkboxes that do what clicks on the legend do.
function offerCurves(plot) {
  const groupOf = (trace) => trace.legendgroup || trace.name;
  const listed = new Map(plot._fullData.filter((trace) => trace.showlegend).map((trace) => [groupOf(trace), trace.name]));
  const place = plot.closest("figure").querySelector(".curves");
  if (listed.size < 2 || !place) return;
  const tracesOf = (group) => [...plot.data.keys()].filter((i) => groupOf(plot.data[i]) === group);
  const boxes = [...listed].map(([group, name]) => {
    const label = document.createElement("label"), box = document.createElement("input");
    box.type = "checkbox";
    box.addEventListener("change", () => Plotly.restyle(plot, { visible: box.checked || "legendonly" }, tracesOf(group)));
    label.append(box, ` ${name.replace(/<[^>]*>/g, " ")}`);
    place.querySelector("fieldset").append(label);
    return [group, box];
  });
  const follow = () => {
    for (const [group, box] of boxes) box.checked = tracesOf(group).some((i) => (plot.data[i].visible ?? true) === true);
  };
  follow();
  plot.on("plotly_restyle", follow);
  place.hidden = false;
}

function recolour() {
  for (const plot of plots) if (plot.data) Plotly.relayout(plot, { template: template() });
}

// Paper shows all: every figure in light colours, and what is folded.
function toPaper(on) {
  if (printing === on) return;
  printing = on;
  if (dark.matches) recolour();
  if (on) plots.forEach(draw);
  for (const folded of document.querySelectorAll(on ? "details:not([open], .curves)" : "details.unfolded")) {
    folded.open = on;
    folded.classList.toggle("unfolded", on);
  }
}

const near = new IntersectionObserver(
  (seen) => seen.filter((entry) => entry.isIntersecting).forEach((entry) => draw(entry.target)), { rootMargin: "1000px" });
const fit = new ResizeObserver((frames) => frames.forEach(({ target, contentRect }) => {
  const drawing = target.querySelector(".drawing");
  const scale = contentRect.width / drawing.style.getPropertyValue("--width");
  drawing.style.setProperty("--scale", Math.min(1, Math.max(MIN_SCALE, scale)));
}));
document.querySelectorAll(".frame").forEach((frame) => fit.observe(frame));
plots.forEach((plot) => near.observe(plot));
dark.addEventListener("change", recolour);
paper.addEventListener("change", () => toPaper(paper.matches));
addEventListener("beforeprint", () => toPaper(true));
addEventListener("afterprint", () => toPaper(false));
if (printing) plots.forEach(draw);

// ---- the ledger

const filters = [...document.querySelectorAll(".filters select")];
const rows = [...document.querySelectorAll("#ledger tbody tr")];

function filterLedger() {
  const chosen = filters.filter((filter) => filter.value);
  let shown = 0;
  for (const row of rows) {
    row.hidden = !chosen.every((filter) => row.cells[filter.dataset.column].textContent === filter.value);
    shown += !row.hidden;
  }
  const which = chosen.map((filter) => `${filter.name} ${filter.value}`).join(", ");
  document.getElementById("shown").textContent = `${shown} of ${rows.length} verdicts${which && `: ${which}`}`;
}

// The address names the filters, so that a view can be linked.
function fromAddress() {
  const named = new URLSearchParams(location.hash.slice(1));
  if (!filters.some((filter) => named.has(filter.name))) return;
  for (const filter of filters) {
    filter.value = named.get(filter.name) ?? "";
    if (filter.selectedIndex < 0) filter.value = ""; // no such value
  }
  filterLedger();
  document.querySelector(".filters").scrollIntoView();
}

function toAddress() {
  const named = new URLSearchParams(filters.filter((filter) => filter.value).map((filter) => [filter.name, filter.value]));
  history.replaceState(null, "", `#${named.size ? named : "claims"}`);
  filterLedger();
}

if (filters.length) {
  filterLedger();
  fromAddress();
  addEventListener("hashchange", fromAddress);
  document.querySelector(".filters").addEventListener("change", toAddress);
  document.querySelector(".filters").addEventListener("reset", () => setTimeout(toAddress));
}
