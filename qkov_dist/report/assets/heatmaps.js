// The blocks as layer x head heatmaps on canvases; a cursor that mouse, finger and arrow keys move.

const LEFT = 30, BOTTOM = 20, TOP = 4;
const tip = document.getElementById("tip");
const MAPS = DATA.blocks.map((block, index) => makeMap(block, index));
const mostHeads = Math.max(...DATA.blocks.map((block) => block.heads.length));

function makeMap(block, index) {
  const canvas = make("canvas", {
    tabindex: 0, role: "application", id: `map-${block.name}`, "aria-describedby": "marks",
    "aria-label": `Heatmap of block ${block.name}: ${DATA.layers.length} layers by ${block.heads.length} ${block.axis}s. ` +
      `Arrow keys move between cells, ${ENTER_SAYS}.`,
  });
  const cursor = make("div", { class: "cursor", hidden: true });
  const bar = make("canvas", { class: "bar", "aria-hidden": "true" });
  const [low, middle, high] = [make("span"), make("span"), make("span")];
  const map = { block, index, canvas, cursor, bar, ends: [low, middle, high] };
  map.element = make("div", { class: `map ${block.name}` },
    make("h3", {}, make("i"), block.name, " ", make("small", {}, `layer × ${block.axis}`)),
    make("div", { class: "plot" }, canvas, cursor), bar, make("div", { class: "ends" }, low, middle, high));
  canvas.addEventListener("pointermove", (event) => {
    const cell = cellAt(map, event);
    if (!cell) return leave();
    point(map, cell);
    showTip(map, cell, event.clientX, event.clientY);
  });
  canvas.addEventListener("pointerleave", leave);
  canvas.addEventListener("click", (event) => {
    const cell = cellAt(map, event);
    if (cell) select(map, cell);
  });
  canvas.addEventListener("focus", () => {
    if (canvas.matches(":focus-visible") && STATE.selected?.map !== map) select(map, firstCell(map));
  });
  canvas.addEventListener("keydown", (event) => walk(map, event));
  return map;
}

const isThere = (block, layer, head) => !Number.isNaN(block.values.score[block.at(layer, head)]);

function firstCell(map) {
  const { score } = map.block.values;
  const best = score.reduce((kept, number, place) => (Math.abs(number) > Math.abs(score[kept]) || Number.isNaN(score[kept]) ? place : kept), 0);
  return { layer: Math.floor(best / map.block.heads.length), head: best % map.block.heads.length };
}

function walk(map, event) {
  const steps = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const cell = STATE.selected?.map === map ? STATE.selected : firstCell(map);
  if (event.key === "Enter") enterHead(map.block, cell);
  else if (event.key === "Home") select(map, { layer: cell.layer, head: 0 });
  else if (event.key === "End") select(map, { layer: cell.layer, head: map.block.heads.length - 1 });
  else if (event.key === "Escape") leave();
  else if (steps[event.key]) {
    const [up, right] = steps[event.key];
    select(map, {
      layer: Math.min(Math.max(cell.layer + up, 0), DATA.layers.length - 1),
      head: Math.min(Math.max(cell.head + right, 0), map.block.heads.length - 1),
    });
  } else return;
  event.preventDefault();
}

/** The share of the colour scale of each number of a block, and what its ends say. */
function scaleOf(map) {
  const value = VALUES[STATE.value];
  const mine = map.block.values[value.key] || new Float32Array();
  const shared = value.isEffect ? STATE.effectRange === "shared" : STATE.range === "shared" || STATE.value !== "score";
  const arrays = shared ? DATA.blocks.map((block) => block.values[value.key] || []) : [mine];
  const theme = isDark() ? "dark" : "light";
  if (STATE.value === "q") {
    const least = Math.min(extent(arrays)[0], DATA.alpha) || 1e-6;
    const share = (q, at) => (1 + (map.block.marks.side[at] * Math.log(Math.max(q, least))) / Math.log(least)) / 2;
    return { colors: DIVERGING[theme], share, ends: [`${show(least)} below`, "1", `above ${show(least)}`] };
  }
  if (value.ends) {
    const [low, high] = value.ends;
    return { colors: DIVERGING[theme], share: (x) => (x - low) / (high - low), ends: [show(low), show((low + high) / 2), show(high)] };
  }
  const [low, high] = extent(arrays);
  if (value.isEffect && value.centred) {
    const sizes = arrays.flatMap((array) => Array.from(array, Math.abs)).filter((size) => !Number.isNaN(size)).sort((a, b) => a - b);
    const most = sizes[Math.floor(0.99 * (sizes.length - 1))] || 1; // a single wild head must not pale the rest
    const [least, largest] = [low < -most ? "≤ " : "", high > most ? "≥ " : ""];
    return { colors: DIVERGING[theme], share: (x) => (x / most + 1) / 2, ends: [`${least}${show(-most)}`, "0", `${largest}${show(most)}`] };
  }
  if (value.centred) {
    const most = Math.max(Math.abs(low), Math.abs(high)) || 1;
    return { colors: DIVERGING[theme], share: (x) => (x / most + 1) / 2, ends: [show(-most), "0", show(most)] };
  }
  if ((value.isLog || (STATE.scale === "log" && !value.isEffect)) && high > 0) {
    const least = Math.max(low, high * 1e-6);
    const span = Math.log(high / least) || 1;
    return { colors: CIVIDIS, share: (x) => Math.log(Math.max(x, least) / least) / span, ends: [show(least), "log", show(high)] };
  }
  return { colors: CIVIDIS, share: (x) => (x - low) / (high - low || 1), ends: [show(low), "", show(high)] };
}

