// What blocks, then layers, add up to: waterfalls of changes, each with its interval.

/** A waterfall of [value, low, high] of each part, then of all: SVG of a given width. */
function waterfall(parts, all, names, width, label, every) {
  const [height, left, right, top, bottom] = [230, 52, 8, 14, 24];
  const bars = [];
  let sum = 0;
  for (const [value, low, high] of parts) {
    bars.push({ from: sum, to: sum + value, low: low === null ? null : sum + low, high: high === null ? null : sum + high, value });
    sum += value;
  }
  bars.push({ from: 0, to: all[0], low: all[1], high: all[2], value: all[0], isAll: true });
  const [least, most] = extent([bars.flatMap(({ from, to, low, high }) => [from, to, low ?? to, high ?? to, 0])]);
  const y = (number) => top + ((most - number) / (most - least || 1)) * (height - top - bottom);
  const slot = (width - left - right) / bars.length;
  const svg = makeSvg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  for (const tick of ticks(least, most, 4)) {
    svg.append(makeSvg("line", { x1: left, x2: width - right, y1: y(tick), y2: y(tick), class: Math.abs(tick) < 1e-12 ? "zero" : "grid" }));
    svg.append(makeSvg("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, show(Number(tick.toPrecision(6)))));
  }
  bars.forEach(({ from, to, low, high, value, isAll }, place) => {
    const x = left + slot * place + slot * 0.14;
    const kind = `${value > 0 ? "harm" : "help"}${isAll ? " all" : ""}`;
    const rect = makeSvg("rect", { x: fixed(x), width: fixed(slot * 0.72), y: fixed(y(Math.max(from, to))), height: fixed(Math.max(Math.abs(y(from) - y(to)), 1)), class: `sum ${kind}` });
    const interval = low === null ? "" : ` [${show(isAll ? low : low - from)}, ${show(isAll ? high : high - from)}]`;
    rect.append(makeSvg("title", {}, `${isAll ? "all" : names[place]}: ${show(value)}${interval}`));
    svg.append(rect);
    if (low !== null) svg.append(makeSvg("path", { class: "whisker", d: `M${fixed(x + slot * 0.36)} ${fixed(y(low))}V${fixed(y(high))}` }));
    if (isAll || place % every === 0)
      svg.append(makeSvg("text", { x: fixed(x + slot * 0.36), y: height - 8, "text-anchor": "middle" }, isAll ? "all" : names[place]));
  });
  return svg;
}

function drawSums() {
  const box = document.getElementById("sums-charts");
  const { all, blocks, layers } = DATA.effects.totals[STATE.optimizer];
  document.getElementById("sums-hint").textContent =
    `Changes of ${STATE.optimizer} add up: first over the heads of each block, then over those of each layer (first to last). Orange raises ` +
    `the other task's loss, blue lowers it; the bar at the right is all of attention, ${show(all[0])} [${show(all[1])}, ${show(all[2])}]. ` +
    "Lines: each part's own 95% interval.";
  const widths = getComputedStyle(box).gridTemplateColumns.split(" ").map(parseFloat);
  const sums = [
    ["Blocks", blocks, DATA.blocks.map(({ name }) => name), 1, widths[0]],
    ["Layers", layers, DATA.layers.map(String), Math.ceil((layers.length * 26) / ((widths[1] || widths[0]) - 60)), widths[1] || widths[0]],
  ];
  box.replaceChildren(...sums.map(([title, parts, names, every, width]) => make("div", { class: "chart" }, make("h3", {}, title),
    waterfall(parts, all, names, Math.max(width, 140), `${title}: what changes add up to`, every))));
}

if (hasEffects) DRAW.push(drawSums);
