// One head of one state of a model, or of two side by side; everything on the page follows from the controls' values.
const SIDES = ["forward", "reverse"], STROKES = { forward: "solid", reverse: "dash" }, NOTHING = "-1";
const pair = element("pair"), layer = element("layer"), head = element("head"), score = element("score");
const average = element("average"), search = element("search"), pickers = { shown: element("shown"), other: element("other") };
const CODE = element("code").textContent;
const ABOUT = Object.fromEntries(data.scores.map(({ name, about }) => [name, about]));
const UP_TO = 60;  // how many heads the table lists
const firstState = data.series.map((_, at) => data.series.slice(0, at).reduce((sum, { steps }) => sum + (steps.length || 1), 0));
const LETTERS = { shown: "A", other: "B", difference: "A less B" };  // where two are compared; their names are in the controls
let sorted = { by: null, up: true };  // the column of the table, a score, or none for layer and head

// ---- states: a model at a step

function stateOf(which) {
  const series = Number(pickers[which].value);
  return series < 0 ? null : data.states[firstState[series] + Number(element(`${which}-at`).value)];
}

function nameOf(which) {
  if (which === "difference") return `${nameOf("shown")} less ${nameOf("other")}`;
  const { name, steps } = data.series[pickers[which].value];
  return steps.length ? `${name}, step ${steps[element(`${which}-at`).value]}` : name;
}

// What is shown, one or two of [slot, state].
function states() {
  return Object.keys(pickers).map((which) => [which, stateOf(which)]).filter(([, state]) => state);
}

function chosen() {
  return `layer ${data.layers[layer.value]}, head ${data.heads[head.value]}`;
}

function onePair() {
  return data.pairs[pair.value];
}

// Whether a score is one number of a layer, repeated for its heads.
function ofLayers(name) {
  return data.of_layers.includes(name);
}

// The scores of all heads, [layer head], as the form wants them; undefined where a state has none.
function scoresOf(state, name) {
  return average.checked ? state.overall[name] : state.scores[name]?.[pair.value];
}

function ofHead(numbers) {
  return numbers?.[layer.value][head.value] ?? null;
}

// By how much numbers are more than others, in lists of any depth; nothing where one has none.
function less(one, other) {
  if (one == null || other == null) return null;
  return typeof one === "number" ? one - other : Array.from(one, (value, at) => less(value, other[at]));
}

// The largest of numbers in lists of any depth, whatever their sign.
function largest(numbers) {
  return numbers.flat(Infinity).reduce((most, value) => Math.max(most, Math.abs(value ?? 0)), 1e-6);
}

// ---- parts of the page

// Gives a part its figures, by name, and keeps those that were there: Plotly draws faster where it has drawn.
function figures(part, captions) {
  const there = new Map([...element(part).children].map((figure) => [figure.id, figure]));
  const wanted = Object.entries(captions).map(([name, caption]) => {
    const id = `${part}-${name}`;
    const figure = there.get(id) ?? Object.assign(document.createElement("figure"), { id });
    if (!figure.children.length) figure.append(document.createElement("figcaption"), document.createElement("div"));
    figure.firstChild.textContent = caption;
    return figure;
  });
  if (wanted.length !== there.size || wanted.some(({ id }) => !there.has(id))) element(part).replaceChildren(...wanted);
  return Object.fromEntries(Object.keys(captions).map((name, at) => [name, wanted[at].lastChild]));
}

