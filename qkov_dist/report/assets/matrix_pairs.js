// All pairs of tasks as a table that sorts by any column.

const PAIRS_AT_ONCE = 20;
const PAIRS = { key: hasTotals ? "conflict" : "score", down: true, task: "all", most: PAIRS_AT_ONCE };

const hasScores = DATA.kinds.includes("scores");
const pairColumns = () => [
  ["pair", "pair"],
  ...(hasTotals ? [["finding", "they"], ["conflict", "conflict", "number"], ["synergy", "synergy", "number"]] : []),
  ...(hasScores ? [["contested", wordOf("contested"), "number"], ["apart", wordOf("apart"), "number"]] : []),
  ...(hasSteps ? [["onFirst", "1st by 2nd", "number"], ["onSecond", "2nd by 1st", "number"]] : []),
  ...(hasTotals ? [["change", "change", "number"], ["low", "95% interval"], ["q", "q", "number"], ["cosine", "cosine", "number"]]
    : [["score", `mean ${DATA.score}`, "number"], ...(hasMatrix("overlap") ? [["overlap", "overlap", "number"]] : [])]),
];

function pairRows() {
  const rows = DATA.pairs.map(([a, b], at) => {
    const of = hasTotals ? DATA.totals[STATE.optimizer] : {};
    const counts = Object.fromEntries(["conflict", "synergy", "contested", "apart"].map((word) => [word, DATA.kinds.includes(countedBy(word)[0]) ? countOf(at, word, "all") : NaN]));
    return {
      at, a, b, pair: nameOfPair(at), ...counts, change: of.change?.[at], low: of.low?.[at], high: of.high?.[at], q: of.q?.[at],
      onFirst: factorOf(a, b) * of.change?.[at], onSecond: factorOf(b, a) * of.change?.[at], cosine: hasTotals ? cosineOf(a, b, "all") : NaN,
      score: (entry("mean", a, b, "all") + entry("mean", b, a, "all")) / 2, overlap: entry("overlap", a, b, "all"), finding: verdictOf(at) ? verdictText(at) : "",
    };
  });
  if (hasTotals) rows.sort((x, y) => x.q - y.q); // of equal ones the surest first
  return sortBy(rows.filter(({ a, b }) => PAIRS.task === "all" || [a, b].includes(Number(PAIRS.task))), PAIRS.key, PAIRS.down);
}

const PAIR_TEXT = { onFirst: (row) => percentOf(row.onFirst), onSecond: (row) => percentOf(row.onSecond), cosine: (row) => twoDigits(row.cosine), finding: (row) => (hasTotals ? verdictText(row.at) : "") };

function pairRow(row, most) {
  const cells = {
    pair: [make("a", { href: DATA.pages[row.at] || hashOfPair(row.a, row.b) }, row.pair)],
    low: !Number.isFinite(row.low) ? ["–"] : [make("span", {}, `[${show(row.low)}, ${show(row.high)}]`), intervalLine(row, most)],
    finding: [make("span", { class: ["mark-below", "", "mark-above"][verdictOf(row.at) + 1] }, PAIR_TEXT.finding(row))],
  };
  return make("tr", { role: "row" }, ...pairColumns().map(([key, title, kind]) =>
    make("td", { role: "cell", class: `short ${kind || ""} ${key}`, "data-label": title }, ...(cells[key] || [PAIR_TEXT[key] ? PAIR_TEXT[key](row) : show(row[key])]))));
}

function drawPairs() {
  const rows = pairRows();
  const shown = rows.slice(0, PAIRS.most);
  const ends = shown.flatMap(({ low, high }) => [low, high]).filter(Number.isFinite).map(Math.abs);
  const written = DATA.pages.filter(Boolean).length;
  const pages = written === DATA.pairs.length ? "Every pair has its page." : `${written} of ${DATA.pairs.length} pairs have their pages; \`${DATA.command} A B\` writes another one.`;
  document.getElementById("pairs-hint").textContent = (hasTotals
    ? `Conflict, synergy and so on: numbers of heads. Change: of all attention by ${STATE.optimizer}, for a unit step (learning rate × number of steps = 1), with the pair's ` +
      `own 95% interval and q over all pairs; own ▲ or ▼: by that interval alone.${hasSteps ? " 1st by 2nd: what training on the second task, until its own loss is 10% lower, does to the first's loss." : ""} ` : "Numbers of heads. ") + pages;
  document.getElementById("pair-table").replaceChildren(
    make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, ...pairColumns().map((column) => sortHeader("pair-table", column, PAIRS, drawPairs, column[2] === "number" && column[0] !== "q")))),
    make("tbody", { role: "rowgroup" }, ...shown.map((row) => pairRow(row, Math.max(...ends, 1e-30)))));
  const more = make("button", { type: "button", onclick: () => { PAIRS.most += 100; drawPairs(); } }, "Show more");
  document.getElementById("pairs-more").replaceChildren(make("span", { role: "status" }, `${shown.length} of ${rows.length} pairs`), ...(shown.length < rows.length ? [more] : []));
}

/** A choice among the tasks, or all of them. */
function taskSelect(id, onchange) {
  const select = make("select", { id, onchange: () => onchange(select.value) }, make("option", { value: "all" }, "all"), ...DATA.tasks.map((name, task) => make("option", { value: task }, name)));
  return make("label", { class: "field" }, make("span", {}, "Task"), select);
}

/** All pairs of the filter with the names of `pairs.csv`. */
function pairsTable() {
  const keys = pairColumns().map(([key]) => key).filter((key) => !["pair", "low", "finding"].includes(key));
  const rows = pairRows().map((row) => [DATA.tasks[row.a], DATA.tasks[row.b], ...keys.map((key) => row[key]), ...(hasTotals ? [row.low, row.high, ["help", "unknown", "harm"][verdictOf(row.at) + 1]] : [])]);
  return [["task_a", "task_b", ...keys, ...(hasTotals ? ["ci_low", "ci_high", "direction"] : [])], ...rows];
}

document.getElementById("pairs-tools").append(taskSelect("pairs-task", (task) => { PAIRS.task = task; drawPairs(); }), csvButton("pairs", pairsTable));
DRAW.push(drawPairs);
