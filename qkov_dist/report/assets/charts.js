// Block comparison and layer profile: small charts in SVG, one for each block.

const CHART = { width: 300, height: 190, left: 44, right: 6, top: 8, bottom: 30 };

/** Charts are drawn in the page's own pixels, so that text stays as large on a phone. */
function measure(id) {
  const box = document.getElementById(id);
  const columns = getComputedStyle(box).gridTemplateColumns.split(" ");
  CHART.width = Math.max(parseFloat(columns[0]) || 300, 140);
  return box;
}

/** The number below which a share of an array lies. */
function quantile(numbers, share) {
  const sorted = numbers.filter((number) => !Number.isNaN(number)).sort();
  return sorted.length ? sorted[Math.round(share * (sorted.length - 1))] : NaN;
}

/** Lowest and highest value, and most of the intervals: a single wild one must not flatten the rest. */
function range(block, value) {
  const ends = [[value.low, 0.02], [value.high, 0.98], [`${value.null}_low`, 0.02], [`${value.null}_high`, 0.98]].map(([key, share]) => quantile(block.values[key] || new Float32Array(), share));
  return [...(block.values[value.key] || []), ...ends];
}

/** A vertical axis over arrays of numbers: linear, or logarithmic for q and, where the switch says so, for scores. */
function axisOver(arrays, kind = STATE.value) {
  const [low, high] = extent(arrays);
  const { height, top, bottom } = CHART;
  const isLog = high > 0 && (kind === "q" || VALUES[kind].isLog || (STATE.scale === "log" && kind === "score" && !isSigned));
  const least = isLog ? Math.max(low, high * 1e-6) : Math.min(low, 0);
  const most = isLog ? high : Math.max(high, 0);
  const move = isLog ? Math.log10 : (x) => x;
  const [from, to] = [move(least), move(most)];
  const y = (x) => height - bottom - ((move(Math.min(Math.max(x, least), most)) - from) / (to - from || 1)) * (height - top - bottom);
  const marks = isLog ? ticks(Math.ceil(from), to, 3).filter(Number.isInteger).map((n) => 10 ** n) : ticks(least, most, 4);
  return { y, marks, hasZero: !isLog && least < 0 };
}

function chart(block, axis, note, label) {
  const { width, height, left, right, bottom } = CHART;
  const svg = makeSvg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  for (const tick of axis.marks) {
    const isZero = axis.hasZero && Math.abs(tick) < 1e-12;
    svg.append(makeSvg("line", { x1: left, x2: width - right, y1: axis.y(tick), y2: axis.y(tick), class: isZero ? "zero" : "grid" }));
    svg.append(makeSvg("text", { x: left - 6, y: axis.y(tick) + 4, "text-anchor": "end" }, show(Number(tick.toPrecision(6)))));
  }
  svg.append(makeSvg("text", { x: (left + width - right) / 2, y: height - bottom + 26, "text-anchor": "middle" }, note));
  return { svg, element: make("div", { class: `chart ${block.name}` }, make("h3", {}, make("i"), block.name), svg) };
}


function drawBlocks() {
  const value = VALUES[STATE.value];
  const box = measure("block-charts");
  const common = STATE.value !== "score" || STATE.range === "shared" ? axisOver(DATA.blocks.map((block) => range(block, value))) : null;
  const { width, left, right } = CHART;
  const hasIntervals = DATA.blocks.some((block) => !Number.isNaN(quantile(block.values[value.low] || new Float32Array(), 0.5)));
  const hasNulls = DATA.blocks.some((block) => block.values[value.null]);
  document.getElementById("intervals-hint").textContent = `Every head's ${value.title}, lowest to highest within its block` +
    (hasIntervals ? `, with its ${show(100 * DATA.confidence)} % jackknife interval over samples (cut at the frame).` : ".") +
    (hasNulls ? ` Grey: ${showsEffect() ? "where it would lie if the head did nothing, 0 ± the same width." : `the middle ${show(100 * DATA.confidence)} % of its null, under exchanged labels, with a tick at the mean.`}` : "") +
    (common ? " One axis for all blocks." : " Each block has its own axis: sizes of slices differ.");
  box.replaceChildren(...DATA.blocks.map((block) => {
    const axis = common || axisOver([range(block, value)]);
    const numbers = block.values[value.key] || new Float32Array();
    const order = [...numbers.keys()].filter((at) => !Number.isNaN(numbers[at])).sort((a, b) => numbers[a] - numbers[b]);
    const x = (rank) => left + 6 + ((rank + 0.5) / order.length) * (width - left - right - 12);
    const { svg, element } = chart(block, axis, `${order.length} heads, sorted`, `Block ${block.name}: ${value.title} of each head, sorted`);
    const bars = order.map((at, rank) => [x(rank), block.value(value.low, at), block.value(value.high, at)])
      .filter(([, low]) => !Number.isNaN(low))
      .map(([at, low, high]) => `M${fixed(at)} ${fixed(axis.y(low))}V${fixed(axis.y(high))}`);
    const nulls = order.map((at, rank) => [x(rank), ...["_low", "_high", ""].map((end) => block.value(value.null + end, at))])
      .filter(([, low]) => !Number.isNaN(low))
      .map(([at, low, high, mean]) => [`M${fixed(at)} ${fixed(axis.y(low))}V${fixed(axis.y(high))}`, `M${fixed(at - 1.5)} ${fixed(axis.y(mean))}h3`]);
    svg.append(makeSvg("path", { class: "null-band", d: nulls.map(([band]) => band).join("") }));
    svg.append(makeSvg("path", { class: "null-mean", d: nulls.map(([, mean]) => mean).join("") }));
    svg.append(makeSvg("path", { class: "mark interval", d: bars.join(""), "stroke-width": Math.min(4, Math.max(0.6, 150 / order.length)) }));
    drawHeads(svg, block, new Map(order.map((at, rank) => [at, [x(rank), axis.y(numbers[at])]])));
    return element;
  }));
}

