// Heads over pairs: in how many pairs (or with how many tasks) each head is in conflict, as heatmaps by block.

const hasCodes = DATA.blocks.every((block) => block.codes !== null);
const WORDS = ["conflict", "synergy", "contested", "apart"].filter((word) => DATA.kinds.includes(countedBy(word)[0]));
const DIGITS = ["sgd", "adam", "scores"];
const countsTask = () => STATE.task !== "all";

const VALUES = {
  count: {
    label: "pairs", key: "shown",
    get title() { return countsTask() ? `tasks with which ${DATA.tasks[STATE.task]} is ${inWord()}` : `pairs ${inWord()}`; },
    get hint() {
      const what = countsTask() ? `With how many of the other ${NUM - 1} tasks ${DATA.tasks[STATE.task]} is ${inWord()} in each head` : `In how many of the ${DATA.pairs.length} pairs each head is ${inWord()}`;
      return `${what} (q ≤ ${level} ${DATA.scopes[countedBy(STATE.kind)[0]]}).`;
    },
  },
};

function inWord() {
  return STATE.kind === "conflict" || STATE.kind === "synergy" ? `in ${STATE.kind} by ${STATE.optimizer}` : wordOf(STATE.kind);
}

/** Whether a head is what is counted in a pair: the digit of its kind in the byte of the pair and head. */
function shows(block, at, place, word) {
  const [kind, side] = countedBy(word);
  const digit = Math.floor(block.codes[at * block.values.score.length + place] / 3 ** DIGITS.indexOf(kind)) % 3;
  return digit === side + 1;
}

const pairsOfTask = (task) => DATA.pairs.map((_, at) => at).filter((at) => task === "all" || DATA.pairs[at].includes(Number(task)));

/** The counts that the heatmaps show, where they find them. */
function prepareCounts() {
  const [kind, side] = countedBy(STATE.kind);
  for (const block of DATA.blocks) {
    const all = block.values[`${kind}_${side ? "below" : "above"}`] || block.values.score.map(() => NaN); // nothing was tested
    const chosen = pairsOfTask(STATE.task);
    block.values.shown = countsTask()
      ? all.map((number, place) => (Number.isNaN(number) ? NaN : chosen.reduce((sum, at) => sum + shows(block, at, place, STATE.kind), 0))) : all;
  }
}

/** The heads of most pairs, in words. */
function headsOfMostPairs() {
  const found = DATA.blocks.flatMap((block) => [...block.values.shown.keys()].filter((place) => block.values.shown[place] > 0)
    .map((place) => ({ block, cell: { layer: Math.floor(place / block.heads.length), head: place % block.heads.length }, number: block.values.shown[place] })));
  return found.sort((x, y) => y.number - x.number).slice(0, 5);
}

function listHeads() {
  const most = headsOfMostPairs().flatMap(({ block, cell, number }, n) =>
    [n ? ", " : "Most: ", make("a", { href: hashOf(block, cell) }, `${block.name} ${DATA.layers[cell.layer]}.${block.heads[cell.head]}`), ` (${number})`]);
  document.getElementById("most-heads").replaceChildren(...(most.length ? [...most, "."] : ["No head."]));
}

const numbersAtPointer = (block, at) => WORDS.map((word) => {
  const [kind, side] = countedBy(word);
  const isChange = kind !== "scores";
  return [isChange ? `in ${word} by ${STATE.optimizer}` : wordOf(word), `in ${block.values[`${kind}_${side ? "below" : "above"}`][at]} of ${DATA.pairs.length} pairs`];
});

/** The pairs in which a head shows something, as links to its place in their pages. */
function pairsOfHead(block, cell, word) {
  const place = block.at(cell.layer, cell.head);
  const found = pairsOfTask(STATE.task).filter((at) => shows(block, at, place, word));
  const shown = found.slice(0, 40).flatMap((at, n) => [n ? ", " : "", DATA.pages[at] ? make("a", { href: DATA.pages[at] + hashOf(block, cell) }, nameOfPair(at)) : nameOfPair(at)]);
  return found.length ? [make("p", {}, make("b", {}, `${WORDS_TITLE[word]()}: `), ...shown, found.length > 40 ? ` and ${found.length - 40} more` : "")] : [];
}

const WORDS_TITLE = { conflict: () => `In conflict by ${STATE.optimizer}`, synergy: () => `In synergy by ${STATE.optimizer}`, contested: () => wordOf("contested"), apart: () => wordOf("apart") };

function showSelected(block, cell) {
  const panel = document.getElementById("selected");
  const title = make("h3", {}, nameOf(block, cell));
  if (!isThere(block, cell.layer, cell.head)) return panel.replaceChildren(title, make("p", {}, "This layer has no such head."));
  const at = block.at(cell.layer, cell.head);
  const numbers = numbersAtPointer(block, at).map(([name, text]) => make("div", {}, make("dt", {}, name), make("dd", {}, text)));
  panel.replaceChildren(title, make("dl", { class: "numbers" }, ...numbers), ...(hasCodes ? WORDS.flatMap((word) => pairsOfHead(block, cell, word)) : []));
}

/** Enter at a head: to the first of its pairs. */
const enterHead = () => document.querySelector("#selected a")?.focus();

/** Every head and in how many pairs it shows what. */
function headsTable() {
  const kinds = DATA.kinds.flatMap((kind) => ["above", "below"].map((side, n) => [`${kind}_${side}`, `${DATA.words[kind][n]}_${kind}`]));
  const rows = DATA.blocks.flatMap((block) => [...block.values.score.keys()].filter((at) => !Number.isNaN(block.values.score[at])).map((at) =>
    [block.name, DATA.layers[Math.floor(at / block.heads.length)], block.heads[at % block.heads.length], ...kinds.map(([name]) => block.values[name][at])]));
  return [["block", "layer", "head", ...kinds.map(([, title]) => title)], ...rows];
}

function headTools() {
  const kinds = Object.fromEntries(WORDS.map((word) => [word, { label: MATRIX[word].label }]));
  document.getElementById("toolbar").append(segments("Heads", "kind", kinds),
    ...(hasTotals ? [segments("Optimizer", "heads-optimizer", { adam: { label: "adam" }, sgd: { label: "sgd" } }, "optimizer")] : []),
    ...(hasCodes ? [taskSelect("heads-task", (task) => { STATE.task = task; redraw(); })] : []),
    csvButton("heads-over-pairs", headsTable), pictureButton("heads-over-pairs", "png", saveMaps));
}

DRAW.unshift(prepareCounts);
if (WORDS.length) DRAW.push(listHeads);
