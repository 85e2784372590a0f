// The matrix of tasks: a table whose cells are coloured, walked with arrow keys, and lead to the pages of pairs.

const GRID = document.getElementById("grid");
const pairPanel = document.getElementById("pair");
const orderShown = () => (STATE.order === "clustered" ? DATA.order : DATA.tasks.map((_, place) => place));

/** Colours and ends of the scale of what is shown; the diagonal has no part in it. */
function matrixScale() {
  const value = MATRIX[STATE.matrix];
  const apart = [];
  for (let row = 0; row < NUM; row++) for (let column = 0; column < NUM; column++) if (row !== column) apart.push(value.at(row, column));
  const [low, high] = extent([apart]);
  const colors = DIVERGING[isDark() ? "dark" : "light"];
  if (value.isCount) {
    const half = value.isHarm ? colors.slice(3) : colors.slice(0, 4).reverse();
    return { colors: half, share: (x) => x / (high || 1), ends: ["0", "", whole(Math.max(high, 0))] };
  }
  if (value.centred) {
    const most = value.most || Math.max(Math.abs(low), Math.abs(high)) || 1;
    return { colors, share: (x) => (x / most + 1) / 2, ends: [value.text(-most), "0", value.text(most)] };
  }
  return { colors: CIVIDIS, share: (x) => (x - low) / (high - low || 1), ends: [value.text(low), "", value.text(high)] };
}

/** Black or white, whichever is read on a colour. */
const inkOn = ([red, green, blue]) => (0.299 * red + 0.587 * green + 0.114 * blue > 140 ? "#111" : "#fff");

/** Width and height of cells, and whether numbers and upright names fit. */
function gridSize() {
  const width = document.getElementById("matrix-area").clientWidth - 8;
  const longest = Math.max(...DATA.tasks.map((name) => [...name].length));
  const names = Math.min(longest * 7.6 + 18, width < 500 ? 104 : 190);
  const least = matchMedia("(pointer: coarse)").matches ? 24 : 15;
  const cell = Math.min(Math.max(Math.floor((width - names - NUM - 4) / NUM), least), 92); // a gap of one beside each
  return { names, cell, height: Math.min(Math.max(Math.round(cell * 0.62), Math.min(cell, 22)), 44), hasText: cell >= 40, isNarrow: cell < 68, isUpright: longest * 7.6 < cell - 4 };
}

function cellText(row, column, hasText) {
  const value = MATRIX[STATE.matrix];
  const number = value.at(row, column);
  const at = pairAt(row, column);
  const mark = STATE.matrix === "change" && at !== undefined ? ["▼", "", "▲"][verdictOf(at) + 1] : "";
  return [...(hasText ? [value.text(number)] : []), ...(mark ? [make("small", {}, mark)] : [])];
}

function gridCell(row, column, scale, size) {
  const at = pairAt(row, column);
  const isSelf = at === undefined;
  const page = isSelf ? null : DATA.pages[at];
  const value = MATRIX[STATE.matrix];
  const number = value.at(row, column);
  const inner = make(page ? "a" : "span", {
    class: "cell", tabindex: "-1", href: page, "data-row": row, "data-column": column,
    "aria-label": `${isSelf ? `${DATA.tasks[row]} with itself` : `${DATA.tasks[row]} × ${DATA.tasks[column]}`}: ${value.text(number)}${page ? ", opens the pair's page" : ""}`,
  }, ...cellText(row, column, size.hasText));
  const cell = make("td", { role: "gridcell", class: isSelf ? "self" : "" }, inner);
  if (!isSelf && !Number.isNaN(number)) {
    const color = mix(scale.colors, scale.share(number));
    inner.style.background = rgb(color);
    inner.style.color = inkOn(color);
  }
  return cell;
}

