// The selected head with its strongest pair, and the table of sample pairs: sorted and filtered here.

const [SAMPLES_A, SAMPLES_B] = DATA.samples;
const ROWS_AT_ONCE = 50;
const FILTER = { block: "all", layer: "", head: "", words: "", key: "excess", down: true, most: ROWS_AT_ONCE };

const CONFLICTS = DATA.conflicts.map(([index, layer, head, i, j, score, excess]) => {
  const block = DATA.blocks[index];
  return {
    block: block.name, layer: DATA.layers[layer], head: block.heads[head], axis: block.axis, score, excess,
    q: block.value("q", block.at(layer, head)),
    found: block.finding(block.at(layer, head))?.name || "", finding: findingText(block.finding(block.at(layer, head))), a: SAMPLES_A.ids[i], b: SAMPLES_B.ids[j],
    tokens_a: SAMPLES_A.tokens[i], tokens_b: SAMPLES_B.tokens[j], i, j,
    words: [SAMPLES_A.ids[i], SAMPLES_B.ids[j], SAMPLES_A.texts[i], SAMPLES_B.texts[j]].join("\n").toLowerCase(),
  };
});

const COLUMNS = [
  ["block", "block"], ["layer", "layer", "number"], ["head", "head", "number"], ["score", DATA.score, "number"],
  ["excess", "× scale", "number"],
  ...(isTested ? [["q", "q of head", "number"], ["finding", "finding"]] : []),
  ["tokens_a", `tokens ${DATA.tasks[0]}`, "number"], ["tokens_b", `tokens ${DATA.tasks[1]}`, "number"],
  ["a", DATA.tasks[0]], ["b", DATA.tasks[1]],
];

function sampleText(samples, place) {
  return samples.texts[place] || "(no text was kept)";
}

function showSelected(block, cell) {
  const panel = document.getElementById("selected");
  const at = block.at(cell.layer, cell.head);
  const title = make("h3", {}, nameOf(block, cell));
  if (!isThere(block, cell.layer, cell.head)) return panel.replaceChildren(title, make("p", {}, "This layer has no such head."));
  const numbers = numbersOf(block, at).map(([name, text]) => make("div", {}, make("dt", {}, name), make("dd", {}, text)));
  panel.replaceChildren(title, make("dl", { class: "numbers" }, ...numbers));
  if (DATA.intervals_beside) panel.append(make("p", { class: "hint" }, DATA.intervals_beside));
  if (!block.pairs) return;
  const [i, j] = [Math.floor(block.pairs[at] / SAMPLES_B.ids.length), block.pairs[at] % SAMPLES_B.ids.length];
  const sample = (task, samples, place) => make("div", {},
    make("h4", {}, `${task}: ${samples.ids[place]}, ${samples.tokens[place]} labelled tokens, loss ${show(samples.losses[place])}`),
    make("pre", {}, sampleText(samples, place)));
  panel.append(make("p", { class: "hint" }, "Strongest pair of this head: ",
    make("button", { type: "button", onclick: () => listConflicts(block, cell) }, "list its strongest pairs")),
    make("div", { class: "texts" }, sample(DATA.tasks[0], SAMPLES_A, i), sample(DATA.tasks[1], SAMPLES_B, j)));
}

function kept() {
  const words = FILTER.words.toLowerCase();
  const rows = CONFLICTS.filter((row) =>
    (FILTER.block === "all" || row.block === FILTER.block) && (FILTER.layer === "" || row.layer === Number(FILTER.layer)) &&
    (FILTER.head === "" || row.head === Number(FILTER.head)) && row.words.includes(words));
  const sign = FILTER.down ? -1 : 1;
  const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : (a > b) - (a < b));
  return rows.sort((x, y) => sign * compare(x[FILTER.key], y[FILTER.key]));
}

const headerCell = (column) => sortHeader("conflicts", column, FILTER, drawConflicts, column[0] === "excess" || (column[0] === "score" && !isSigned));

function textCell(samples, place) {
  const toggle = () => button.setAttribute("aria-expanded", String(cell.classList.toggle("open")));
  const button = make("button", { type: "button", class: "open", "aria-expanded": "false", onclick: toggle }, samples.ids[place]);
  const cell = make("td", { role: "cell", class: "text" }, button, make("pre", { onclick: toggle }, sampleText(samples, place)));
  return cell;
}

const COLUMN_TEXT = { block: (row) => row.block, score: (row) => show(row.score), excess: (row) => show(row.excess), q: (row) => show(row.q) };

// Roles stay although a narrow screen lays rows out as cards.
function conflictRow(row) {
  const short = COLUMNS.filter(([key]) => key !== "a" && key !== "b").map(([key, title, kind]) =>
    make("td", { role: "cell", class: `short ${kind || ""}`, "data-label": title }, (COLUMN_TEXT[key] || ((any) => String(any[key])))(row)));
  return make("tr", { role: "row" }, ...short, textCell(SAMPLES_A, row.i), textCell(SAMPLES_B, row.j));
}

function drawConflicts() {
  const rows = kept();
  const shown = rows.slice(0, FILTER.most);
  document.getElementById("conflicts").replaceChildren(
    make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, ...COLUMNS.map(headerCell))),
    make("tbody", { role: "rowgroup" }, ...shown.map(conflictRow)));
  const more = make("button", { type: "button", onclick: () => { FILTER.most += ROWS_AT_ONCE; drawConflicts(); } }, "Show more");
  document.getElementById("more").replaceChildren(
    make("span", { role: "status" }, `${shown.length} of ${rows.length} pairs`), ...(shown.length < rows.length ? [more] : []));
}

/** Show the strongest pairs of one head. */
function listConflicts(block, cell) {
  Object.assign(FILTER, { block: block.name, layer: String(DATA.layers[cell.layer]), head: String(block.heads[cell.head]) });
  for (const name of ["block", "layer", "head"]) document.getElementById(`filter-${name}`).value = FILTER[name];
  drawConflicts();
  document.getElementById("top-conflicts").scrollIntoView();
  document.getElementById("conflicts-scroll").focus({ preventScroll: true });
}

const enterHead = (block, cell) => listConflicts(block, cell);

function choice(name, title, values) {
  const options = values.map(([value, text]) => make("option", { value }, text));
  const select = make("select", { id: `filter-${name}`, onchange: () => { FILTER[name] = select.value; drawConflicts(); } }, ...options);
  return make("label", { class: "field" }, make("span", {}, title), select);
}

function makeFilters() {
  const numbers = (name) => [...new Set(CONFLICTS.map((row) => row[name]))].sort((a, b) => a - b).map(String);
  const all = (values) => [["", "all"], ...values.map((value) => [value, value])];
  const words = make("input", { type: "search", id: "filter-words", placeholder: "in ids and texts", oninput: () => { FILTER.words = words.value; drawConflicts(); } });
  const clear = () => {
    Object.assign(FILTER, { block: "all", layer: "", head: "", words: "" });
    for (const name of ["block", "layer", "head", "words"]) document.getElementById(`filter-${name}`).value = FILTER[name];
    drawConflicts();
  };
  const heads = DATA.blocks.flatMap((block) => block.heads);
  document.getElementById("filters").replaceChildren(
    choice("block", "Block", [["all", "all"], ...DATA.blocks.map((block) => [block.name, block.name])]),
    choice("layer", "Layer", all(DATA.layers.map(String))),
    choice("head", "Head", all([...new Set(heads)].sort((a, b) => a - b).map(String))),
    make("label", { class: "field" }, make("span", {}, "Words"), words),
    make("button", { type: "button", id: "filter-clear", onclick: clear }, "Clear"));
}