// Fills a table: heads as texts, rows as lists of texts; `pick`, if there is one, is told which row was chosen: arrow keys
// go from row to row.
function fillTable(table, heads, rows, pick, isChosen = () => false) {
  const cell = (row, text, tag) => Object.assign(row.appendChild(document.createElement(tag)), { textContent: text });
  table.deleteTHead();
  const top = table.createTHead().insertRow(), body = table.tBodies[0] ?? table.createTBody();
  heads.forEach((text) => (cell(top, text, "th").scope = "col"));
  const items = rows.map((texts, at) => {
    const row = document.createElement("tr");
    texts.forEach((text, column) => (column ? cell(row, text, "td") : (cell(row, text, "th").scope = "row")));
    row.classList.toggle("chosen", isChosen(at));
    if (pick) {
      row.addEventListener("click", () => pick(at));
      row.addEventListener("keydown", ({ key }) => key === "Enter" && pick(at));
    }
    return row;
  });
  if (pick) fillWalkable(body, items);
  else body.replaceChildren(...items);
  return top;
}

function withSides(each) {
  return Object.fromEntries(states().flatMap(([which]) => SIDES.map((side) => [`${which}-${side}`, each(which, side)])));
}

function beside(which, text) {
  return states().length > 1 ? `${LETTERS[which]}, ${text}` : text;
}

// Gives a part the figures of each kind: one for every state that has the numbers that `read` finds, and one for the
// difference of two. `draw` is told where to draw which numbers of which slot, and the largest number of both states.
function compare(part, kinds, read, draw) {
  const figured = Object.entries(kinds).flatMap(([kind, text]) => {
    const found = states().map(([which, state]) => [which, read(state, kind)]).filter(([, numbers]) => numbers);
    const both = found.map(([, numbers]) => numbers);
    if (both.length === 2) found.push(["difference", less(...both)]);
    const most = (which, numbers) => largest(which === "difference" ? numbers : both);
    return found.map(([which, numbers]) => ({ which, kind, text, numbers, both, most: most(which, numbers) }));
  });
  const name = ({ which, kind }) => (kind ? `${which}-${kind}` : which);
  const places = figures(part, Object.fromEntries(figured.map((one) => [name(one), beside(one.which, one.text)])));
  element(part).classList.toggle("three", figured.some(({ which }) => which === "difference"));
  figured.forEach((one) => draw(places[name(one)], one));
}

// ---- the map and the table of heads

function drawMaps() {
  const name = score.value, missing = states().find(([, state]) => !scoresOf(state, name)), whole = ofLayers(name);
  element("score-said").textContent = missing ? `Undefined in ${nameOf(missing[0])}: ${missing[1].undefined[name]}`
    : `${name}: ${ABOUT[name]}.${whole ? " One number of the whole layer, none of a head's own." : ""}`;
  const at = (select) => [Number(select.value), Number(select.value)];
  compare("maps", { "": name }, (state) => scoresOf(state, name), (place, { which, numbers, both, most }) => {
    const signed = which === "difference" || both.flat(2).some((value) => value < 0);
    const map = whole ? { layers: data.layers, heads: ["all heads"] } : data;
    mapHeads(place, `${name} of every ${whole ? "layer" : "head"}, ${nameOf(which)}; ${chosen()}: ${written(ofHead(numbers))}`, map,
      whole ? numbers.map((row) => [row[0]]) : numbers, most, { thickness: 10 }, [framed(whole ? [0, 0] : at(head), at(layer), COLOURS.fact)], signed);
  });
}