function drawGrid() {
  const scale = matrixScale(), size = gridSize(), order = orderShown();
  const hadFocus = GRID.contains(document.activeElement);
  GRID.style.setProperty("--cell", `${size.cell}px`);
  GRID.style.setProperty("--row", `${size.height}px`);
  GRID.style.setProperty("--names", `${size.names}px`);
  GRID.style.setProperty("--letters", size.cell < 18 ? ".62rem" : size.cell < 48 ? ".72rem" : ".84rem");
  GRID.classList.toggle("upright", size.isUpright);
  GRID.classList.toggle("narrow", size.isNarrow);
  const value = MATRIX[STATE.matrix];
  const corner = make("th", { class: "corner" }, ...(value.isDirected ? [make("small", {}, STATE.matrix === "change" ? "loss of ↓\ntrained on →" : "i of ↓\nj of →")] : []));
  const name = (task, scope) => make("th", { scope, title: DATA.tasks[task] }, make("span", {}, DATA.tasks[task]));
  GRID.replaceChildren(
    make("thead", {}, make("tr", {}, corner, ...order.map((task) => name(task, "col")))),
    make("tbody", {}, ...order.map((row) => make("tr", {}, name(row, "row"), ...order.map((column) => gridCell(row, column, scale, size))))));
  document.getElementById("matrix-hint").textContent = value.hint;
  drawMatrixScale(scale);
  if (!STATE.cell) STATE.cell = firstPair();
  const current = cellElement(STATE.cell);
  current.tabIndex = 0;
  if (hadFocus) current.focus({ preventScroll: true });
}

function drawMatrixScale(scale) {
  const bar = document.getElementById("matrix-bar");
  paintBar(bar, scale.colors);
  document.getElementById("matrix-ends").replaceChildren(...scale.ends.map((end) => make("span", {}, end)));
}

const cellElement = ({ row, column }) => GRID.querySelector(`[data-row="${row}"][data-column="${column}"]`);

/** The pair that stands out most in what is shown. */
function firstPair() {
  const value = MATRIX[STATE.matrix];
  const size = ([a, b]) => Math.abs(value.at(a, b)) || 0;
  const [row, column] = DATA.pairs.reduce((best, pair) => (size(pair) > size(best) ? pair : best));
  return { row, column };
}

const cellOf = (element) => {
  const inner = element.closest?.(".cell");
  return inner && { row: Number(inner.dataset.row), column: Number(inner.dataset.column), inner };
};

/** Numbers of a pair, in reading order; of the block chosen where they are known by block. */
function pairNumbers(row, column) {
  const at = pairAt(row, column);
  const [a, b] = [DATA.tasks[row], DATA.tasks[column]];
  const rows = [];
  if (hasTotals) {
    const of = DATA.totals[STATE.optimizer];
    rows.push(["they, over all pairs", verdictText(at)]);
    for (const [harmed, stepped] of hasSteps ? [[row, column], [column, row]] : []) {
      const ends = [of.low[at], of.high[at]].map((end) => percentOf(factorOf(harmed, stepped) * end));
      rows.push([`${DATA.tasks[harmed]}'s loss, trained on ${DATA.tasks[stepped]}`, `${percentOf(factorOf(harmed, stepped) * of.change[at])} [${ends.join(", ")}]`]);
    }
    rows.push([`change, unit step (${STATE.optimizer})`, `${show(of.change[at])} [${show(of.low[at])}, ${show(of.high[at])}]`], ["q over pairs", show(of.q[at])]);
    rows.push(["heads in conflict", whole(countOf(at, "conflict"))], ["in synergy", whole(countOf(at, "synergy"))], ["cosine", twoDigits(cosineOf(row, column))]);
  }
  if (DATA.kinds.includes("scores")) rows.push([`heads ${wordOf("contested")}`, whole(countOf(at, "contested"))], [wordOf("apart"), whole(countOf(at, "apart"))]);
  rows.push([`mean ${DATA.score}, i of ${a}, j of ${b}`, show(entry("mean", row, column))], [`i of ${b}, j of ${a}`, show(entry("mean", column, row))]);
  if (hasMatrix("overlap")) rows.push(["overlap", show(entry("overlap", row, column))]);
  return rows;
}

