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

// The tokens of a prompt in a list, each with its marks; `pick` is told which one was clicked.
function listTokens(list, prompt, pick) {
  list.replaceChildren(...prompt.tokens.map((text, position) => {
    const item = document.createElement("li");
    item.textContent = labelOf(prompt, position);
    item.className = marksOf(prompt, position).join(" ");
    item.addEventListener("click", () => pick(position));
    return item;
  }));
}

// Colours the tokens by what the token at `from` reads of them; a share of `most` has the full colour.
function colourTokens(list, shares, from, most = 1) {
  [...list.children].forEach((item, position) => {
    const colour = Math.min(shares[position] / most, 1);
    item.style.setProperty("--share", colour);
    item.classList.toggle("dark", colour > 0.5);
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

// In a notebook the page stands in a frame, which takes the page's height.
if (window.frameElement) {
  const fit = () => { window.frameElement.style.height = `${document.documentElement.scrollHeight}px`; };
  new ResizeObserver(fit).observe(document.querySelector("main"));
}