/** Marked heads by their marks, the others as dots; places: where each head lies. */
function drawHeads(svg, block, places) {
  const shapes = new Map();
  for (const { at, finding } of marksOf(block)) {
    if (!places.has(at)) continue;
    const corners = cornersOf(finding.mark, ...places.get(at), 3).map((corner) => corner.map(fixed).join(" "));
    shapes.set(finding, `${shapes.get(finding) || ""}M${corners.join("L")}Z`);
    places.delete(at);
  }
  const dots = [...places.values()].map((place) => `M${place.map(fixed).join(" ")}h.01`);
  svg.append(makeSvg("path", { class: "mark dots", d: dots.join("") }));
  for (const finding of findingsShown().toReversed()) // the first last: what lies above the null stays in sight
    if (shapes.has(finding)) svg.append(makeSvg("path", { class: `mark-${finding.side}`, d: shapes.get(finding) }));
}

/** Where a layer lies on the horizontal axis of a chart. */
function layerX(place) {
  const { width, left, right } = CHART;
  return left + 4 + (place / Math.max(DATA.layers.length - 1, 1)) * (width - left - right - 8);
}

function drawLayers() {
  const value = VALUES[STATE.value];
  const box = measure("layer-charts");
  const common = STATE.value !== "score" || STATE.range === "shared" ? axisOver(DATA.blocks.map((block) => block.values[value.key] || [])) : null;
  box.replaceChildren(...DATA.blocks.map((block) => {
    const numbers = block.values[value.key] || new Float32Array();
    const axis = common || axisOver([numbers]);
    const { svg, element } = chart(block, axis, "layer", `Block ${block.name}: ${value.title} by layer`);
    const layers = DATA.layers.map((_, place) => {
      const row = [...numbers.subarray(block.at(place, 0), block.at(place + 1, 0))].filter((number) => !Number.isNaN(number));
      return row.length && { place, low: Math.min(...row), high: Math.max(...row), mean: row.reduce((sum, n) => sum + n) / row.length };
    });
    for (const run of runs(layers)) {
      const at = (layer, key) => `${fixed(layerX(layer.place))} ${fixed(axis.y(layer[key]))}`;
      const band = [...run.map((layer) => at(layer, "high")), ...run.toReversed().map((layer) => at(layer, "low"))];
      svg.append(makeSvg("path", { class: "mark band", d: `M${band.join("L")}Z` }));
      svg.append(makeSvg("path", { class: "mark line", d: `M${run.map((layer) => at(layer, "mean")).join("L")}h.01` }));
    }
    numberLayers(svg);
    return element;
  }));
}

function numberLayers(svg) {
  const { width, height, left, bottom } = CHART;
  for (let place = 0; place < DATA.layers.length; place += Math.ceil((DATA.layers.length * 30) / (width - left)))
    svg.append(makeSvg("text", { x: layerX(place), y: height - bottom + 13, "text-anchor": "middle" }, String(DATA.layers[place])));
}

/** What belongs to no head, one chart for each parameter. */
function drawShared() {
  const box = document.getElementById("shared-charts");
  if (!box) return;
  box.replaceChildren(...Object.entries(DATA.shared).map(([name, means]) => {
    const axis = axisOver([means], "score");
    const title = name.replace("_", " ");
    const { svg, element } = chart({ name: title }, axis, "layer", `${title}: mean ${DATA.score} by layer`);
    element.classList.add("O");
    const layers = [...means].map((mean, place) => !Number.isNaN(mean) && { place, mean });
    for (const run of runs(layers))
      svg.append(makeSvg("path", { class: "mark line", d: `M${run.map(({ place, mean }) => `${fixed(layerX(place))} ${fixed(axis.y(mean))}`).join("L")}h.01` }));
    numberLayers(svg);
    return element;
  }));
}

/** Layers with this block that lie next to each other. */
function runs(layers) {
  const found = [[]];
  for (const layer of layers) layer ? found.at(-1).push(layer) : found.push([]);
  return found.filter((run) => run.length);
}

DRAW.push(drawBlocks, drawLayers, drawShared);