function drawRanking() {
  const state = stateOf("shown"), names = Object.keys(ABOUT).filter((name) => state.overall[name]);
  const heads = data.layers.flatMap((_, l) => data.heads.map((_, h) => [l, h]));
  const value = (name, [l, h]) => scoresOf(state, name)[l][h], sign = sorted.up ? 1 : -1, last = sign * Infinity;  // what is undefined
  if (sorted.by !== null) heads.sort((one, other) => sign * ((value(sorted.by, one) ?? last) - (value(sorted.by, other) ?? last)) || 0);
  else if (!sorted.up) heads.reverse();
  const listed = heads.slice(0, UP_TO);
  const rows = listed.map(([l, h]) => [`${data.layers[l]}.${data.heads[h]}`, ...names.map((name) => written(value(name, [l, h])))]);
  const choose = (at) => { [layer.value, head.value] = listed[at]; draw(); };
  const top = fillTable(element("ranking"), ["", ...names], rows, choose,
    (at) => listed[at][0] === Number(layer.value) && listed[at][1] === Number(head.value));
  [...top.cells].forEach((cell, column) => {
    const by = column ? names[column - 1] : null, button = document.createElement("button");
    button.type = "button";
    button.textContent = column ? `${by}${ofLayers(by) ? ", of the layer" : ""}` : `layer.head${heads.length > UP_TO ? `, ${UP_TO} of ${heads.length}` : ""}`;
    button.addEventListener("click", () => {
      sorted = by === sorted.by ? { by, up: !sorted.up } : { by, up: by === null };
      draw();
      element("ranking").tHead.rows[0].cells[column].firstChild.focus();
    });
    cell.setAttribute("aria-sort", by !== sorted.by ? "none" : sorted.up ? "ascending" : "descending");
    cell.replaceChildren(button);
  });
}

// ---- the chosen head

function drawScores() {
  const both = states(), columns = both.flatMap(([which]) => [beside(which, "this fact"), beside(which, "all facts")]);
  const numbers = (state, name) => [ofHead(state.scores[name]?.[pair.value]), ofHead(state.overall[name])];
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const rows = [...SIDES.map((side) => [`${side} probability of the answer`, (state) => [state.probability[side][pair.value], mean(state.probability[side])]]),
    ...Object.keys(ABOUT).map((name) => [`${name}${ofLayers(name) ? ", of the layer" : ""}`, (state) => numbers(state, name)])];
  fillTable(element("scores"), ["", ...columns, ...(both.length > 1 ? [beside("difference", "all facts")] : [])], rows.map(([name, read]) => {
    const values = both.map(([, state]) => read(state)), apart = values.length > 1 ? [less(values[0][1], values[1][1])] : [];
    return [name, ...values.flat().map(written), ...apart.map(written)];
  }));
}

function drawPatterns() {
  const read = (state, side) => {
    const { rows, tokens } = onePair()[side], all = unpacked(state.patterns[side][pair.value][layer.value]), n = tokens.length;
    return rows.map((_, at) => Array.from(all.subarray((head.value * rows.length + at) * n, (head.value * rows.length + at + 1) * n)));
  };
  compare("patterns", { forward: "forward query", reverse: "reverse query" }, read, (place, { which, kind, numbers, most }) => {
    const apart = which === "difference" ? most : null, reach = apart === null ? data.series[pickers[which].value].reach : null;
    plotPattern(place, `Attention of ${chosen()}, ${kind} query, ${nameOf(which)}`, onePair()[kind], numbers, reach, apart);
  });
}

// The even and the odd part of the chosen head's score in each plane.
function planesOf({ planes }) {
  return planes && PARTS.map((part) => {
    const all = unpackedSigned(planes[part][pair.value]), count = all.length / data.layers.length / data.heads.length;
    const start = (layer.value * data.heads.length + Number(head.value)) * count;
    return Array.from(all.subarray(start, start + count));
  });
}

function drawPlanes() {
  const without = states().filter(([, state]) => !state.planes);
  element("no-planes").textContent = without.map(([which, state]) => beside(which, state.no_planes)).join(" ");
  compare("planes", { "": onePair().name }, planesOf, (place, { which, numbers, most }) => {
    const wavelengths = data.series[pickers[which === "other" ? "other" : "shown"].value].wavelengths;
    const length = (at) => (at < wavelengths.length ? `wavelength ${written(wavelengths[at])}` : "does not rotate");
    const bars = PARTS.map((part, at) => ({ type: "bar", name: part, x: [...numbers[at].keys()], y: numbers[at], hoverinfo: "text",
      hovertext: numbers[at].map((value, plane) => `plane ${plane}, ${length(plane)}: ${part} ${written(value)}`), marker: PART_MARKS[part] }));
    plot(place, `Even and odd part of the score of ${chosen()} in each plane, ${nameOf(which)}`, bars, {
      height: 260, legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" }, xaxis: { title: { text: "plane, from the fastest" } },
      yaxis: { zeroline: true, zerolinecolor: INK, title: { text: "score" }, ...(states().length > 1 ? { range: [-1.05 * most, 1.05 * most] } : {}) },
    });
  });
}

