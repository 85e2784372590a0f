// What the page of two tasks offers as files.

/** The listed conflicts, as they are filtered and sorted. */
function conflictTable() {
  const names = ["block", "layer", "head", "score", "excess", "q_value", "finding", "id_a", "tokens_a", "id_b", "tokens_b", "text_a", "text_b"];
  const rows = kept().map((row) => [
    row.block, row.layer, row.head, row.score, row.excess, row.q, row.found, row.a, row.tokens_a, row.b, row.tokens_b,
    SAMPLES_A.texts[row.i], SAMPLES_B.texts[row.j],
  ]);
  return [names, ...rows];
}

function addDownloads() {
  document.getElementById("toolbar").append(pictureButton("heatmaps", "png", saveMaps));
  const value = () => VALUES[STATE.value].title;
  const charts = { "block-charts": ["blocks", value], "layer-charts": ["layers", value], "sums-charts": ["sums", () => VALUES.change.title] };
  for (const [id, [name, title]] of Object.entries(charts)) {
    const box = document.getElementById(id);
    if (box) box.before(make("div", { class: "toolbar" }, pictureButton(name, "svg", saveCharts(id, title))));
  }
  document.getElementById("filters").append(csvButton("conflicts", conflictTable));
}
