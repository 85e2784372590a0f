// Heads by what a step does: one sortable list over all blocks.

const RANKED_AT_ONCE = 10;
const RANKED = { key: "change", down: true, kind: "all", most: RANKED_AT_ONCE };

const RANKED_COLUMNS = [
  ["head", "head"], ["change", "change", "number"], ["low", `${show(100 * DATA.confidence)}% interval`], ["q", "q", "number"], ["p_max", "family-wise p", "number"],
  ["share", "share of harm", "number"], ["curvature", "curvature", "number"], ["harm", "harm at step", "number"], ["finding", "effect"],
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

/** Numbers by size, names by their numbers; what is not there last. */
function sortBy(rows, key, down) {
  const sign = down ? -1 : 1;
  return rows.sort((x, y) => {
    const [a, b] = [x[key], y[key]];
    if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
    return sign * (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);
  });
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
  return make("tr", { role: "row" }, ...RANKED_COLUMNS.map(([key, title, kind]) =>
    make("td", { role: "cell", class: `short ${kind || ""} ${key}`, "data-label": title }, ...cells[key])));
}

/** The interval against 0, drawn on the scale of all rows shown. */
function intervalLine({ change, low, high }, most) {
  const x = (number) => fixed(50 + (48 * Math.max(Math.min(number, most), -most)) / most);
  const svg = makeSvg("svg", { viewBox: "0 0 100 10", class: "interval-line", "aria-hidden": "true", preserveAspectRatio: "none" });
  const line = (name, x1, x2, y1, y2) => svg.append(makeSvg("line", { class: name, x1, x2, y1, y2 }));
  line("axis", 50, 50, 0, 10);
  line("band", x(low), x(high), 5, 5);
  line("point", x(change), x(change), 1, 9);
  return svg;
}

function drawRanked() {
  const rows = sortBy(rankedHeads().filter((row) => RANKED.kind === "all" || row.finding === RANKED.kind), RANKED.key, RANKED.down);
  const shown = rows.slice(0, RANKED.most);
  const most = Math.max(...shown.flatMap(({ low, high }) => [low, high]).filter((end) => !Number.isNaN(end)).map(Math.abs), 1e-30);
  document.getElementById("ranked-hint").textContent =
    `Every head's ${VALUES.change.title}, most harmful first; an interval that holds 0 leaves the direction open. Share: of the sum of all changes above 0. ` +
    `Curvature and harm: what ${stepText()}. Click a head to see it in the heatmaps.`;
  const draw = () => { drawRanked(); };
  document.getElementById("heads").replaceChildren(
    make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, ...RANKED_COLUMNS.map((column) => sortHeader("heads", column, RANKED, draw, column[2] === "number" && !["q", "p_max"].includes(column[0]))))),
    make("tbody", { role: "rowgroup" }, ...shown.map((row) => rankedRow(row, most))));
  const more = make("button", { type: "button", onclick: () => { RANKED.most += 50; drawRanked(); } }, "Show more");
  document.getElementById("ranked-more").replaceChildren(
    make("span", { role: "status" }, `${shown.length} of ${rows.length} heads`), ...(shown.length < rows.length ? [more] : []));
}

function rankedTools() {
  const kinds = [["all", "all heads"], ...DATA.effects.findings.map(({ name, glyph }) => [name, `${glyph} ${name}`])];
  const select = make("select", { id: "ranked-kind", onchange: () => { RANKED.kind = select.value; drawRanked(); } }, ...kinds.map(([value, text]) => make("option", { value }, text)));
  document.getElementById("ranked-tools").append(
    segments("Optimizer", "ranked-optimizer", { adam: { label: "adam" }, sgd: { label: "sgd" } }, "optimizer"),
    make("label", { class: "field" }, make("span", {}, "Heads"), select),
    csvButton("heads", rankedTable));
}

/** All heads as columns and rows, with the names that pandas has. */
function rankedTable() {
  const optimizer = STATE.optimizer;
  const names = ["change", "ci_low", "ci_high", "q_value", "p_max", "curvature_a", "curvature_b", "finding"];
  const rows = sortBy(rankedHeads(), RANKED.key, RANKED.down).map(({ block, cell, at, change, low, high, q, p_max, finding }) => [
    block.name, DATA.layers[cell.layer], block.heads[cell.head], change, low, high, q, p_max,
    ...["curvature_a", "curvature_b"].map((name) => block.effects[optimizer][name][at]), finding,
  ]);
  return [["block", "layer", "head", ...names.map((name) => `${name}_${optimizer}`)], ...rows];
}

if (hasEffects) {
  rankedTools();
  DRAW.push(drawRanked);
}
