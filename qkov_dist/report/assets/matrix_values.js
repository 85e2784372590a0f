// What the matrix of tasks can show of a pair, and what is chosen of it at first.

const NUM = DATA.tasks.length;
const BLOCK_NAMES = DATA.blocks.map(({ name }) => name);
const hasTotals = DATA.totals !== null;

for (const arrays of Object.values(DATA.matrices)) unpackAll(arrays, Float32Array);
for (const columns of Object.values(DATA.totals || {})) unpackAll(columns, Float32Array);
for (const block of DATA.blocks) block.codes = block.codes && unpack(block.codes, Int8Array);
const COUNTS = unpack(DATA.counts, Int32Array);

const STATE = {
  matrix: hasTotals ? "conflict" : "score", block: "all", optimizer: "adam", order: "clustered", cell: null,
  value: "count", kind: hasTotals ? "conflict" : "contested", task: "all", scale: "linear", range: "shared", selected: null,
};
const hidesMarks = false; // the heatmaps of heads bear none
const ENTER_SAYS = "Enter goes to a head's pairs"; // in the name of a heatmap

/** Where no head of any pair is in conflict, what all heads add up to is shown first, and where heads are in synergy. */
if (hasTotals && DATA.blocks.every((block) => block.values.adam_above.every((number) => !(number > 0)))) Object.assign(STATE, { matrix: "change", kind: "synergy" });

/** The place of a pair in every list of pairs, for two tasks in either order; undefined for a task with itself. */
const PAIR_AT = new Map(DATA.pairs.flatMap(([a, b], at) => [[a * NUM + b, at], [b * NUM + a, at]]));
const pairAt = (row, column) => PAIR_AT.get(row * NUM + column);
const nameOfPair = (at) => DATA.pairs[at].map((task) => DATA.tasks[task]).join(" × ");

/** A pair as the end of the page's address: #code.math is the cell of the row code and the column math. */
const hashOfPair = (row, column) => `#${[row, column].map((task) => encodeURIComponent(DATA.tasks[task])).join(".")}`;

/** What is counted: kind of test and side (0 above, 1 below), by the word for it. */
function countedBy(word) {
  if (word === "conflict" || word === "synergy") return [STATE.optimizer, word === "conflict" ? 0 : 1];
  return ["scores", word === "contested" ? 0 : 1];
}

/** Heads of a pair that are in conflict (or else), in a block or in all. */
function countOf(at, word, block = STATE.block) {
  const [kind, side] = countedBy(word);
  const first = ((at * DATA.kinds.length + DATA.kinds.indexOf(kind)) * 2 + side) * BLOCK_NAMES.length;
  return BLOCK_NAMES.reduce((sum, name, place) => sum + (block === "all" || block === name ? COUNTS[first + place] : 0), 0);
}

const entry = (name, row, column, block = STATE.block) => DATA.matrices[block][name]?.[row * NUM + column] ?? NaN;
const hasMatrix = (name) => name in DATA.matrices.all;
const changeOf = (row, column, block) => entry(`change_${STATE.optimizer}`, row, column, block);
const cosineOf = (row, column, block) => -changeOf(row, column, block) / Math.sqrt(Math.max(-changeOf(row, row, block), 0) * Math.max(-changeOf(column, column, block), 0));

/** What makes a unit step's change that of a practical step on the column's task, as a part of the row's loss. */
function factorOf(row, column) {
  const at = pairAt(row, column);
  if (at === undefined || !hasTotals) return NaN;
  const of = DATA.totals[STATE.optimizer];
  return DATA.pairs[at][0] === row ? of.step_b[at] / of.loss_a[at] : of.step_a[at] / of.loss_b[at];
}

/** What a pair says: 1 hurts, -1 helps, 0 is not known; over all pairs, or by its own interval. */
const verdictOf = (at, family = "held") => (hasTotals ? DATA.totals[STATE.optimizer][family][at] : 0);
const verdictText = (at) => ["▼ help", "not known", "▲ hurt"][verdictOf(at) + 1] +
  (verdictOf(at) === 0 && verdictOf(at, "own") !== 0 ? ` (own ${verdictOf(at, "own") > 0 ? "▲" : "▼"})` : "");

const hasSteps = hasTotals && DATA.pairs.some(([a, b]) => Number.isFinite(factorOf(a, b)));

