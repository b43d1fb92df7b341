// All steps at once; of one filled position, what was predicted and what its readout looked at.
const n = data.tokens.length, nSteps = data.filled.at(-1).step, nHeads = data.heads.length;
const MANY_CELLS = 5000;  // more texts than these take a browser seconds
const step = element("step"), position = element("position"), layer = element("layer"), head = element("head");
const filledAt = new Map(data.filled.map((one) => [one.position, one]));
const known = data.source ? Array.from({ length: data.source[1] - data.source[0] }, (_, i) => data.source[0] + i)
  : [...data.tokens.keys()].filter((at) => !filledAt.has(at));

// The token at a position after so many steps.
function tokenAt(at, after) {
  const one = filledAt.get(at);
  return one && one.step <= after ? one.token : data.tokens[at];
}

function readable(text) {
  return text.replaceAll("\n", "⏎");
}

function chosen() {
  return filledAt.get(Number(position.value));
}

function named(one) {
  return `“${readable(one.token)}” at position ${one.position}, filled in step ${one.step} of ${nSteps} with probability ${one.probability.toFixed(4)}`;
}

// What there is to say of a cell.
function saidOf(at, after) {
  const one = filledAt.get(at), here = `after step ${after}, position ${at}: ${readable(tokenAt(at, after))}`;
  if (!one) return escaped(`${here}, given`);
  if (one.step <= after) return escaped(`${here}, filled in step ${one.step} with probability ${one.probability.toFixed(4)}`);
  const { positions, tokens, probabilities } = data.favourites[after], i = positions.indexOf(at);
  return escaped(`${here}; then likeliest: ${readable(tokens[i])} (${probabilities[i].toFixed(4)})`);
}

function drawSteps() {
  const rows = Array.from({ length: nSteps + 1 }, (_, after) => after), columns = [...data.tokens.keys()];
  const every = (cell) => rows.map((after) => columns.map((at) => cell(at, after)));
  const z = every((at, after) => (filledAt.has(at) && filledAt.get(at).step <= after ? filledAt.get(at).probability : null));
  const map = { type: "heatmap", x: columns, y: rows, z, zmin: 0, zmax: 1, colorscale: SHADES, xgap: 1, ygap: 1,
    hoverinfo: "text", hovertext: every(saidOf), colorbar: { thickness: 10, title: { text: "probability", side: "right" } } };
  // Of many cells, only those with something new.
  const isNew = (at, after) => after === 0 || filledAt.get(at)?.step === after;
  const cells = rows.flatMap((after) => columns.map((at) => ({ at, after })))
    .filter(({ at, after }) => rows.length * n <= MANY_CELLS || isNew(at, after));
  const colourOf = ({ at, after }) => (!filledAt.has(at) ? FAINT : z[after][at] > DARK ? "#ffffff" : INK);
  const words = { type: "scatter", mode: "text", x: cells.map(({ at }) => at), y: cells.map(({ after }) => after),
    text: cells.map(({ at, after }) => brief(readable(tokenAt(at, after)), 10)), hoverinfo: "skip",
    textfont: { size: 12, color: cells.map(colourOf) } };
  const longest = Math.max(...columns.flatMap((at) => [data.tokens[at], tokenAt(at, nSteps)]).map((text) => [...text].length));
  const room = element("steps").parentElement.clientWidth - 4;
  const width = Math.max(room, 120 + n * Math.max(30, 7.5 * Math.min(longest, 10) + 10));
  const name = (at) => marksOf({ ...data, readout: [] }, at).map((mark) => MARKS[mark]).join("") + at;
  element("steps").style.width = `${width}px`;
  plot(element("steps"), "", [map, words], {
    width, height: 90 + 24 * (nSteps + 1),
    xaxis: { title: { text: "position" }, tickvals: columns, ticktext: columns.map(name), range: [-0.5, n - 0.5], tickangle: 0, side: "top" },
    yaxis: { title: { text: "after step" }, range: [nSteps + 0.5, -0.5], tickvals: rows },
  });
}

// Frames the chosen step and the cell it filled, and brings them into view.
function frame(one) {
  const place = element("steps"), window = place.parentElement, { width } = place.getBoundingClientRect();
  place.setAttribute("aria-label", `Tokens after each step. Chosen: ${named(one)}`);
  const cell = framed([one.position, one.position], [one.step, one.step], COLOURS.fact);
  Plotly.relayout(place, { shapes: [framed([0, n - 1], [one.step, one.step], FAINT, "dot"), cell] });
  const x = (width * (one.position + 0.5)) / n, y = 60 + 24 * one.step;
  if (x < window.scrollLeft + 60 || x > window.scrollLeft + window.clientWidth - 60) window.scrollLeft = x - window.clientWidth / 2;
  if (y < window.scrollTop + 60 || y > window.scrollTop + window.clientHeight - 40) window.scrollTop = y - window.clientHeight / 2;
}

