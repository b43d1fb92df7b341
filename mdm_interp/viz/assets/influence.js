// Of one pair, the sentences that help and hurt either query most, token by token and by what their gradients go through.
const pair = element("pair"), WAYS = ["forward", "reverse"], SIGNS = ["helping", "hurting"];

function made(tag, text, className = "") {
  const item = document.createElement(tag);
  item.textContent = text;
  item.className = className;
  return item;
}

// A sentence's tokens, each coloured by its share of `most`, the strongest token shown.
function sentenceOf(one, most) {
  const list = made("ol", "", "tokens signed");
  list.append(...data.sentences[one.sentence].map((text, at) => {
    const item = made("li", text.replaceAll("\n", "⏎"), one.tokens[at] < 0 ? "hurts" : one.tokens[at] > 0 ? "helps" : "");
    const share = most ? Math.abs(one.tokens[at]) / most : 0;
    item.style.setProperty("--share-of-full", share);
    item.classList.toggle("dark", share > DARK);
    item.title = `${at}: ${written(one.tokens[at])}`;
    return item;
  }));
  return list;
}

// What the gradients go through, strongest first, and where: a table of layers to open.
function groupsOf(one) {
  const order = [...data.groups.keys()].sort((a, b) => Math.abs(one.groups[b]) - Math.abs(one.groups[a]));
  const details = made("details", ""), scroll = made("div", "", "scroll"), table = made("table", "", "numbers");
  details.append(made("summary", order.map((at) => `${data.groups[at]} ${written(one.groups[at])}`).join(" · "), "key"));
  const row = (cells) => {
    const line = made("tr", "");
    line.append(...cells.map((text, at) => made(at ? "td" : "th", text)));
    return line;
  };
  const rows = data.layers.map((layer, at) =>
    row([layer, ...order.map((group) => (one.layers[group][at] === null ? "" : written(one.layers[group][at])))]));
  table.append(row(["", ...order.map((at) => data.groups[at])]), ...rows);
  scroll.append(table);
  details.append(scroll);
  return details;
}

function draw() {
  const shown = data.pairs[pair.value];
  for (const way of WAYS) {
    const query = shown[way];
    listTokens(element(`${way}-tokens`), { ...query, readout: [] });
    const most = Math.max(0, ...SIGNS.flatMap((sign) => query[sign].flatMap((one) => one.tokens.map(Math.abs))));
    for (const sign of SIGNS) {
      const entries = query[sign].map((one) => {
        const entry = made("article", "");
        entry.append(made("strong", written(one.total)), sentenceOf(one, most), groupsOf(one));
        return entry;
      });
      element(`${way}-${sign}`).replaceChildren(...(entries.length ? entries : [made("p", "none")]));
    }
  }
}

choices(pair, data.pairs.map(({ name }, at) => [at, `${at + 1}: ${name}`]));
pair.addEventListener("change", draw);
draw();