/** A part as per cent with its sign: two digits, and no more than two places. */
function percentOf(part) {
  if (!Number.isFinite(part)) return "–";
  const [percent, size] = [100 * part, Math.abs(100 * part)];
  const text = size < 0.995 ? percent.toFixed(2) : size < 9.95 ? percent.toFixed(1) : show(Math.round(percent));
  return `${percent > 0 ? "+" : ""}${text.replace("-", "−")}%`;
}

const whole = (number) => (Number.isFinite(number) ? String(number) : "–");
const twoDigits = (number) => (Number.isFinite(number) ? show(Number(number.toPrecision(2))) : "–");
const optimizerText = () => `by ${STATE.optimizer}`;
const heads = (word) => ({
  label: word, isCount: true, there: word === "conflict" || word === "synergy" ? hasTotals : DATA.kinds.includes("scores"),
  get title() { return `heads ${word === "conflict" || word === "synergy" ? `in ${word} ${optimizerText()}` : wordOf(word)}`; },
  at: (row, column) => (row === column ? NaN : countOf(pairAt(row, column), word)), text: whole, isHarm: word === "conflict" || word === "contested",
});
const wordOf = (word) => (DATA.words.scores || [])[word === "contested" ? 0 : 1] || word;
const level = show(DATA.level);

/** What a cell can show: its number at (row, column), as text, and what it means. */
const MATRIX = {
  conflict: { ...heads("conflict"), hint: `Heads of a pair in conflict: a step on either task, in that head alone, raises the other's loss (q ≤ ${level} ${DATA.scopes.adam}). A task is no pair with itself.` },
  synergy: { ...heads("synergy"), hint: `Heads of a pair in synergy: a step on either task, in that head alone, lowers the other's loss (q ≤ ${level} ${DATA.scopes.adam}). A task is no pair with itself.` },
  change: {
    label: "change", centred: true, there: hasTotals, isDirected: hasSteps,
    get title() { return hasSteps ? `change of the row's loss by a practical step on the column's task (${STATE.optimizer})` : `change of either task's loss by a unit step on the other (${STATE.optimizer})`; },
    at: (row, column) => (hasSteps ? (row === column ? -0.1 : factorOf(row, column) * changeOf(row, column)) : changeOf(row, column)),
    text: hasSteps ? percentOf : twoDigits,
    get hint() {
      const what = hasSteps
        ? "What training attention on the column's task, until its own loss is 10% lower, does to the row's loss, to first order and in per cent of that loss. Diagonal: by definition −10%, so each row is read against it."
        : `To first order, for a unit step (learning rate × number of steps = 1), in ${DATA.unit}: no practical step is known. Diagonal: a task's step on itself.`;
      return `${what} Above 0 (orange) is harm. ▲ ▼: told from 0 over all pairs (q ≤ ${level}), of all heads together.`;
    },
  },
  cosine: {
    label: "cosine", centred: true, there: hasTotals, text: twoDigits, at: cosineOf, most: 1,
    get title() { return `cosine of mean gradients (${STATE.optimizer})`; },
    hint: "Cosine of two tasks' mean gradients in the optimizer's metric: −change / √(own change × own change). 1: the same direction, 0: nothing to do with each other, below 0: against each other. " +
      "Estimated over pairs of different samples: with few it may lie beyond 1. Tasks are ordered by it.",
  },
  score: {
    label: DATA.score, there: true, isDirected: true, text: twoDigits, at: (row, column) => entry("mean", row, column),
    title: `mean ${DATA.score}`,
    hint: `Mean ${DATA.score} over pairs of a sample of the row's task (i) and one of the column's (j), and over heads; on the diagonal over pairs of different samples of one task (out of the colours). Compare within a block: it grows with the size of a slice.`,
  },
  overlap: {
    label: "overlap", centred: true, there: hasMatrix("overlap"), text: twoDigits, at: (row, column) => entry("overlap", row, column), title: "overlap, mean over heads",
    hint: "Whether two tasks use the same weights, their scale apart, averaged over heads: 0 as much as each by itself, very negative: each with weights of its own. Diagonal: 0 by definition.",
  },
  contested: { ...heads("contested"), label: wordOf("contested"), hint: `Heads of a pair that are ${wordOf("contested")}: the two tasks use the same weights more than random halves of their samples do (q ≤ ${level} ${DATA.scopes.scores}).` },
  apart: { ...heads("apart"), label: wordOf("apart"), hint: `Heads of a pair that are ${wordOf("apart")}: they use the same weights less than random halves of their samples do (q ≤ ${level} ${DATA.scopes.scores}).` },
};
