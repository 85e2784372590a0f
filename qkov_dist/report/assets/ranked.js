// Heads by what a step does: one sortable list over all blocks.

const RANKED_AT_ONCE = 10;
const RANKED = { key: "change", down: true, kind: "all", most: RANKED_AT_ONCE };

/** Key, title and kind of each column: the step and whose loss it is stand in the titles. */
const rankedColumns = () => [
  ["head", "head"], ["change", "change", "number"], ["low", `${show(100 * DATA.confidence)}% interval`], ["q", "q", "number"], ["p_max", "family-wise p", "number"],
  ["share", "share of harm", "number"], ["curvature", `curvature of ${harmedTask()}`, "number"], ["harm", `harm to ${harmedTask()} at ${STATE.step}`, "number"],
  ["finding", "effect"],
];

function rankedHeads() {
  const total = totalHarm();
  return DATA.blocks.flatMap((block) => [...block.values.change.keys()].filter((at) => !Number.isNaN(block.values.change[at])).map((at) => {
    const cell = { layer: Math.floor(at / block.heads.length), head: at % block.heads.length };
    const [effect, change] = [block.effects[STATE.optimizer], block.values.change[at]];
    return {
      block, cell, at, change, head: `${block.name} ${DATA.layers[cell.layer]}.${block.heads[cell.head]}`,
      low: block.value("change_low", at), high: block.value("change_high", at), q: effect.q[at], p_max: effect.p_max[at],
      share: change > 0 ? change / total : 0, curvature: block.value("curvature", at), harm: block.value("harm", at),
      finding: effectFinding(block, at)?.name || "",
    };
  }));
}

function rankedRow(row, most) {
  const link = make("a", { href: hashOf(row.block, row.cell), onclick: () => follow(hashOf(row.block, row.cell)) }, row.head);
  const hasInterval = !Number.isNaN(row.low);
  const cells = {
    head: [link], change: [show(row.change)], q: [show(row.q)], p_max: [show(row.p_max)],
    low: hasInterval ? [make("span", {}, `[${show(row.low)}, ${show(row.high)}]`), intervalLine(row, most)] : ["–"],
    share: [row.share > 0 ? percent(row.share) : "–"], curvature: [show(row.curvature)], harm: [show(row.harm)],
    finding: [make("span", { class: row.finding ? `mark-${effectFinding(row.block, row.at).side}` : "" }, findingText(effectFinding(row.block, row.at)))],
  };
  return make("tr", { role: "row" }, ...rankedColumns().map(([key, title, kind]) =>
    make("td", { role: "cell", class: `short ${kind || ""} ${key}`, "data-label": title }, ...cells[key])));
}

/** The heads that the filter keeps, in the order of the table. */
const rankedRows = () => sortBy(rankedHeads().filter((row) => RANKED.kind === "all" || row.finding === RANKED.kind), RANKED.key, RANKED.down);

/** What stands where the filter keeps no head. */
function noRows() {
  const text = `No head is in ${RANKED.kind} by ${STATE.optimizer} at q ≤ ${show(DATA.effects.level)} (0 of ${rankedHeads().length}).`;
  return make("tr", { role: "row" }, make("td", { role: "cell", class: "empty", colspan: rankedColumns().length }, text));
}

function drawRanked() {
  const rows = rankedRows();
  const shown = rows.slice(0, RANKED.most);
  const most = Math.max(...shown.flatMap(({ low, high }) => [low, high]).filter((end) => !Number.isNaN(end)).map(Math.abs), 1e-30);
  document.getElementById("ranked-hint").textContent =
    `Every head's ${VALUES.change.title}, for a unit step (learning rate × number of steps = 1), most harmful first; an interval that holds 0 leaves the ` +
    `direction open. Share: of the sum of all changes above 0, significant or not. Curvature and harm: what ${stepText()}, harm at a step of ${STATE.step}; ` +
    "step and task are chosen at the heatmaps. The CSV has the heads shown by the filter, with the names of pandas: p_max is the family-wise p, curvature_along_a that of A's loss.";
  const draw = () => { drawRanked(); };
  document.getElementById("heads").replaceChildren(
    make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, ...rankedColumns().map((column) => sortHeader("heads", column, RANKED, draw, column[2] === "number" && !["q", "p_max"].includes(column[0]))))),
    make("tbody", { role: "rowgroup" }, ...(shown.length ? shown.map((row) => rankedRow(row, most)) : [noRows()])));
  const more = make("button", { type: "button", onclick: () => { RANKED.most += 50; drawRanked(); } }, "Show more");
  document.getElementById("ranked-more").replaceChildren(
    make("span", { role: "status" }, rows.length ? `${shown.length} of ${rows.length} heads` : ""), ...(shown.length < rows.length ? [more] : []));
}

function rankedTools() {
  const kinds = [["all", "all heads"], ...DATA.effects.findings.map(({ name, glyph }) => [name, `${glyph} ${name}`])];
  const select = make("select", { id: "ranked-kind", onchange: () => { RANKED.kind = select.value; drawRanked(); } }, ...kinds.map(([value, text]) => make("option", { value }, text)));
  document.getElementById("ranked-tools").append(
    segments("Optimizer", "ranked-optimizer", { adam: { label: "adam" }, sgd: { label: "sgd" } }, "optimizer"),
    make("label", { class: "field" }, make("span", {}, "Heads"), select),
    csvButton("heads", rankedTable));
}

/** The heads of the filter as columns and rows, with the names that pandas has, and for the rest what the table says. */
function rankedTable() {
  const optimizer = STATE.optimizer;
  const names = ["change", "ci_low", "ci_high", "q_value", "p_max", "curvature_along_a", "curvature_along_b", "finding"];
  const rows = rankedRows().map(({ block, cell, at, change, low, high, q, p_max, share, harm, finding }) => [
    block.name, DATA.layers[cell.layer], block.heads[cell.head], change, low, high, q, p_max,
    ...["a", "b"].map((task) => block.effects[optimizer][`curvature_${task}`][at]), finding, share, harm, STATE.step,
  ]);
  return [["block", "layer", "head", ...names.map((name) => `${name}_${optimizer}`), `share_of_harm_${optimizer}`, `harm_${STATE.harmed}_${optimizer}`, "step"], ...rows];
}

if (hasEffects) {
  rankedTools();
  DRAW.push(drawRanked);
}
