// One head of one state of a model, or of two side by side; everything on the page follows from the controls' values.
const SIDES = ["forward", "reverse"], STROKES = { forward: "solid", reverse: "dash" }, NOTHING = "-1";
const pair = element("pair"), layer = element("layer"), head = element("head"), score = element("score");
const average = element("average"), search = element("search"), pickers = { shown: element("shown"), other: element("other") };
const ABOUT = Object.fromEntries(data.scores.map(({ name, about }) => [name, about]));
const UP_TO = 60;  // how many heads the table lists
const firstState = data.series.map((_, at) => data.series.slice(0, at).reduce((sum, { steps }) => sum + (steps.length || 1), 0));
let sortedBy = null;  // the column of the table: a score, or none for layer and head

// ---- states: a model at a step

function stateOf(which) {
  const series = Number(pickers[which].value);
  return series < 0 ? null : data.states[firstState[series] + Number(element(`${which}-at`).value)];
}

function nameOf(which) {
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

// The scores of all heads, [layer head], as the form wants them; undefined where a state has none.
function scoresOf(state, name) {
  return average.checked ? state.overall[name] : state.scores[name]?.[pair.value];
}

function ofHead(numbers) {
  return numbers?.[layer.value][head.value] ?? null;
}

function difference(one, other) {
  return one && other && one.map((row, l) => row.map((value, h) => (value === null || other[l][h] === null ? null : value - other[l][h])));
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
  return states().length > 1 ? `${text}: ${nameOf(which)}` : text;
}

// ---- the map and the table of heads

function drawMaps() {
  const name = score.value, missing = states().find(([, state]) => !scoresOf(state, name));
  element("score-said").textContent = missing ? `Undefined in ${nameOf(missing[0])}: ${missing[1].undefined[name]}` : `${name}: ${ABOUT[name]}.`;
  const shown = states().filter(([, state]) => scoresOf(state, name)).map(([which, state]) => [which, nameOf(which), scoresOf(state, name)]);
  if (shown.length === 2) shown.push(["difference", `difference, ${nameOf("shown")} less ${nameOf("other")}`, difference(shown[0][2], shown[1][2])]);
  const places = figures("maps", Object.fromEntries(shown.map(([which, caption]) => [which, states().length > 1 ? caption : name])));
  const size = (z) => z.flat().reduce((most, value) => Math.max(most, Math.abs(value ?? 0)), 1e-6);
  const common = Math.max(...shown.slice(0, 2).map(([, , z]) => size(z)), 1e-6);
  for (const [which, caption, z] of shown) {
    const most = which === "difference" ? size(z) : common;
    const signed = which === "difference" || shown.some(([, , values]) => values.flat().some((value) => value < 0));
    const at = (select) => [Number(select.value), Number(select.value)];
    mapHeads(places[which], `${name} of every head, ${caption}; ${chosen()}: ${written(ofHead(z))}`, data, z, most,
      { thickness: 10 }, [framed(at(head), at(layer), signed ? INK : SOURCE)], signed);
  }
}

function drawRanking() {
  const state = stateOf("shown"), names = Object.keys(ABOUT).filter((name) => state.overall[name]);
  const heads = data.layers.flatMap((_, l) => data.heads.map((_, h) => [l, h]));
  const value = (name, [l, h]) => scoresOf(state, name)[l][h];
  if (sortedBy !== null) heads.sort((one, other) => (value(sortedBy, other) ?? -Infinity) - (value(sortedBy, one) ?? -Infinity));
  const listed = heads.slice(0, UP_TO);
  const rows = listed.map(([l, h]) => [`${data.layers[l]}.${data.heads[h]}`, ...names.map((name) => written(value(name, [l, h])))]);
  const choose = (at) => { [layer.value, head.value] = listed[at]; draw(); };
  const top = fillTable(element("ranking"), ["", ...names], rows, choose,
    (at) => listed[at][0] === Number(layer.value) && listed[at][1] === Number(head.value));
  [...top.cells].forEach((cell, column) => {
    const by = column ? names[column - 1] : null, button = document.createElement("button");
    button.type = "button";
    button.textContent = column ? by : `layer.head${heads.length > UP_TO ? `, ${UP_TO} of ${heads.length}` : ""}`;
    button.addEventListener("click", () => {
      sortedBy = by;
      draw();
      element("ranking").tHead.rows[0].cells[column].firstChild.focus();
    });
    cell.setAttribute("aria-sort", by === sortedBy ? (column ? "descending" : "ascending") : "none");
    cell.replaceChildren(button);
  });
}

// ---- the chosen head

function drawScores() {
  const both = states(), columns = both.flatMap(([which]) => [beside(which, "this fact"), beside(which, "all facts")]);
  const numbers = (state, name) => [ofHead(state.scores[name]?.[pair.value]), ofHead(state.overall[name])];
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const rows = [...SIDES.map((side) => [`${side} probability of the answer`, (state) => [state.probability[side][pair.value], mean(state.probability[side])]]),
    ...Object.keys(ABOUT).map((name) => [name, (state) => numbers(state, name)])];
  fillTable(element("scores"), ["", ...columns, ...(both.length > 1 ? ["difference, all facts"] : [])], rows.map(([name, read]) => {
    const values = both.map(([, state]) => read(state)), [one, other] = values.map((of) => of[1]);
    const apart = values.length > 1 ? [one === null || other === null ? "undefined" : written(one - other)] : [];
    return [name, ...values.flat().map(written), ...apart];
  }));
}

function drawPatterns() {
  const places = figures("patterns", withSides((which, side) => beside(which, `${side} query`)));
  for (const [which, state] of states()) for (const side of SIDES) {
    const prompt = onePair()[side], n = prompt.tokens.length, all = unpacked(state.patterns[side][pair.value][layer.value]);
    const start = head.value * prompt.rows.length;
    const pattern = prompt.rows.map((_, at) => all.subarray((start + at) * n, (start + at + 1) * n));
    plotPattern(places[`${which}-${side}`], `Attention of ${chosen()}, ${side} query, ${nameOf(which)}`, prompt, pattern, data.reach);
  }
}

function drawPlanes() {
  const able = states().filter(([, state]) => state.planes);
  element("planes-part").hidden = !data.wavelengths;
  element("no-planes").textContent = able.length ? "" : stateOf("shown").no_planes;
  const places = figures("planes", Object.fromEntries(able.map(([which]) => [which, beside(which, onePair().name)])));
  for (const [which, { planes }] of able) {
    const bars = Object.entries(planes).map(([part, of]) => {
      const all = unpackedSigned(of[pair.value]), count = all.length / data.layers.length / data.heads.length;
      const start = (layer.value * data.heads.length + Number(head.value)) * count, y = Array.from(all.subarray(start, start + count));
      const length = (at) => (at < data.wavelengths.length ? `wavelength ${written(data.wavelengths[at])}` : "does not rotate");
      return { type: "bar", name: part, x: [...y.keys()], y, hovertext: y.map((value, at) => `plane ${at}, ${length(at)}: ${part} ${written(value)}`),
        hoverinfo: "text", marker: part === "odd" ? { color: SOURCE, pattern: { shape: "/" } } : { color: FAINT } };
    });
    plot(places[which], `Even and odd part of the score of ${chosen()} in each plane, ${nameOf(which)}`, bars, {
      height: 260, legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" }, xaxis: { title: { text: "plane, from the fastest" } },
      yaxis: { zeroline: true, zerolinecolor: INK, title: { text: "score" } },
    });
  }
}

const MAPS = { evidence: "evidence", right: "score, to the right", left: "score, to the left" };

function drawTokenMaps() {
  const found = [...data.tokens.keys()].filter((at) => data.tokens[at].toLowerCase().includes(search.value.toLowerCase()));
  const texts = found.map((at) => brief(data.tokens[at])), whole = [...data.tokens.keys()];
  const captions = states().flatMap(([which, { maps }]) =>
    Object.keys(MAPS).filter((kind) => maps[kind]).map((kind) => [`${which}-${kind}`, beside(which, MAPS[kind])]));
  const places = figures("token-maps", Object.fromEntries(captions));
  for (const [which, { maps }] of states()) for (const [kind, of] of Object.entries(maps)) {
    const all = unpackedSigned(of[layer.value]), n = data.tokens.length, start = head.value * n * n;
    const z = found.map((row) => whole.map((column) => all[start + row * n + column]));
    const said = z.map((row, at) => row.map((value, column) =>
      escaped(`${data.tokens[found[at]]} ${kind === "evidence" ? "from" : "reads"} ${data.tokens[column]}: ${written(value)}`)));
    const most = Math.max(...z.flat().map(Math.abs), 1e-6);
    const map = { type: "heatmap", z, zmin: -most, zmax: most, colorscale: SIGNED, hoverinfo: "text", hovertext: said, colorbar: { thickness: 10 } };
    const every = (labels) => ({ ...numbered(labels), tickfont: { size: 10 } });
    plot(places[`${which}-${kind}`], `${MAPS[kind]} of ${chosen()}, token by token, ${nameOf(which)}`, [map], {
      height: 120 + Math.max(60, Math.min(14 * found.length, 420)),
      xaxis: { ...every(data.tokens.map((text) => brief(text))), tickangle: -90, title: { text: kind === "evidence" ? "read" : "key" } },
      yaxis: { ...every(texts), autorange: "reversed", title: { text: kind === "evidence" ? "raises" : "query" } },
    });
  }
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
    probability: SIDES.map((side) => curve(side, of((state) => state.probability[side][pair.value]), data.colours[side], STROKES[side])),
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

const DRAWN = [drawMaps, drawRanking, drawScores, drawPatterns, drawPlanes, drawTokenMaps, drawServed, drawLens, drawDenoising, drawTraining];

function draw() {
  for (const which of Object.keys(pickers)) {
    const series = Number(pickers[which].value), slider = element(`${which}-at`), steps = data.series[series]?.steps ?? [];
    slider.max = Math.max(steps.length - 1, 0);
    slider.hidden = steps.length < 2;
    element(`${which}-step`).textContent = steps.length ? `step ${steps[slider.value]}` : "";
    slider.setAttribute("aria-valuetext", element(`${which}-step`).textContent);
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
  const address = Object.entries(ADDRESS).map(([name, [read]]) => [name, read()]).filter(([, value]) => value !== undefined && value !== NOTHING);
  const hash = `#${new URLSearchParams(address)}`;
  if (!window.frameElement) history.replaceState(null, "", hash + (back ? `&${new URLSearchParams({ back })}` : ""));
  element("code").textContent = `${data.code}  # open it at ${hash}`;
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
  if (place) atCell(place, event, (x, y) => { [head.value, layer.value] = [x, y]; draw(); });
});
window.addEventListener("hashchange", () => { readAddress(); draw(); });
draw();