// The share of each token, mean over the chosen layers and heads.
function sharesOf(one, layers, heads) {
  const all = unpacked(one.read), sum = new Float64Array(n);
  for (const l of layers) for (const h of heads) for (let at = 0; at < n; at++) sum[at] += all[(l * nHeads + h) * n + at];
  return Array.from(sum, (total) => total / (layers.length * heads.length));
}

function picked(select, numbers) {
  return select.value === "all" ? [...numbers.keys()] : [Number(select.value)];
}

function drawReading() {
  const one = chosen(), layers = picked(layer, data.layers), heads = picked(head, data.heads);
  const shares = sharesOf(one, layers, heads), highest = Math.max(...shares), before = one.step - 1;
  const still = data.masks.filter((at) => filledAt.get(at).step > before);
  const state = { tokens: [...data.tokens.keys()].map((at) => tokenAt(at, before)), masks: still, readout: [one.readout],
    source: data.source, answer: data.answer };
  listTokens(element("tokens"), state, (at) => filledAt.has(at) && choose(at));
  colourTokens(element("tokens"), shares, one.position, highest);
  element("chosen").textContent = named(one);
  element("highest").textContent = highest.toFixed(3);
  listValues(element("top"), one.top.map((token, i) => `${one.probabilities[i].toFixed(4)}  ${readable(token)}`));
  const most = [...shares.keys()].sort((a, b) => shares[b] - shares[a]).slice(0, 8);
  listValues(element("read"), most.map((at) => `${shares[at].toFixed(4)}  ${labelOf(state, at)} (${at})`));
  drawHeads(one);
}

function drawHeads(one) {
  const z = data.layers.map((_, l) => data.heads.map((_, h) => {
    const shares = sharesOf(one, [l], [h]);
    return Number(known.reduce((sum, at) => sum + shares[at], 0).toFixed(5));
  }));
  const what = data.source ? "the source" : "the tokens given from the start", highest = Math.max(...z.flat());
  element("map-said").textContent =
    `Share of the readout's attention that goes to ${what}, by layer and head: click a cell or use arrow keys to choose it`;
  const single = layer.value !== "all" && head.value !== "all";
  const frames = single ? [framed([+head.value, +head.value], [+layer.value, +layer.value], COLOURS.fact)] : [];
  mapHeads(element("heads"), `Attention to ${what}, highest ${written(highest)}`, data, z, 1, { thickness: 10 }, frames);
}

function drawFavourites() {
  const one = chosen(), x = [], y = [], text = [];
  data.favourites.slice(0, one.step).forEach(({ positions, tokens, probabilities }, at) => {
    const i = positions.indexOf(one.position);
    x.push(at + 1);
    y.push(probabilities[i]);
    text.push(escaped(readable(tokens[i])));
  });
  plot(element("favourites"), `Probability of the likeliest token at position ${one.position}, step by step`,
    [{ x, y, text, type: "scatter", mode: "lines+markers", line: { color: INK }, hovertemplate: "step %{x}: %{text}, %{y:.4f}<extra></extra>" }],
    { height: 220, xaxis: { title: { text: "step" }, range: [0.5, nSteps + 0.5], dtick: Math.ceil(nSteps / 10) }, yaxis: { range: [-0.03, 1.05], showgrid: true } });
}

function draw() {
  const one = chosen();
  step.value = one.step;
  step.setAttribute("aria-valuetext", `step ${one.step}`);
  element("step-said").textContent = `step ${one.step} of ${nSteps}`;
  frame(one);
  drawReading();
  drawFavourites();
}

function choose(at) {
  position.value = at;
  draw();
}

choices(position, data.filled.map((one) => [one.position, `${one.position}: ${readable(one.token)}`]));
choices(layer, [["all", "all, mean"], ...data.layers.map((number, at) => [at, number])]);
choices(head, [["all", "all, mean"], ...data.heads.map((number, at) => [at, number])]);
step.addEventListener("input", () => choose(data.filled.find((one) => one.step === Number(step.value)).position));
position.addEventListener("change", draw);
layer.addEventListener("change", drawReading);
head.addEventListener("change", drawReading);
// First the answer's first token or, without an answer, the first that is a word: a full stop says little.
const isAnswer = (one) => one.position === data.answer?.[0], isWord = (one) => /[\p{L}\p{N}]/u.test(one.token);
position.value = (data.filled.find(isAnswer) ?? data.filled.find(isWord) ?? data.filled[0]).position;
drawSteps();
draw();
walkHeads(element("map"), layer, head);
onCell(element("steps"), (at) => filledAt.has(at) && choose(at));
onCell(element("heads"), (x, y) => {
  layer.value = y;
  head.value = x;
  drawReading();
});
