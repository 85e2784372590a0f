// Put the parts together; draw again when the width or the colour scheme changes.

document.getElementById("toolbar").append(
  segments("Value", "value", VALUES),
  segments("Score's scale", "scale", { linear: { label: "linear" }, log: { label: "log", there: !isSigned } }),
  segments("Score's colours", "range", { block: { label: "each block" }, shared: { label: "shared" } }));
document.getElementById("maps").append(...MAPS.map((map) => map.element));
document.getElementById("maps").classList.toggle("wide", mostHeads > 24);

const numSignificant = DATA.blocks.flatMap((block) => [...(block.values.q || [])]).filter((q) => q <= DATA.alpha).length;
document.getElementById("marks").textContent = isTested
  ? `● q ≤ ${DATA.alpha}; ◆ also family-wise p ≤ ${DATA.alpha} over all heads of all blocks. ` +
    (numSignificant ? `${numSignificant} heads are marked. ` : "No head is marked: none is significant. ") +
    "Grey: the layer has no such head. K and V have one column for each kv head; dashed boxes show the heads that share it."
  : "Heads were not tested. Grey: the layer has no such head. K and V have one column for each kv head; dashed boxes show the heads that share it.";
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
