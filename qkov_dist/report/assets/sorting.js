// Tables that sort by any column.

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
