// Tables that sort by any column, and intervals drawn in their cells.

/** A column's name that sorts by it: state holds ``key`` and ``down``; ``first`` is the order of the first click. */
function sortHeader(table, [key, title, kind], state, draw, first) {
  const isSorted = state.key === key;
  const sort = () => {
    state.down = isSorted ? !state.down : first;
    state.key = key;
    draw();
    document.querySelector(`#${table} th[data-key="${key}"] button`).focus();
  };
  const order = isSorted ? { "aria-sort": state.down ? "descending" : "ascending" } : {};
  return make("th", { scope: "col", role: "columnheader", "data-key": key, class: kind || "", ...order }, make("button", { type: "button", onclick: sort }, title));
}

/** Numbers by size, names by their numbers; what is not there, or no finding, last. */
function sortBy(rows, key, down) {
  const sign = down ? -1 : 1;
  return rows.sort((x, y) => {
    const [a, b] = [x[key], y[key]];
    const isNone = (value) => Number.isNaN(value) || value === "";
    if (isNone(a) || isNone(b)) return isNone(a) - isNone(b);
    return sign * (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);
  });
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