function sizeOf(map) {
  const width = Math.max(map.canvas.parentElement.clientWidth, 60);
  const rows = DATA.layers.length;
  const cell = Math.min(Math.max(460 / rows, 7), 26);
  return { width, height: Math.round(cell * rows) + TOP + BOTTOM, cellWidth: (width - LEFT) / map.block.heads.length, cellHeight: cell };
}

/** Left and top of a cell; layer 0 lies at the bottom. */
function boxOf(map, layer, head) {
  const { cellWidth, cellHeight } = map.size;
  return [LEFT + head * cellWidth, TOP + (DATA.layers.length - 1 - layer) * cellHeight, cellWidth, cellHeight];
}

function cellAt(map, event) {
  const box = map.canvas.getBoundingClientRect();
  const head = Math.floor((event.clientX - box.left - LEFT) / map.size.cellWidth);
  const layer = DATA.layers.length - 1 - Math.floor((event.clientY - box.top - TOP) / map.size.cellHeight);
  const inside = head >= 0 && head < map.block.heads.length && layer >= 0 && layer < DATA.layers.length;
  return inside ? { layer, head } : null;
}

function prepare(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  return context;
}

function drawMap(map) {
  const { block } = map;
  const style = getComputedStyle(document.documentElement);
  map.size = sizeOf(map);
  const context = prepare(map.canvas, map.size.width, map.size.height);
  const scale = scaleOf(map);
  const gap = Math.min(map.size.cellWidth, map.size.cellHeight) >= 9 ? 1 : 0;
  const numbers = block.values[VALUES[STATE.value].key];
  for (let layer = 0; layer < DATA.layers.length; layer++)
    for (let head = 0; head < block.heads.length; head++) {
      const [x, y, width, height] = boxOf(map, layer, head);
      const number = numbers ? numbers[block.at(layer, head)] : NaN;
      const color = Number.isNaN(number) ? null : mix(scale.colors, scale.share(number, block.at(layer, head)));
      context.fillStyle = color ? rgb(color) : style.getPropertyValue("--absent");
      // Whole pixels, so that no seam shows between cells.
      const [left, top] = [Math.round(x), Math.round(y)];
      context.fillRect(left, top, Math.round(x + width) - left - gap, Math.round(y + height) - top - gap);
    }
  drawMarks(context, map);
  drawAxes(context, map, style.getPropertyValue("--soft"));
  drawBar(map, scale);
}

function drawAxes(context, map, color) {
  context.fillStyle = color;
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "middle";
  context.textAlign = "right";
  const layerStep = Math.ceil(16 / map.size.cellHeight);
  for (let layer = 0; layer < DATA.layers.length; layer += layerStep) {
    const [, y, , height] = boxOf(map, layer, 0);
    context.fillText(String(DATA.layers[layer]), LEFT - 5, y + height / 2);
  }
  context.textAlign = "center";
  const headStep = Math.ceil(22 / map.size.cellWidth);
  for (let head = 0; head < map.block.heads.length; head += headStep) {
    const [x, , width] = boxOf(map, 0, head);
    context.fillText(String(map.block.heads[head]), x + width / 2, map.size.height - BOTTOM / 2 + 1);
  }
}

/** The colours of a scale from its low end to its high one. */
function paintBar(bar, colors) {
  const width = Math.max(bar.clientWidth, 60);
  const context = prepare(bar, width, 10);
  for (let x = 0; x < width; x++) {
    context.fillStyle = rgb(mix(colors, x / (width - 1)));
    context.fillRect(x, 0, 1.5, 10);
  }
}