const MAPS = { evidence: "evidence", right: "score, to the right", left: "score, to the left" };

function drawTokenMaps() {
  const found = [...data.tokens.keys()].filter((at) => data.tokens[at].toLowerCase().includes(search.value.toLowerCase()));
  const texts = found.map((at) => brief(data.tokens[at])), n = data.tokens.length, start = head.value * n * n;
  const read = ({ maps }, kind) => {
    const all = maps[kind] && unpackedSigned(maps[kind][layer.value]);
    return all && found.map((row) => Array.from(all.subarray(start + row * n, start + (row + 1) * n)));
  };
  compare("token-maps", MAPS, read, (place, { which, kind, numbers, most }) => {
    const said = numbers.map((row, at) => row.map((value, column) =>
      escaped(`${data.tokens[found[at]]} ${kind === "evidence" ? "from" : "reads"} ${data.tokens[column]}: ${written(value)}`)));
    const map = { type: "heatmap", z: numbers, zmin: -most, zmax: most, colorscale: SIGNED, hoverinfo: "text", hovertext: said, colorbar: { thickness: 10 } };
    const every = (labels) => ({ ...numbered(labels), tickfont: { size: 10 } });
    plot(place, `${MAPS[kind]} of ${chosen()}, token by token, ${nameOf(which)}`, [map], {
      height: 120 + Math.max(60, Math.min(14 * found.length, 420)),
      xaxis: { ...every(data.tokens.map((text) => brief(text))), tickangle: -90, title: { text: kind === "evidence" ? "read" : "key" } },
      yaxis: { ...every(texts), autorange: "reversed", title: { text: kind === "evidence" ? "raises" : "query" } },
    });
  });
}

function drawServed() {
  const { scores, probability } = stateOf("shown"), order = [...data.pairs.keys()];
  const served = (side, at) => ofHead(scores[`${side} attribution`]?.[at]);
  order.sort((one, other) => (served("forward", other) ?? -Infinity) - (served("forward", one) ?? -Infinity));
  const rows = order.map((at) => [data.pairs[at].name, ...SIDES.flatMap((side) => [written(served(side, at)), written(probability[side][at])])]);
  fillTable(element("served"), ["", ...SIDES.flatMap((side) => [`${side} attribution`, `${side} probability`])], rows,
    (at) => { pair.value = order[at]; draw(); }, (at) => order[at] === Number(pair.value));
}

// ---- the pair, whatever the head

function drawLens() {
  const places = figures("lens", withSides((which, side) => beside(which, `${side} query`)));
  for (const [which, state] of states()) for (const side of SIDES) {
    const prompt = onePair()[side], table = document.createElement("table"), layers = state.lens[side][pair.value];
    table.className = "numbers";
    const pairsOf = (flat) => flat.filter((_, at) => at % 2 === 0).map((token, at) => `${data.names[token]}  ${flat[2 * at + 1].toFixed(2)}`);
    fillTable(table, ["position", ...data.layers.map((number) => `after layer ${number}`)],
      prompt.tokens.map((_, position) => [`${position} ${labelOf(prompt, position)}`, ...layers.map((positions) => pairsOf(positions[position])[0])]));
    [...table.tBodies[0].rows].forEach((row, position) => {
      row.classList.toggle("chosen", prompt.readout.includes(position));
      layers.forEach((positions, at) => (row.cells[at + 1].title = pairsOf(positions[position]).join("\n")));
    });
    places[`${which}-${side}`].className = "scroll";
    places[`${which}-${side}`].replaceChildren(table);
  }
}

