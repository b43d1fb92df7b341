// One head of one checkpoint at a time; all heads' routes above it, all checkpoints' below it.
const SIDES = ["forward", "reverse"], STROKES = { forward: "solid", reverse: "dash" };
const layer = element("layer"), head = element("head"), slider = element("checkpoint");
const most = data.checkpoints.flatMap(({ route }) => SIDES.map((side) => route[side])).flat(3)
  .reduce((one, other) => Math.max(one, other), 1e-6);  // of all routes: one range of colours for all

function checkpoint() {
  return data.checkpoints[slider ? slider.value : 0];
}

function when() {
  return slider ? `, step ${data.steps[slider.value]}` : "";
}

function chosen() {
  return `layer ${data.layers[layer.value]}, head ${data.heads[head.value]}`;
}

// Of one number for each layer and head, the chosen head's.
function ofHead(numbers) {
  return numbers[layer.value][head.value];
}

function drawRoutes(side) {
  const z = checkpoint().route[side], at = (select) => [Number(select.value), Number(select.value)];
  const scale = { orientation: "h", y: 0, yref: "container", yanchor: "bottom", thickness: 10, len: 1, nticks: 5 };
  mapHeads(element(`${side}-routes`), `Route of every head, ${side} query${when()}; ${chosen()}: ${written(ofHead(z))}`,
    data, z, most, scale, [framed(at(head), at(layer), COLOURS.fact)]);
}

// What one position reads of the chosen head, [row token].
function patternOf(side) {
  const { tokens, rows } = data[side], n = tokens.length, all = unpacked(checkpoint().patterns[side][layer.value]);
  return rows.map((_, at) => all.subarray((head.value * rows.length + at) * n, (head.value * rows.length + at + 1) * n));
}

function readoutRows(side) {
  return data[side].readout.map((position) => data[side].rows.indexOf(position));
}

function drawPatternOf(side, pattern) {
  plotPattern(element(`${side}-pattern`), `Attention of ${chosen()}, ${side} query${when()}`, data[side], pattern, data.reach);
}

// The readouts' attention, mean over them: as it adds up to the route.
function drawTokens(side, pattern) {
  const read = readoutRows(side).map((at) => pattern[at]), list = element(`${side}-tokens`);
  const mean = Array.from(read[0], (_, to) => read.reduce((sum, row) => sum + row[to], 0) / read.length);
  colourTokens(list, mean, null);
  data[side].readout.forEach((position) => list.children[position].classList.add("from"));
  element(`${side}-said`).textContent =
    `${side}: the readout gives the source ${written(ofHead(checkpoint().route[side]))} of its attention`;
}

function drawNumbers() {
  const { route, evidence, probability, parity, reason } = checkpoint();
  const both = (numbers) => SIDES.map((side) => written(ofHead(numbers[side])));
  const lines = [
    ["probability of the answer", ...SIDES.map((side) => written(probability[side]))],
    ["route: share of attention", ...both(route)],
    ["evidence toward the answer", ...both(evidence)],
  ];
  element("numbers").replaceChildren(...lines.map(([name, ...numbers]) => {
    const row = document.createElement("tr"), title = document.createElement("th");
    title.scope = "row";
    title.textContent = name;
    row.append(title, ...numbers.map((number) => Object.assign(document.createElement("td"), { textContent: number })));
    return row;
  }));
  element("parity").textContent = parity
    ? `The even part, the same to both sides, is ${written(ofHead(parity.even))}; the odd part, positive where the ` +
      `source draws more from the right, is ${written(ofHead(parity.odd))}. Direction selectivity, odd² / (even² + ` +
      `odd²): ${written(ofHead(parity.selectivity))}.`
    : `Undefined. ${reason}`;
  drawBars(route, evidence, parity);
}