function drawBar(map, scale) {
  paintBar(map.bar, scale.colors);
  map.ends.forEach((end, i) => { end.textContent = scale.ends[i]; });
}

/** Heads of another block that share a kv head with this one in this layer, as a range of columns. */
function related(map, { layer, head }, other) {
  const group = DATA.groups[layer];
  const isQuery = (block) => block.axis === "head";
  const number = map.block.heads[head];
  const belongs = (candidate) => {
    if (isQuery(map.block) === isQuery(other.block)) return candidate === number;
    return isQuery(map.block) ? candidate === Math.floor(number / group) : Math.floor(candidate / group) === number;
  };
  const columns = [...other.block.heads.keys()].filter((column) => belongs(other.block.heads[column]));
  return columns.length ? [columns[0], columns.at(-1)] : null;
}

function place(cursor, map, layer, [first, last]) {
  const [x, y, width, height] = boxOf(map, layer, first);
  const box = { left: x - 2, top: y - 2, width: width * (last - first + 1) + 3, height: height + 3 };
  for (const [name, size] of Object.entries(box)) cursor.style[name] = `${size}px`;
  cursor.hidden = false;
}

function point(map, cell) {
  for (const other of MAPS) {
    const columns = other === map ? [cell.head, cell.head] : related(map, cell, other);
    other.cursor.classList.toggle("related", other !== map);
    if (columns) place(other.cursor, other, cell.layer, columns);
    else other.cursor.hidden = true;
  }
}

function leave() {
  tip.hidden = true;
  if (STATE.selected) point(STATE.selected.map, STATE.selected);
  else MAPS.forEach((map) => { map.cursor.hidden = true; });
}

const nameOf = (block, cell) => `${block.name}, layer ${DATA.layers[cell.layer]}, ${block.axis} ${block.heads[cell.head]}`;

function showTip(map, cell, x, y) {
  const { block } = map;
  const rows = isThere(block, cell.layer, cell.head)
    ? numbersAtPointer(block, block.at(cell.layer, cell.head)).map(([name, text]) => make("span", {}, `${name} ${text}`))
    : [make("span", {}, "this layer has no such head")];
  tip.replaceChildren(make("b", {}, nameOf(block, cell)), ...rows);
  placeTip(x, y);
}

/** Show the tip beside a point of the window, inside it. */
function placeTip(x, y) {
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.min(Math.max(x + 14, 4), document.documentElement.clientWidth - width - 4)}px`;
  tip.style.top = `${y + 18 + height > innerHeight ? y - height - 10 : y + 18}px`;
}

function select(map, cell) {
  STATE.selected = { map, layer: cell.layer, head: cell.head };
  point(map, cell);
  showSelected(map.block, cell);
  history.replaceState(null, "", hashOf(map.block, cell));
}

/** A head as the end of the page's address: #Q.14.2 is block, layer and head. */
const hashOf = (block, cell) => `#${block.name}.${DATA.layers[cell.layer]}.${block.heads[cell.head]}`;

/** Select the head that an address names, bring its numbers into sight; say so where there is none. */
function follow(hash) {
  const [, name, layer, head] = hash.match(/^#([A-Za-z])\.([^.]+)\.([^.]+)$/) || [];
  const said = document.getElementById("no-head");
  said.hidden = true;
  if (!name) return;
  const map = MAPS.find(({ block }) => block.name === name);
  const isNumber = /^\d+ \d+$/.test(`${layer} ${head}`);
  const cell = map && isNumber && { layer: DATA.layers.indexOf(Number(layer)), head: map.block.heads.indexOf(Number(head)) };
  if (cell && cell.layer >= 0 && cell.head >= 0) select(map, cell);
  else {
    const here = (map || MAPS[0]).block;
    said.textContent = `This report has no head ${name} ${layer}.${head}: blocks ${DATA.blocks.map((block) => block.name).join(", ")}; layers ` +
      `${DATA.layers[0]} to ${DATA.layers.at(-1)}; ${here.axis}s of ${here.name} ${here.heads[0]} to ${here.heads.at(-1)}.`;
    said.hidden = false;
  }
  document.getElementById(said.hidden ? "selected" : "no-head").scrollIntoView({ block: "start" });
}

DRAW.push(() => {
  MAPS.forEach(drawMap);
  document.getElementById("value-hint").textContent = VALUES[STATE.value].hint + (!showsEffect() && hidesMarks && STATE.marks === "none"
    ? ` ${numMarked} of ${numHeads} heads are significant: their marks, which would hide the colours, are switched on under Marks.` : "");
  if (STATE.selected) {
    point(STATE.selected.map, STATE.selected);
    showSelected(STATE.selected.map.block, STATE.selected);
  }
});
