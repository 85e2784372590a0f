// Put the parts of the page of many tasks together; draw again when the width or the colour scheme changes.

matrixTools();
if (WORDS.length) {
  headTools();
  document.getElementById("maps").append(...MAPS.map((map) => map.element));
  document.getElementById("maps").classList.toggle("wide", mostHeads > 24);
  document.getElementById("selected").append(make("p", { class: "hint" }, "Click a cell, or move between cells with the arrow keys, to see in which pairs a head shows what." +
    (hasCodes ? "" : " This page holds the counts alone: heads of every pair are on its own page.")));
} else document.getElementById("heads-over-pairs").hidden = true;
pairPanel.append(make("p", { class: "hint" }, "Click a cell to open the page of its pair; with arrow keys move between cells, Enter opens. On a touch screen the first touch shows the numbers, the second opens."));
redraw();
const followAddress = (hash) => { if (hash && !followPair(hash)) follow(hash); };
followAddress(location.hash);
addEventListener("hashchange", () => followAddress(location.hash));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== width) requestAnimationFrame(redraw);
  width = innerWidth;
});