function drawBars(route, evidence, parity) {
  const bar = (x, y, axis, colours) => ({ type: "bar", x, y, xaxis: `x${axis}`, yaxis: `y${axis}`, hoverinfo: "y",
    marker: { color: colours, pattern: { shape: ["", "/"] }, line: { color: INK, width: 1 } }, showlegend: false });
  const coloursOf = (names) => names.map((name) => COLOURS[name]);
  const bars = [[route, ""], [evidence, "2"]].map(([numbers, axis]) =>
    bar(SIDES, SIDES.map((side) => ofHead(numbers[side])), axis, coloursOf(SIDES)));
  if (parity) bars.push(bar(PARTS, PARTS.map((part) => ofHead(parity[part])), "3", coloursOf(PARTS)));
  const titles = ["route", "evidence", "score"].slice(0, bars.length), names = { tickangle: 0, tickfont: { size: 10 } };
  const values = { ...AXIS, zeroline: true, zerolinecolor: INK }, places = ["", "2", "3"];
  plot(element("bars"), `Route, evidence and parity of ${chosen()}${when()}, as in the table and the text`, bars, {
    height: 200, margin: { l: 10, r: 10, t: 30, b: 10 },
    grid: { rows: 1, columns: bars.length, pattern: "independent", xgap: 0.35 },
    ...Object.fromEntries(places.map((at) => [`xaxis${at}`, { ...AXIS, ...names }])),
    ...Object.fromEntries(places.map((at) => [`yaxis${at}`, { ...values, range: at ? undefined : [0, 1] }])),
    annotations: titles.map((text, at) => ({ text, showarrow: false, yref: "paper", y: 1, yanchor: "bottom",
      xref: `x${places[at]} domain`, x: 0.5 })),
  });
}

function drawCurves() {
  const x = data.steps.map(LOGARITHMIC), now = LOGARITHMIC(data.steps[slider.value]);
  const curve = (place, label, y, highest) => {
    const curves = SIDES.map((side) => ({ x, y: y(side), name: side, mode: "lines+markers",
      text: data.steps.map((step) => `${side}, step ${step}`), hovertemplate: "%{text}: %{y:.4f}<extra></extra>",
      line: { color: COLOURS[side], dash: STROKES[side] },
      marker: { symbol: side === "forward" ? "circle" : "square-open", size: 7 } }));
    plot(element(place), label, curves, {
      height: 300, legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" }, margin: { l: 10, r: 10, t: 30, b: 10 },
      xaxis: stepsAxis(data.steps),
      yaxis: { range: [-0.03 * highest, highest * 1.05], showgrid: true },
      shapes: [{ type: "line", x0: now, x1: now, yref: "paper", y0: 0, y1: 1, line: { color: INK, width: 2, dash: "dot" } }],
    });
  };
  curve("probabilities", "Probability of the answer over training, forward and reverse",
    (side) => data.checkpoints.map(({ probability }) => probability[side]), 1);
  curve("growth", `Route of ${chosen()} over training, forward and reverse`,
    (side) => data.checkpoints.map(({ route }) => ofHead(route[side])), most);
}

function draw() {
  element("chosen").textContent = chosen()[0].toUpperCase() + chosen().slice(1) + when();
  if (slider) {
    element("step").textContent = `step ${data.steps[slider.value]}`;
    slider.setAttribute("aria-valuetext", `step ${data.steps[slider.value]}`);
    drawCurves();
  }
  drawNumbers();
  for (const side of SIDES) {
    const pattern = patternOf(side);
    drawRoutes(side);
    drawTokens(side, pattern);
    drawPatternOf(side, pattern);
  }
}

choices(layer, data.layers.map((number, at) => [at, number]));
choices(head, data.heads.map((number, at) => [at, number]));
for (const side of SIDES) {
  const list = element(`${side}-tokens`);
  listTokens(list, data[side]);
  fillWalkable(list, [...list.children]);
}
// First the head with the strongest forward route at the end.
slider?.addEventListener("input", draw);
layer.addEventListener("change", draw);
head.addEventListener("change", draw);
const last = data.checkpoints.at(-1).route.forward, strongest = Math.max(...last.flat());
layer.value = Math.max(0, last.findIndex((row) => row.includes(strongest)));
head.value = Math.max(0, last[layer.value].indexOf(strongest));
draw();
walkHeads(element("maps"), layer, head);
if (slider) ["probabilities", "growth"].forEach((place) => onPoint(element(place), (at) => { slider.value = at; draw(); }));
SIDES.forEach((side) => onCell(element(`${side}-routes`), (x, y) => {
  layer.value = y;
  head.value = x;
  draw();
}));