/** Numbers of a task with itself: what the diagonal is. */
function selfNumbers(task) {
  const rows = [];
  if (hasTotals) rows.push([`own change, unit step (${STATE.optimizer})`, show(changeOf(task, task))]);
  if (hasSteps) rows.push(["by a practical step", "−10%, by definition"]);
  rows.push([`mean ${DATA.score} within the task`, show(entry("mean", task, task))]);
  return rows;
}

const inBlock = () => (STATE.block === "all" ? "" : `, block ${STATE.block}`);
const titleOf = (row, column) => `${row === column ? `${DATA.tasks[row]} with itself` : `${DATA.tasks[row]} × ${DATA.tasks[column]}`}`;
const numbersAt = (row, column) => (row === column ? selfNumbers(row) : pairNumbers(row, column));

/** A link to a pair's page, or the command that writes it. */
function pairLink(at, text, hash = "") {
  if (DATA.pages[at]) return [make("a", { href: DATA.pages[at] + hash, class: "open-pair" }, text)];
  return [`Its page is not written yet: `, make("pre", {}, commandOf(at))];
}

const quoted = (name) => (/^[\w@%+=:,./-]+$/.test(name) ? name : `'${name.replaceAll("'", `'"'"'`)}'`);
const commandOf = (at) => `${DATA.command} ${DATA.pairs[at].map((task) => quoted(DATA.tasks[task])).join(" ")}`;

function showPair({ row, column }) {
  const at = pairAt(row, column);
  const numbers = numbersAt(row, column).map(([name, text]) => make("div", {}, make("dt", {}, name), make("dd", {}, text)));
  pairPanel.replaceChildren(make("h3", {}, `${titleOf(row, column)}${inBlock()}`), make("dl", { class: "numbers" }, ...numbers));
  if (at !== undefined) pairPanel.append(make("p", {}, ...pairLink(at, `Open the page of ${nameOfPair(at)} →`)));
}

function showPairTip(cell, x, y) {
  const [title, ...rows] = [titleOf(cell.row, cell.column), ...numbersAt(cell.row, cell.column).map(([name, text]) => `${name} ${text}`)];
  tip.replaceChildren(make("b", {}, title), ...rows.map((text) => make("span", {}, text)));
  placeTip(x, y);
}

function selectPair(cell, { focus = false } = {}) {
  const last = cellElement(STATE.cell);
  if (last) last.tabIndex = -1;
  STATE.cell = { row: cell.row, column: cell.column };
  STATE.isChosen = true;
  const inner = cellElement(STATE.cell);
  inner.tabIndex = 0;
  if (focus) inner.focus();
  showPair(STATE.cell);
  history.replaceState(null, "", cell.row === cell.column ? location.pathname : hashOfPair(cell.row, cell.column));
}

function walkGrid(event) {
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const order = orderShown();
  const [row, column] = [order.indexOf(STATE.cell.row), order.indexOf(STATE.cell.column)];
  const go = (down, right) => selectPair({ row: order[Math.min(Math.max(down, 0), NUM - 1)], column: order[Math.min(Math.max(right, 0), NUM - 1)] }, { focus: true });
  if (steps[event.key]) go(row + steps[event.key][0], column + steps[event.key][1]);
  else if (event.key === "Home") go(row, 0);
  else if (event.key === "End") go(row, NUM - 1);
  else if (event.key === "Escape") tip.hidden = true;
  else return; // Enter follows the link of a cell that has one
  event.preventDefault();
}

GRID.addEventListener("keydown", walkGrid);
GRID.addEventListener("focusin", (event) => {
  const cell = cellOf(event.target);
  if (cell && event.target.matches(":focus-visible")) selectPair(cell);
});
GRID.addEventListener("pointermove", (event) => {
  const cell = event.pointerType !== "touch" && cellOf(event.target);
  if (cell) showPairTip(cell, event.clientX, event.clientY);
  else tip.hidden = true;
});
GRID.addEventListener("pointerleave", () => { tip.hidden = true; });
GRID.addEventListener("click", (event) => {
  const cell = cellOf(event.target);
  if (!cell) return;
  const isNew = !STATE.isChosen || STATE.cell.row !== cell.row || STATE.cell.column !== cell.column;
  if (event.pointerType === "touch" && isNew) event.preventDefault(); // the first touch shows numbers, the second opens
  selectPair(cell);
});

/** Select the pair that an address names; whether it names one. */
function followPair(hash) {
  const said = document.getElementById("no-pair");
  said.hidden = true;
  let text;
  try {
    text = decodeURIComponent(hash.slice(1));
  } catch {
    return false;
  }
  for (let row = 0; row < NUM; row++)
    for (let column = 0; column < NUM; column++)
      if (row !== column && text === `${DATA.tasks[row]}.${DATA.tasks[column]}`) {
        selectPair({ row, column });
        document.getElementById("matrix").scrollIntoView();
        return true;
      }
  if (!text.includes(".") || /^[A-Z]\.\d+\.\d+$/.test(text)) return false;
  said.textContent = `This report has no pair ${text}: its tasks are ${DATA.tasks.join(", ")}.`;
  said.hidden = false;
  return true;
}

const blockChoices = () => Object.fromEntries([["all", { label: "all" }], ...BLOCK_NAMES.map((name) => [name, { label: name }])]);

function matrixTools() {
  const optimizers = segments("Optimizer", "matrix-optimizer", { adam: { label: "adam" }, sgd: { label: "sgd" } }, "optimizer");
  document.getElementById("matrix-tools").append(
    segments("Value", "matrix", Object.fromEntries(Object.entries(MATRIX).filter(([, { there }]) => there))),
    segments("Heads", "block", blockChoices()), ...(hasTotals ? [optimizers] : []),
    segments("Order", "order", { clustered: { label: "like tasks together" }, configured: { label: "as configured" } }),
    csvButton("matrix", matrixTable), pictureButton("matrix", "svg", saveMatrix));
}

/** What is shown, as rows of a table: the row's task, the column's task, and the number. */
function matrixTable() {
  const value = MATRIX[STATE.matrix];
  const order = orderShown();
  const rows = order.flatMap((row) => order.map((column) => [DATA.tasks[row], DATA.tasks[column], value.at(row, column), STATE.block]));
  return [["row", "column", value.title, "block"], ...rows];
}

/** The matrix as a picture that carries its own looks. */
function saveMatrix(file) {
  const order = orderShown(), scale = matrixScale(), value = MATRIX[STATE.matrix];
  const side = 30, left = 170, top = 190;
  const svg = makeSvg("svg", { xmlns: "http://www.w3.org/2000/svg", width: left + side * NUM + 20, height: top + side * NUM + 20, "font-family": "sans-serif", "font-size": 11 });
  svg.append(makeSvg("rect", { width: "100%", height: "100%", fill: "#fff" }), makeSvg("text", { x: 12, y: 22, "font-size": 13, "font-weight": 600 }, `${DATA.title}: ${value.title}${inBlock()}`));
  order.forEach((row, down) => {
    const middle = side * down + side / 2;
    svg.append(makeSvg("text", { x: left - 6, y: top + middle + 4, "text-anchor": "end" }, DATA.tasks[row]));
    svg.append(makeSvg("text", { transform: `translate(${left + middle + 4} ${top - 6}) rotate(-90)` }, DATA.tasks[row]));
    order.forEach((column, right) => {
      const number = value.at(row, column);
      const color = row === column || Number.isNaN(number) ? [228, 230, 232] : mix(scale.colors, scale.share(number));
      const [x, y] = [left + side * right, top + side * down];
      svg.append(makeSvg("rect", { x, y, width: side - 1, height: side - 1, fill: rgb(color) }));
      svg.append(makeSvg("text", { x: x + side / 2, y: y + side / 2 + 3, "text-anchor": "middle", "font-size": 8, fill: inkOn(color) }, value.text(number)));
    });
  });
  download(file, new XMLSerializer().serializeToString(svg), "image/svg+xml");
}

DRAW.push(() => {
  drawGrid();
  if (STATE.isChosen) showPair(STATE.cell);
});
