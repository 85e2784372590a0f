// Put the parts together; draw again when the width or the colour scheme changes.

document.getElementById("toolbar").append(
  segments("Value", "value", VALUES),
  segments("Marks", "marks", markChoices()),
  segments("Score's scale", "scale", { linear: { label: "linear" }, log: { label: "log", there: !isSigned } }),
  segments("Score's colours", "range", { block: { label: "each block" }, shared: { label: "shared" } }));
document.getElementById("maps").append(...MAPS.map((map) => map.element));
document.getElementById("maps").classList.toggle("wide", mostHeads > 24);

document.getElementById("selected").append(make("p", { class: "hint" },
  "Click a cell, or move between cells with the arrow keys, to see a head's numbers and its strongest pair of samples. Enter lists its conflicts."));
document.getElementById("conflicts-hint").textContent = CONFLICTS.length
  ? "The strongest pairs of samples of each block. Click a column's name to sort, a text to see all of it."
  : "Scores of pairs were not kept (output.pairs: none).";

makeFilters();
drawConflicts();
redraw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== width) requestAnimationFrame(redraw);
  width = innerWidth;
});
