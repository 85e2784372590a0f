// Put the parts together; draw again when the width or the colour scheme changes.

const OF_EFFECTS = hasEffects ? [...effectTools(), segments("Marks", "marks-of-effects", effectMarkChoices(), "effectMarks"),
  segments("Colours", "range-of-effects", { shared: { label: "shared" }, block: { label: "each block" } }, "effectRange")] : [];
const OF_TESTS = [
  segments("Marks", "marks", markChoices()),
  segments("Score's scale", "scale", { linear: { label: "linear" }, log: { label: "log", there: !isSigned } }),
  segments("Score's colours", "range", { block: { label: "each block" }, shared: { label: "shared" } }),
];
document.getElementById("toolbar").append(segments("Value", "value", VALUES), ...OF_EFFECTS, ...OF_TESTS);
DRAW.push(() => {
  const isEffect = showsEffect();
  for (const tool of OF_EFFECTS) tool.hidden = !isEffect;
  for (const tool of OF_TESTS) tool.hidden = isEffect;
  document.getElementById("effect-legend").hidden = !isEffect;
  document.getElementById("test-legend").hidden = isEffect;
});
document.getElementById("maps").append(...MAPS.map((map) => map.element));
document.getElementById("maps").classList.toggle("wide", mostHeads > 24);

document.getElementById("selected").append(make("p", { class: "hint" },
  "Click a cell, or move between cells with the arrow keys, to see a head's numbers and its strongest pair of samples. Enter lists its strongest pairs."));
document.getElementById("conflicts-hint").textContent = CONFLICTS.length
  ? "Pairs of samples of each block by how many times their score exceeds what the two samples' own scales explain (× scale), each at its " +
    "strongest head; no sample stands in more than a tenth of the rows, where there are samples enough. Click a column's name to sort, a text to see all of it."
  : "Scores of pairs were not kept (output.pairs: none).";

makeFilters();
addDownloads();
if (hasEffects) {
  const lead = (value, text) => make("button", { type: "button", onclick: () => {
    STATE.value = value;
    redraw();
    document.getElementById("heatmaps").scrollIntoView();
  } }, text);
  document.getElementById("weights-tools").append(lead("score", `Show ${DATA.score} in the heatmaps`), ...(hasStatistic ? [lead("overlap", "Show overlap in the heatmaps")] : []));
}
drawConflicts();
redraw();
follow(location.hash);
addEventListener("hashchange", () => follow(location.hash));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== width) requestAnimationFrame(redraw);
  width = innerWidth;
});
