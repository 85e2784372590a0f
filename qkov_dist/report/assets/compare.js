// Runs compared: scatter, differences, trajectories and the table of heads of one quantity at a time.

const LAST = DATA.runs.length - 1;
const ROWS_AT_ONCE = 20, LINES = 8;
const CHART = { width: 300, height: 220, left: 48, right: 8, top: 8, bottom: 34 };
const STATE = { quantity: DATA.quantities[0].key, key: "rank", down: false, most: ROWS_AT_ONCE };
const tip = document.getElementById("tip");

const current = () => DATA.quantities.find(({ key }) => key === STATE.quantity);
const number = (block, key, at) => block.value(`${STATE.quantity}_${key}`, at);
const ofRun = (block, run) => block.values[`${STATE.quantity}_${run}`];
const nameAt = (block, at) => `${block.name} ${DATA.layers[Math.floor(at / block.heads.length)]}.${block.heads[at % block.heads.length]}`;
const difference = (block, at) => number(block, LAST, at) - number(block, 0, at);
const hasMoved = (block, at) => number(block, "q_value", at) <= DATA.alpha;
const isFamily = (block, at) => number(block, "p_max", at) <= DATA.alpha;
const there = (block) => [...ofRun(block, 0).keys()].filter((at) => !Number.isNaN(difference(block, at)));
const stateOf = (block, at) => (hasMoved(block, at) ? (difference(block, at) > 0 ? "up" : "down") : "");

/** All numbers of a head, a line each. */
function linesOf(block, at) {
  const lines = DATA.runs.map((run, n) => `${run}: ${show(number(block, n, at))}`);
  if (!current().isTested) return [...lines, `difference ${show(difference(block, at))}`];
  const [apart, low, high, q, family] = ["difference", "ci_low", "ci_high", "q_value", "p_max"].map((key) => show(number(block, key, at)));
  return [...lines, `difference ${apart} [${low}, ${high}]`, `q ${q}, family-wise p ${family}`];
}