function drawDenoising() {
  const able = states().some(([, state]) => state.denoised.forward[pair.value].length);
  element("denoising-part").hidden = !able;
  if (!able) return;
  const places = figures("denoising", withSides((which, side) => beside(which, `${side} query`)));
  for (const [which, state] of states()) for (const side of SIDES) {
    const list = document.createElement("ol");
    list.className = "values";
    listValues(list, state.denoised[side][pair.value].map(([step, position, token, probability]) =>
      `step ${step}: ${data.names[token]} at position ${position}, probability ${probability.toFixed(4)}`));
    places[`${which}-${side}`].replaceChildren(list);
  }
}

function drawTraining() {
  const series = Number(pickers.shown.value), { steps } = data.series[series];
  element("training-part").hidden = steps.length < 2;
  if (steps.length < 2) return;
  const places = figures("training", { probability: "probability of the answer", score: `${score.value} of ${chosen()}` });
  const of = (read) => steps.map((_, at) => read(data.states[firstState[series] + at]));
  const curve = (name, y, color, dash) => ({ x: steps.map(LOGARITHMIC), y, name, mode: "lines+markers", line: { color, dash },
    text: steps.map((step) => `${name}, step ${step}`), hovertemplate: "%{text}: %{y:.4f}<extra></extra>", marker: { size: 7 } });
  const now = LOGARITHMIC(steps[element("shown-at").value]);
  const line = { type: "line", x0: now, x1: now, yref: "paper", y0: 0, y1: 1, line: { color: INK, width: 2, dash: "dot" } };
  const draws = {
    probability: SIDES.map((side) => curve(side, of((state) => state.probability[side][pair.value]), COLOURS[side], STROKES[side])),
    score: [curve(score.value, of((state) => ofHead(scoresOf(state, score.value))), INK, "solid")],
  };
  for (const [name, traces] of Object.entries(draws)) {
    const place = places[name];
    plot(place, `${name} over training`, traces, { height: 300, xaxis: stepsAxis(steps), shapes: [line],
      yaxis: { showgrid: true, ...(name === "probability" ? { range: [-0.03, 1.05] } : {}) }, showlegend: name === "probability",
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" } });
    if (!place.dataset.listens) {
      place.dataset.listens = "yes";
      onPoint(place, (at) => { element("shown-at").value = at; draw(); });
    }
  }
}

// ---- all of it, and where it is in the page's address

const LABELS = { shown: "model", other: "compare with" };
const DRAWN = [drawMaps, drawRanking, drawScores, drawPatterns, drawPlanes, drawTokenMaps, drawServed, drawLens, drawDenoising, drawTraining];

function draw() {
  for (const which of Object.keys(pickers)) {
    const series = Number(pickers[which].value), slider = element(`${which}-at`), steps = data.series[series]?.steps ?? [];
    slider.max = Math.max(steps.length - 1, 0);
    slider.hidden = steps.length < 2;
    element(`${which}-step`).textContent = steps.length ? `step ${steps[slider.value]}` : "";
    slider.setAttribute("aria-valuetext", element(`${which}-step`).textContent);
    element(`${which}-label`).textContent = beside(which, LABELS[which]);
  }
  element("chosen").textContent = `Layer ${data.layers[layer.value]}, head ${data.heads[head.value]}`;
  DRAWN.forEach((part) => part());
  keepAddress();
}

// The value of each control that the address holds, and how it is set.
const ADDRESS = {
  layer: [() => data.layers[layer.value], (text) => select(layer, data.layers.map(String).indexOf(text))],
  head: [() => data.heads[head.value], (text) => select(head, data.heads.map(String).indexOf(text))],
  pair: [() => pair.value, (text) => select(pair, text)],
  score: [() => score.value, (text) => select(score, text)],
  ...Object.fromEntries(Object.keys(pickers).flatMap((which) => [
    [which, [() => pickers[which].value, (text) => select(pickers[which], text)]],
    [which === "shown" ? "step" : "other-step", [() => data.series[pickers[which].value]?.steps[element(`${which}-at`).value],
      (text) => { element(`${which}-at`).value = nearest(data.series[pickers[which].value]?.steps ?? [], Number(text)); }]],
  ])),
};

// Where the number that is least far from a wanted one is.
function nearest(numbers, wanted) {
  const far = numbers.map((number) => Math.abs(number - wanted));
  return Math.max(0, far.indexOf(Math.min(...far)));
}

// Chooses the head that a score is highest for, at the step that is shown.
function chooseLeader(name) {
  const scores = stateOf("shown").overall[name];
  if (!scores) return;
  const best = scores.map((row) => Math.max(...row.map((value) => value ?? -Infinity))), most = Math.max(...best);
  layer.value = best.indexOf(most);
  head.value = Math.max(0, scores[layer.value].indexOf(most));
}

function select(control, value) {
  if ([...control.options].some((option) => option.value === String(value))) control.value = value;
}

function keepAddress() {
  const address = Object.entries(ADDRESS).map(([name, [read]]) => [name, read()]).filter(([, value]) => value !== undefined && (value !== NOTHING || data.series.length > 1));
  const hash = `#${new URLSearchParams(address)}`;
  if (!window.frameElement) history.replaceState(null, "", hash + (back ? `&${new URLSearchParams({ back })}` : ""));
  element("code").textContent = `${CODE}  # open it at ${hash}`;
}

function readAddress() {
  const address = new URLSearchParams(location.hash.slice(1));
  for (const [name, [, set]] of Object.entries(ADDRESS)) {
    if (name === "step" || name === "other-step") lastStep(name === "step" ? "shown" : "other");
    if (address.has(name)) set(address.get(name));
  }
  if (address.has("score") && !address.has("layer") && !address.has("head")) chooseLeader(score.value);
}

// Where the reader came from, if that is a page beside this one: an address may say anything.
const [back] = new URLSearchParams(location.hash.slice(1)).get("back")?.match(/^[\w-]+\.html(#.*)?$/) ?? [];
if (back) Object.assign(element("home") ?? {}, { href: back, textContent: `Back to the ${back.startsWith("index.") ? "report" : "figure"}` });

function lastStep(which) {
  const { steps = [] } = data.series[pickers[which].value] ?? {}, slider = element(`${which}-at`);
  slider.max = Math.max(steps.length - 1, 0);
  slider.value = slider.max;
}

choices(layer, data.layers.map((number, at) => [at, number]));
choices(head, data.heads.map((number, at) => [at, number]));
choices(pair, data.pairs.map(({ name }, at) => [at, name]));
choices(score, data.scores.map(({ name }) => [name, name]));
choices(pickers.shown, data.series.map(({ name }, at) => [at, name]));
choices(pickers.other, [[NOTHING, "nothing"], ...data.series.map(({ name }, at) => [at, name])]);
element("offset").textContent = data.offset === 1 ? "1 token" : `${data.offset} tokens`;
lastStep("shown");
chooseLeader("forward route");
if (data.series.length > 1) pickers.other.value = 1;
readAddress();
for (const control of [pair, layer, head, score, average]) control.addEventListener("change", draw);
for (const which of Object.keys(pickers)) {
  pickers[which].addEventListener("change", () => { lastStep(which); draw(); });
  element(`${which}-at`).addEventListener("input", draw);
}
search.addEventListener("input", drawTokenMaps);
walkHeads(element("maps"), layer, head);
element("maps").addEventListener("click", (event) => {
  const place = event.target.closest("figure")?.lastChild;
  if (place) atCell(place, event, (x, y) => { [head.value, layer.value] = [ofLayers(score.value) ? head.value : x, y]; draw(); });
});
window.addEventListener("hashchange", () => { readAddress(); draw(); });
draw();
