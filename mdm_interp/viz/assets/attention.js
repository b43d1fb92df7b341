// One layer at a time: its heads small, one of them large, and what one row of that one reads.
const n = data.tokens.length, square = data.rows.length === n && n <= data.max_drawn;
const layer = element("layer"), head = element("head"), row = element("row"), stretch = element("stretch");
const HINT = element("hovered").textContent;
const HIDDEN = [200, 200, 200];  // what attention does not reach, in CircuitsVis' grey
let shares;  // of the chosen layer: [head row token]
let most = 1;  // which share has the full colour

function rowOf(headAt, rowAt) {
  const start = (headAt * data.rows.length + rowAt) * n;
  return shares.subarray(start, start + n);
}

function squareOf(headAt) {
  return data.rows.map((_, rowAt) => Array.from(rowOf(headAt, rowAt), (share) => Number(share.toFixed(5))));
}

function named(headAt) {
  return `layer ${data.layers[layer.value]}, head ${data.heads[headAt]}`;
}

function show(headAt) {
  const rowAt = Number(row.value), from = data.rows[rowAt], read = rowOf(headAt, rowAt);
  colourTokens(element("tokens"), read, from, most);
  element("caption").textContent = `${named(headAt)}: rows read, columns are read from`;
  element("reading").textContent = `What ${labelOf(data, from)} (${from}) reads, ${named(headAt)}`;
  const top = [...read.keys()].sort((a, b) => read[b] - read[a]).slice(0, 8);
  listValues(element("read"), top.map((at) => `${read[at].toFixed(4)}  ${labelOf(data, at)} (${at})`));
  if (square) {
    drawPattern(element("pattern"), squareOf(headAt), data, chooseRow, { maskUpperTri: data.reach === 1, maxValue: most, zoomed: true });
  } else {
    element("pattern").textContent =
      `Whole patterns are drawn of up to ${data.max_drawn} tokens whose rows are all here; read row by row instead.`;
  }
}

function choose(headAt) {
  head.value = headAt;
  const buttons = [...element("heads").children];
  buttons.forEach((button, at) => {
    button.setAttribute("aria-pressed", at === headAt);
    button.tabIndex = at === headAt ? 0 : -1;
  });
  if (buttons.includes(document.activeElement)) buttons[headAt].focus();
  show(headAt);
}

function chooseRow(rowAt) {
  row.value = rowAt;
  show(Number(head.value));
}

// A head's pattern, one pixel for each entry: CircuitsVis takes seconds for a layer of 32 heads.
function miniature(headAt) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = n;
  const context = canvas.getContext("2d"), image = context.createImageData(n, n);
  for (let from = 0; from < n; from++) {
    rowOf(headAt, from).forEach((share, at) => {
      const hidden = data.reach !== null && Math.floor(at / data.reach) > Math.floor(from / data.reach);
      const colour = hidden ? HIDDEN : ATTENTION.map((full) => 255 + (full - 255) * Math.min(share / most, 1));
      image.data.set([...colour, 255], 4 * (from * n + at));
    });
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

// Which cell of a small pattern, which fills its canvas, is under the mouse.
function nameCell(event, headAt) {
  const box = event.currentTarget.querySelector("canvas")?.getBoundingClientRect();
  if (!box) return;
  const cell = (offset, size) => Math.min(n - 1, Math.max(0, Math.floor((n * offset) / size)));
  const from = cell(event.clientY - box.top, box.height), at = cell(event.clientX - box.left, box.width);
  const share = rowOf(headAt, from)[at].toFixed(4);
  element("hovered").textContent =
    `${named(headAt)}: ${labelOf(data, from)} (${from}) reads ${share} of ${labelOf(data, at)} (${at})`;
}

function drawHeads() {
  shares = unpacked(data.patterns[layer.value]);
  const highest = shares.reduce((one, other) => Math.max(one, other), 0), focused = element("heads").contains(document.activeElement);
  most = stretch.checked ? highest : 1;
  element("highest").textContent = highest.toFixed(2);
  stretch.parentElement.hidden = highest.toFixed(2) === "1.00";
  element("hovered").textContent = HINT;
  element("heads").replaceChildren(...data.heads.map((number, headAt) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(`head ${number}`);
    if (square) button.append(miniature(headAt));
    button.addEventListener("click", () => choose(headAt));
    button.addEventListener("mouseenter", () => show(headAt));
    button.addEventListener("mouseleave", () => show(Number(head.value)));
    button.addEventListener("mousemove", (event) => nameCell(event, headAt));
    return button;
  }));
  choose(Number(head.value));
  if (focused) element("heads").children[head.value].focus();
}

function listFilled() {
  for (const { readout, tokens, probabilities } of data.filled) {
    const title = document.createElement("h2"), list = document.createElement("ol");
    title.textContent = `Predicted at ${labelOf(data, readout)} (${readout})`;
    list.className = "values";
    listValues(list, tokens.map((token, at) => `${probabilities[at].toFixed(4)}  ${token}`));
    element("filled").append(title, list);
  }
}

// What the residual stream after each layer would predict: the answer appears where its row begins to say it.
function listLens() {
  if (!data.lens.length) return;
  const table = element("lens").querySelector("table"), head = table.createTHead().insertRow();
  const cell = (row, text, tag) => Object.assign(row.appendChild(document.createElement(tag)), { textContent: text });
  cell(head, "after layer", "th").scope = "col";
  data.lens[0].forEach(({ readout }) => (cell(head, `at ${labelOf(data, readout)} (${readout})`, "th").scope = "col"));
  const body = table.createTBody();
  data.lens.forEach((predicted, at) => {
    const row = body.insertRow();
    cell(row, at, "th").scope = "row";
    predicted.forEach(({ tokens, probabilities }) => {
      const best = cell(row, `${tokens[0]}  ${probabilities[0].toFixed(4)}`, "td");
      best.title = tokens.map((token, place) => `${probabilities[place].toFixed(4)}  ${token}`).join("\n");
    });
  });
  element("lens").hidden = false;
}

// What reads what of the chosen head, as the buttons save it.
function shownMap() {
  const labels = data.tokens.map((_, position) => `${labelOf(data, position)} (${position})`), heads = Number(head.value);
  const hidden = (from, at) => data.reach !== null && Math.floor(at / data.reach) > Math.floor(from / data.reach);
  const z = data.rows.map((from, rowAt) => Array.from(rowOf(heads, rowAt), (share, at) => (hidden(from, at) ? null : Number(share.toFixed(5)))));
  return { label: `${named(heads)}, ${document.title}`, most, map: { name: named(heads), x: labels, y: data.rows.map((from) => labels[from]), z } };
}

choices(layer, data.layers.map((number, at) => [at, number]));
choices(head, data.heads.map((number, at) => [at, number]));
choices(row, data.rows.map((position, at) => [at, `${position}: ${labelOf(data, position)}`]));
row.value = Math.max(0, data.rows.indexOf(data.readout[0] ?? n - 1));
listTokens(element("tokens"), data, (position) => data.rows.includes(position) && chooseRow(data.rows.indexOf(position)));
walkHeads(element("heads"), layer, head);
layer.addEventListener("change", drawHeads);
head.addEventListener("change", () => choose(Number(head.value)));
row.addEventListener("change", () => show(Number(head.value)));
stretch.addEventListener("change", drawHeads);
saveButtons(element("save"), square, shownMap);
listFilled();
listLens();
drawHeads();