function showTip(event, block, at) {
  tip.replaceChildren(make("b", {}, nameAt(block, at)), ...linesOf(block, at).map((line) => make("span", {}, line)));
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.min(event.clientX + 14, innerWidth - width - 4)}px`;
  tip.style.top = `${Math.max(4, event.clientY + 18 + height > innerHeight ? event.clientY - height - 10 : event.clientY + 18)}px`;
}

const hideTip = () => { tip.hidden = true; };

/** Charts are drawn in the page's own pixels, so that text stays as large on a phone. */
function measure(id) {
  const box = document.getElementById(id);
  CHART.width = Math.max(parseFloat(getComputedStyle(box).gridTemplateColumns.split(" ")[0]) || 300, 140);
  return box;
}

function framed(block, label) {
  const svg = makeSvg("svg", { viewBox: `0 0 ${CHART.width} ${CHART.height}`, role: "img", "aria-label": label });
  return { svg, element: make("div", { class: `chart ${block.name}` }, make("h3", {}, make("i"), block.name), svg) };
}

/** A scale over numbers, with room at both ends. */
function scaleOver(numbers, from, to) {
  const [low, high] = extent([numbers.filter((number) => !Number.isNaN(number))]);
  const room = 0.04 * (high - low) || 1;
  return { at: (x) => from + ((x - low + room) / (high - low + 2 * room)) * (to - from), marks: ticks(low, high, 4) };
}

function drawScatter() {
  measure("scatter-charts").replaceChildren(...DATA.blocks.map((block) => {
    const { width, height, left, right, top, bottom } = CHART;
    const { svg, element } = framed(block, `Block ${block.name}: ${current().label} of each head, first run across, last run up`);
    const [first, last] = [ofRun(block, 0), ofRun(block, LAST)];
    const both = current().isTested ? [...first, ...last] : null; // values of one kind share an axis
    const x = scaleOver(both || [...first], left, width - right);
    const y = scaleOver(both || [...last], height - bottom, top);
    for (const mark of x.marks) svg.append(makeSvg("text", { x: x.at(mark), y: height - bottom + 13, "text-anchor": "middle" }, show(Number(mark.toPrecision(6)))));
    for (const mark of y.marks) {
      svg.append(makeSvg("line", { class: "grid", x1: left, x2: width - right, y1: y.at(mark), y2: y.at(mark) }));
      svg.append(makeSvg("text", { x: left - 5, y: y.at(mark) + 4, "text-anchor": "end" }, show(Number(mark.toPrecision(6)))));
    }
    if (both) {
      const [low, high] = extent([both.filter((number) => !Number.isNaN(number))]);
      svg.append(makeSvg("line", { class: "zero", x1: x.at(low), x2: x.at(high), y1: y.at(low), y2: y.at(high) }));
    }
    const order = there(block).sort((a, b) => hasMoved(block, a) - hasMoved(block, b));
    for (const at of order) {
      const state = stateOf(block, at);
      const dot = makeSvg("circle", { class: state ? `moved ${state}` : "mark still", cx: fixed(x.at(first[at])), cy: fixed(y.at(last[at])), r: state ? 3.4 : 2 });
      dot.addEventListener("pointermove", (event) => showTip(event, block, at));
      dot.addEventListener("pointerleave", hideTip);
      svg.append(dot);
    }
    svg.append(makeSvg("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, `${DATA.runs[0]} → ${DATA.runs[LAST]} (up)`));
    return element;
  }));
}

function drawMaps() {
  const every = DATA.blocks.flatMap((block) => there(block).map((at) => Math.abs(difference(block, at))));
  const most = Math.max(...every.filter((x) => !Number.isNaN(x)), 1e-300);
  const colors = DIVERGING[isDark() ? "dark" : "light"];
  const maps = DATA.blocks.map((block) => {
    const canvas = make("canvas", { role: "img", "aria-label": `Differences of block ${block.name}, layers up, heads across` });
    canvas.addEventListener("pointerleave", hideTip);
    return { block, canvas, element: make("div", { class: `map ${block.name}` }, make("h3", {}, make("i"), block.name, " ", make("small", {}, `layer × ${block.axis}`)), make("div", { class: "plot" }, canvas)) };
  });
  document.getElementById("maps").replaceChildren(...maps.map(({ element }) => element));
  for (const { block, canvas } of maps) {
    const [rows, columns] = [DATA.layers.length, block.heads.length];
    const width = canvas.clientWidth || 300, cell = Math.max(6, Math.min(14, 420 / rows)), height = cell * rows;
    const ratio = devicePixelRatio || 1;
    canvas.width = width * ratio; canvas.height = height * ratio;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--absent");
    context.fillRect(0, 0, width, height);
    for (const at of there(block)) {
      const [layer, head] = [Math.floor(at / columns), at % columns];
      const [x, y, w] = [(head * width) / columns, height - (layer + 1) * cell, width / columns];
      context.fillStyle = rgb(mix(colors, 0.5 + difference(block, at) / most / 2));
      context.fillRect(x, y, w + 0.5, cell + 0.5);
      if (!hasMoved(block, at)) continue;
      context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--ink");
      const size = Math.min(w, cell) * (isFamily(block, at) ? 0.3 : 0.16);
      context.beginPath();
      context.arc(x + w / 2, y + cell / 2, size, 0, 7);
      context.fill();
    }
    canvas.addEventListener("pointermove", (event) => {
      const layer = rows - 1 - Math.floor(event.offsetY / cell), head = Math.floor((event.offsetX / width) * columns);
      const at = layer * columns + head;
      if (layer < 0 || head >= columns || Number.isNaN(difference(block, at))) return hideTip();
      showTip(event, block, at);
    });
  }
  document.getElementById("differences-hint").textContent = `Last run minus first, ${current().label}; blue below 0, orange above, one scale up to ±${show(most)}. ` +
    (current().isTested ? `A dot: moved (q ≤ ${show(DATA.alpha)}); a large one: also over all heads of all blocks.` : "Not tested.") + " The first layer is at the bottom.";
}

function drawTrajectories() {
  if (LAST < 2) return;
  measure("trajectory-charts").replaceChildren(...DATA.blocks.map((block) => {
    const { width, height, left, right, top, bottom } = CHART;
    const { svg, element } = framed(block, `Block ${block.name}: ${current().label} of each head over the runs`);
    const values = DATA.runs.map((_, run) => ofRun(block, run));
    const places = there(block);
    const y = scaleOver(values.flatMap((of) => [...of]), height - bottom, top);
    const x = (run) => left + 8 + (run / LAST) * (width - left - right - 16);
    for (const mark of y.marks) {
      svg.append(makeSvg("line", { class: "grid", x1: left, x2: width - right, y1: y.at(mark), y2: y.at(mark) }));
      svg.append(makeSvg("text", { x: left - 5, y: y.at(mark) + 4, "text-anchor": "end" }, show(Number(mark.toPrecision(6)))));
    }
    const path = (at) => values.map((of, run) => `${run ? "L" : "M"}${fixed(x(run))} ${fixed(y.at(of[at]))}`).join("");
    const whole = places.filter((at) => values.every((of) => !Number.isNaN(of[at])));
    svg.append(makeSvg("path", { class: "trajectory", d: whole.map(path).join("") }));
    const far = [...whole].sort((a, b) => Math.abs(difference(block, b)) - Math.abs(difference(block, a))).slice(0, LINES);
    for (const at of far) {
      const line = makeSvg("path", { class: `mark line ${hasMoved(block, at) ? "" : "faint"}`, d: path(at) });
      line.addEventListener("pointermove", (event) => showTip(event, block, at));
      line.addEventListener("pointerleave", hideTip);
      svg.append(line);
    }
    DATA.runs.forEach((_, run) => svg.append(makeSvg("text", { x: x(run), y: height - bottom + 13, "text-anchor": "middle" }, String(run + 1))));
    svg.append(makeSvg("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, "run"));
    return element;
  }));
}

function rows() {
  const found = DATA.blocks.flatMap((block) => there(block).map((at) => {
    const values = DATA.runs.map((_, run) => ofRun(block, run));
    const row = { block, at, head: nameAt(block, at), difference: difference(block, at), size: Math.abs(difference(block, at)) };
    values.forEach((of, run) => { row[`run_${run}`] = of[at]; });
    const steps = values.slice(1).map((of, run) => of[at] - values[run][at]);
    row.step = steps.reduce((most, step) => (Math.abs(step) > Math.abs(most) ? step : most), 0);
    row.step_to = steps.indexOf(row.step) + 2;
    for (const key of ["ci_low", "ci_high", "p_value", "q_value", "p_max"]) row[key] = number(block, key, at);
    row.moved = hasMoved(block, at);
    return row;
  }));
  const byTest = (a, b) => (b.moved - a.moved) || (a.p_value - b.p_value) || (b.size - a.size);
  found.sort((a, b) => (current().isTested ? byTest(a, b) : b.size - a.size));
  found.forEach((row, place) => { row.rank = place; });
  return sortBy(found, STATE.key, STATE.down);
}

const columns = () => [
  ["head", "head"], ...DATA.runs.map((run, n) => [`run_${n}`, run, "number"]), ["difference", "difference", "number"],
  ...(current().isTested ? [["ci_low", `${show(100 * DATA.confidence)}% interval`], ["q_value", "q", "number"], ["p_max", "family-wise p", "number"]] : []),
  ...(LAST > 1 ? [["step", "largest step", "number"]] : []),
];

function drawTable() {
  const all = rows();
  const shown = all.slice(0, STATE.most);
  const text = (row, key) => {
    if (key === "head") return row.head;
    if (key === "ci_low") return `[${show(row.ci_low)}, ${show(row.ci_high)}]`;
    if (key === "step") return `${show(row.step)} (to ${row.step_to})`;
    return show(row[key]);
  };
  const header = (column) => sortHeader("heads", column, STATE, drawTable, column[2] === "number" && !["q_value", "p_max"].includes(column[0]));
  document.getElementById("heads").replaceChildren(
    make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, ...columns().map(header))),
    make("tbody", { role: "rowgroup" }, ...shown.map((row) => make("tr", { role: "row", class: stateOf(row.block, row.at) }, ...columns().map(([key, title, kind]) =>
      make("td", { role: "cell", class: `short ${kind || ""} ${key}`, "data-label": title }, text(row, key)))))));
  document.getElementById("heads-hint").textContent = `Every head's ${current().label}` + (current().isTested
    ? ", those that moved first, by p. Click a column's name to sort." : ", largest difference first. Not tested: only ranks are compared. Click a column's name to sort.");
  const more = make("button", { type: "button", onclick: () => { STATE.most += 100; drawTable(); } }, "Show more");
  document.getElementById("more").replaceChildren(make("span", { role: "status" }, `${shown.length} of ${all.length} heads`), ...(shown.length < all.length ? [more] : []));
}

function drawHints() {
  hideTip();
  document.getElementById("quantity-hint").textContent = current().hint;
  document.getElementById("scatter-hint").textContent = `A dot a head: ${DATA.runs[0]} across, ${DATA.runs[LAST]} up.` +
    (current().isTested ? ` Coloured: moved (q ≤ ${show(DATA.alpha)}, ${current().how}), orange up, blue down. Dashed: no difference.` : " Values are not of one kind, or not tested: axes differ, only ranks are compared.");
}

DRAW.push(drawHints, drawScatter, drawMaps, drawTrajectories, drawTable);

const select = make("select", { id: "quantity", onchange: () => { STATE.quantity = select.value; STATE.key = "rank"; STATE.down = false; redraw(); } },
  ...DATA.quantities.map(({ key, label, moved }) => make("option", { value: key }, moved === null ? label : `${label} (${moved} moved)`)));
document.getElementById("toolbar").append(make("label", { class: "field" }, make("span", {}, "Quantity"), select));
redraw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== width) requestAnimationFrame(redraw);
  width = innerWidth;
});
