// A map of all settings, and of one place on it what was measured and how it was learnt.
const axis = element("axis"), setting = element("setting"), heads = element("heads"), quantity = element("quantity");
const { columns, cells } = data, axes = [...new Set(columns.map((column) => column.axis))];
let column = 0, row = 0;

// The columns of an axis, after what they differ from.
function columnsOf(name) {
  return [...columns.keys()].filter((at) => columns[at].axis === name || columns[at].axis === "");
}

function cellAt(x, y) {
  return cells[`${x},${y}`];
}

function valueAt(x, y) {
  return cellAt(x, y)?.values[quantity.value] ?? null;
}

function drawMap() {
  const every = (cell) => data.heads.map((_, y) => columns.map((_, x) => cell(x, y)));
  const said = (x, y) => escaped(`${columns[x].setting}, heads ${data.heads[y]}: ${cellAt(x, y) ? written(valueAt(x, y)) : "not measured"}`);
  const map = { type: "heatmap", z: every(valueAt), zmin: -1, zmax: 1, xgap: 1, ygap: 1, hoverinfo: "text",
    colorscale: SIGNED, hovertext: every(said),
    texttemplate: "%{z:.2f}", colorbar: { thickness: 10 } };
  const missing = { type: "heatmap", z: every((x, y) => (cellAt(x, y) ? null : 1)), xgap: 1, ygap: 1, showscale: false,
    hoverinfo: "skip", colorscale: [[0, "#dddddd"], [1, "#dddddd"]] };
  const place = element("map");
  const width = Math.max(place.parentElement.clientWidth - 4, 120 + 42 * columns.length);
  place.style.width = `${width}px`;
  plot(place, `${data.quantities[quantity.value]} by setting and number of heads`, [map, missing], {
    width, height: 190 + 30 * data.heads.length, shapes: [framed([column, column], [row, row], COLOURS.fact)],
    xaxis: { tickvals: [...columns.keys()], ticktext: columns.map(({ setting }) => escaped(setting)), tickangle: 60 },
    yaxis: { tickvals: [...data.heads.keys()], ticktext: data.heads.map(String), title: { text: "heads" }, autorange: "reversed" },
  });
}

function drawCurves(cell) {
  const { step = [], forward = [], reverse = [] } = cell?.curves ?? {};
  const line = (name, y, dash) => ({ x: step, y, name, type: "scatter", mode: "lines", line: { color: COLOURS[name], dash } });
  plot(element("curves"), "Forward and reverse probability over training", [line("forward", forward, "solid"), line("reverse", reverse, "dash")], {
    height: 260, xaxis: { type: "log", title: { text: "training step" } }, yaxis: { range: [-0.03, 1.03], showgrid: true },
    showlegend: true, legend: { orientation: "h", y: 1.15 },
  });
}

function drawHere() {
  const cell = cellAt(column, row), name = `${columns[column].setting}, ${data.heads[row]} ${data.heads[row] === 1 ? "head" : "heads"}`;
  element("here").textContent = cell ? name : `${name}: not measured`;
  listValues(element("values"), cell ? data.quantities.map((text, at) => `${written(cell.values[at])}  ${text}`) : []);
  listValues(element("runs"), cell ? cell.runs : []);
  const inside = element("inside");
  inside.replaceChildren();
  if (cell?.inside) {
    const link = document.createElement("a");
    link.href = cell.inside;
    link.textContent = "Routes of the first run, over its training";
    inside.append(link);
  }
  drawCurves(cell);
}

function go(x, y) {
  [column, row] = [x, y];
  if (columns[x].axis && columns[x].axis !== axis.value) axis.value = columns[x].axis;
  const of = columnsOf(axis.value);
  setting.max = of.length - 1;
  setting.value = of.indexOf(x);
  heads.max = data.heads.length - 1;
  heads.value = y;
  element("setting-said").textContent = columns[x].setting;
  element("heads-said").textContent = String(data.heads[y]);
  setting.setAttribute("aria-valuetext", columns[x].setting);
  heads.setAttribute("aria-valuetext", String(data.heads[y]));
  drawMap();
  drawHere();
}

choices(axis, axes.filter((name) => name || axes.length === 1).map((name) => [name, name || "one setting"]));
choices(quantity, data.quantities.map((text, at) => [at, text]));
axis.addEventListener("change", () => go(columnsOf(axis.value)[0], row));
setting.addEventListener("input", () => go(columnsOf(axis.value)[Number(setting.value)], row));
heads.addEventListener("input", () => go(column, Number(heads.value)));
quantity.addEventListener("change", drawMap);
go(0, 0);
onCell(element("map"), go);
